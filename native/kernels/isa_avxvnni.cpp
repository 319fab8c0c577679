// The kernels on AVX2, and the dot product of AVX-512 VNNI in registers of 256 bits.
#include "table.h"
#include "vec_avx2.h"

namespace {
// acc + sum over the four columns of code * activation. kWide: codes may pass 127.
template <bool kWide>
VEC I dot(I acc, U codes, I quad) {
  return {_mm256_dpbusd_avx_epi32(acc.a, codes.a, quad.a), _mm256_dpbusd_avx_epi32(acc.b, codes.b, quad.b)};
}
}  // namespace

#include "kernels.inl"

const isotherm::KernelTable isotherm::kAvxVnniTable = make_table("avxvnni");
