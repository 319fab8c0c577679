// The kernels on AVX-512.
#include "table.h"
#include "vec_avx512.h"

#include "kernels.inl"

const isotherm::KernelTable isotherm::kAvx512Table = make_table("avx512");
