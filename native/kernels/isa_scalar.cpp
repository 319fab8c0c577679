// The kernels in plain C++.
#include "table.h"
#include "vec_scalar.h"

#include "kernels.inl"

const isotherm::KernelTable isotherm::kScalarTable = make_table("scalar");
