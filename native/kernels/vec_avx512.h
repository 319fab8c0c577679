// The vector layer on AVX-512 (F, BW, VL, DQ, VNNI): 16 lanes are one register.
// Every vec_*.h offers the same types and functions, and gives the same bits.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct F {  // 16 float32
  __m512 v;
};
struct I {  // 16 int32
  __m512i v;
};
struct U {  // 64 bytes: 16 rows of 4 codes
  __m512i v;
};

constexpr int kFewTokens = 4;   // tokens in registers at once, codes of two tiles from the packed panel
constexpr int kLoneTokens = 8;  // the same, a tile after the other
constexpr int kManyTokens = 6;  // the same, codes from an unpacked chunk
constexpr int kAttendRows = 6;  // query rows in registers at once

#define VEC inline __attribute__((always_inline))

VEC F load(const float* p) { return {_mm512_loadu_ps(p)}; }
VEC F splat(float x) { return {_mm512_set1_ps(x)}; }
VEC void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
VEC F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
VEC F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
VEC F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
VEC F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
VEC F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
VEC F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
VEC F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
VEC F zero_where_zero(F mask, F x) {  // 0 in the lanes in which mask is 0
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(mask.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), x.v)};
}
VEC F zero_where_less(F a, F b, F x) {  // 0 in the lanes in which a < b
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}
VEC F abs(F a) { return {_mm512_abs_ps(a.v)}; }
VEC F rint(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
VEC F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
VEC I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
VEC F power_of_two(I n) {  // 2 ** n for -126 <= n <= 127
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}

VEC F load_f16(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
VEC F load_bf16(const void* p) {
  const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
VEC F load_i8(const void* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))))};
}
VEC void store_f16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

VEC float sum(F a) {  // halves are added until one lane is left
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
VEC float largest(F a) { return _mm512_reduce_max_ps(a.v); }

VEC I isplat(int32_t x) { return {_mm512_set1_epi32(x)}; }
VEC F as_float(I a) { return {_mm512_castsi512_ps(a.v)}; }
VEC I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
VEC int32_t sum(I a) { return _mm512_reduce_add_epi32(a.v); }
VEC void store_i8(int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }
VEC I load_quad(const int8_t* p) {  // four codes, to every row
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return {_mm512_set1_epi32(quad)};
}

VEC U load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
VEC void store(uint8_t* p, U x) { _mm512_storeu_si512(p, x.v); }
// (x >> kBit) & kMask, byte by byte
template <int kBit, int kMask>
VEC U bits(U x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.v, kBit), _mm512_set1_epi8(kMask))};
}
// code | ((plane >> kBit) & kMask) << kTo
template <int kBit, int kMask, int kTo>
VEC U add_plane(U code, U plane) {
  constexpr int kShift = kBit - kTo;
  const __m512i moved = kShift >= 0 ? _mm512_srli_epi16(plane.v, kShift >= 0 ? kShift : 0)
                                    : _mm512_slli_epi16(plane.v, kShift < 0 ? -kShift : 0);
  return {_mm512_ternarylogic_epi32(code.v, moved, _mm512_set1_epi8(kMask << kTo), 0xF8)};
}
VEC U load_table(const uint8_t* p) {  // 16 bytes that four bits choose from
  return {_mm512_maskz_broadcast_i32x4(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
VEC U look_up(U table, U nibbles) { return {_mm512_shuffle_epi8(table.v, nibbles.v)}; }

// Bytes of four vectors side by side, within each 16 bytes: out[j] has 4 bytes of each place 4 j to 4 j + 3.
VEC void interleave(U a, U b, U c, U d, U (&out)[4]) {
  const __m512i ab_low = _mm512_unpacklo_epi8(a.v, b.v), ab_high = _mm512_unpackhi_epi8(a.v, b.v);
  const __m512i cd_low = _mm512_unpacklo_epi8(c.v, d.v), cd_high = _mm512_unpackhi_epi8(c.v, d.v);
  out[0].v = _mm512_unpacklo_epi16(ab_low, cd_low);
  out[1].v = _mm512_unpackhi_epi16(ab_low, cd_low);
  out[2].v = _mm512_unpacklo_epi16(ab_high, cd_high);
  out[3].v = _mm512_unpackhi_epi16(ab_high, cd_high);
}

VEC U load_pieces(const uint8_t* const* rows, size_t offset) {  // 16 bytes of each fourth of 13 rows
  const auto piece = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset)); };
  __m512i x = _mm512_maskz_broadcast_i32x4(0x000F, piece(0));
  x = _mm512_mask_broadcast_i32x4(x, 0x00F0, piece(4));
  x = _mm512_mask_broadcast_i32x4(x, 0x0F00, piece(8));
  return {_mm512_mask_broadcast_i32x4(x, 0xF000, piece(12))};
}
// Words of four vectors, within each 16 bytes: out[j] has word j of each.
VEC void transpose_words(U a, U b, U c, U d, U (&out)[4]) {
  const __m512i ab_low = _mm512_unpacklo_epi32(a.v, b.v), ab_high = _mm512_unpackhi_epi32(a.v, b.v);
  const __m512i cd_low = _mm512_unpacklo_epi32(c.v, d.v), cd_high = _mm512_unpackhi_epi32(c.v, d.v);
  out[0].v = _mm512_unpacklo_epi64(ab_low, cd_low);
  out[1].v = _mm512_unpackhi_epi64(ab_low, cd_low);
  out[2].v = _mm512_unpacklo_epi64(ab_high, cd_high);
  out[3].v = _mm512_unpackhi_epi64(ab_high, cd_high);
}

// acc + sum over the four columns of code * activation. kWide: codes may pass 127.
template <bool kWide>
VEC I dot(I acc, U codes, I quad) {
  return {_mm512_dpbusd_epi32(acc.v, codes.v, quad.v)};
}

}  // namespace
