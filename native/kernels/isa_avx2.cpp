// The kernels on AVX2, FMA and F16C.
#include "table.h"
#include "vec_avx2.h"

namespace {
// Codes up to 127: pairs fit int16. Wider ones: even and odd columns are multiplied as int16 each.
template <bool kWide>
VEC __m256i dot(__m256i acc, __m256i codes, __m256i quad) {
  if constexpr (!kWide) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, quad), _mm256_set1_epi16(1)));
  } else {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(quad, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(quad, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
}
// acc + sum over the four columns of code * activation. kWide: codes may pass 127.
template <bool kWide>
VEC I dot(I acc, U codes, I quad) {
  return {dot<kWide>(acc.a, codes.a, quad.a), dot<kWide>(acc.b, codes.b, quad.b)};
}
}  // namespace

#include "kernels.inl"

const isotherm::KernelTable isotherm::kAvx2Table = make_table("avx2");
