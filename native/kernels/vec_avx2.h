// The vector layer on AVX2, FMA and F16C: 16 lanes are two registers. The dot product is each isa_*.cpp's own.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct F {  // 16 float32
  __m256 a, b;
};
struct I {  // 16 int32
  __m256i a, b;
};
struct U {  // 64 bytes: 16 rows of 4 codes
  __m256i a, b;
};

constexpr int kFewTokens = 2;   // tokens in registers at once, codes of two tiles from the packed panel
constexpr int kLoneTokens = 4;  // the same, a tile after the other
constexpr int kManyTokens = 2;  // the same, codes from an unpacked chunk
constexpr int kAttendRows = 3;  // query rows in registers at once

#define VEC inline __attribute__((always_inline))

VEC F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
VEC F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
VEC void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
VEC F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
VEC F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
VEC F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
VEC F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
VEC F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
VEC F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
VEC F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
VEC F zero_where_zero(F mask, F x) {  // 0 in the lanes in which mask is 0
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_and_ps(_mm256_cmp_ps(mask.a, zero, _CMP_NEQ_UQ), x.a),
          _mm256_and_ps(_mm256_cmp_ps(mask.b, zero, _CMP_NEQ_UQ), x.b)};
}
VEC F zero_where_less(F a, F b, F x) {  // 0 in the lanes in which a < b
  return {_mm256_and_ps(_mm256_cmp_ps(a.a, b.a, _CMP_NLT_UQ), x.a),
          _mm256_and_ps(_mm256_cmp_ps(a.b, b.b, _CMP_NLT_UQ), x.b)};
}
VEC F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
VEC F rint(F x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
VEC F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
VEC I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
VEC __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
VEC F power_of_two(I n) { return {power_of_two(n.a), power_of_two(n.b)}; }  // 2 ** n for -126 <= n <= 127

VEC F load_f16(const void* p) {
  const auto* half = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
VEC __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
VEC F load_bf16(const void* p) {
  const auto* half = static_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(half)), widen_bf16(_mm_loadu_si128(half + 1))};
}
VEC F load_i8(const void* p) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
VEC void store_f16(uint16_t* p, F x) {
  auto* half = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(half, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(half + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

VEC float sum(F x) {  // halves are added until one lane is left
  const __m256 h = _mm256_add_ps(x.a, x.b);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
VEC float largest(F x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

VEC I isplat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
VEC F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
VEC I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
VEC int32_t sum(I x) {
  const __m256i h = _mm256_add_epi32(x.a, x.b);
  const __m128i q = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  const __m128i d = _mm_add_epi32(q, _mm_srli_si128(q, 8));
  return _mm_cvtsi128_si32(_mm_add_epi32(d, _mm_srli_si128(d, 4)));
}
VEC void store_i8(int8_t* p, I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
VEC I load_quad(const int8_t* p) {  // four codes, to every row
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return isplat(quad);
}

VEC U load_codes(const uint8_t* p) {
  const auto* half = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
VEC void store(uint8_t* p, U x) {
  auto* half = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(half, x.a);
  _mm256_storeu_si256(half + 1, x.b);
}
// (x >> kBit) & kMask, byte by byte
template <int kBit, int kMask>
VEC U bits(U x) {
  const __m256i mask = _mm256_set1_epi8(kMask);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, kBit), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, kBit), mask)};
}
// code | ((plane >> kBit) & kMask) << kTo
template <int kBit, int kMask, int kTo>
VEC __m256i add_plane(__m256i code, __m256i plane) {
  constexpr int kShift = kBit - kTo;
  const __m256i moved = kShift >= 0 ? _mm256_srli_epi16(plane, kShift >= 0 ? kShift : 0)
                                    : _mm256_slli_epi16(plane, kShift < 0 ? -kShift : 0);
  return _mm256_or_si256(code, _mm256_and_si256(moved, _mm256_set1_epi8(kMask << kTo)));
}
template <int kBit, int kMask, int kTo>
VEC U add_plane(U code, U plane) {
  return {add_plane<kBit, kMask, kTo>(code.a, plane.a), add_plane<kBit, kMask, kTo>(code.b, plane.b)};
}
VEC void interleave(__m256i a, __m256i b, __m256i c, __m256i d, __m256i (&out)[4]) {
  const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
  out[0] = _mm256_unpacklo_epi16(ab_low, cd_low);
  out[1] = _mm256_unpackhi_epi16(ab_low, cd_low);
  out[2] = _mm256_unpacklo_epi16(ab_high, cd_high);
  out[3] = _mm256_unpackhi_epi16(ab_high, cd_high);
}
// Bytes of four vectors side by side, within each 16 bytes: out[j] has 4 bytes of each place 4 j to 4 j + 3.
VEC void interleave(U a, U b, U c, U d, U (&out)[4]) {
  __m256i low[4], high[4];
  interleave(a.a, b.a, c.a, d.a, low);
  interleave(a.b, b.b, c.b, d.b, high);
  for (int j = 0; j < 4; j++) out[j] = {low[j], high[j]};
}
VEC U load_pieces(const uint8_t* const* rows, size_t offset) {  // 16 bytes of each fourth of 13 rows
  const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
  return {_mm256_inserti128_si256(_mm256_castsi128_si256(piece(0)), piece(4), 1),
          _mm256_inserti128_si256(_mm256_castsi128_si256(piece(8)), piece(12), 1)};
}
VEC void transpose_words(__m256i a, __m256i b, __m256i c, __m256i d, __m256i (&out)[4]) {
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  out[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
  out[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
  out[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
  out[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}
// Words of four vectors, within each 16 bytes: out[j] has word j of each.
VEC void transpose_words(U a, U b, U c, U d, U (&out)[4]) {
  __m256i low[4], high[4];
  transpose_words(a.a, b.a, c.a, d.a, low);
  transpose_words(a.b, b.b, c.b, d.b, high);
  for (int j = 0; j < 4; j++) out[j] = {low[j], high[j]};
}
VEC U load_table(const uint8_t* p) {  // 16 bytes that four bits choose from
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {table, table};
}
VEC U look_up(U table, U nibbles) {
  return {_mm256_shuffle_epi8(table.a, nibbles.a), _mm256_shuffle_epi8(table.b, nibbles.b)};
}

}  // namespace
