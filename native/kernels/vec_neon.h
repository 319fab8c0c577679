// The vector layer on NEON (AArch64): 16 lanes are four registers. The dot product is each isa_*.cpp's own.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace {

struct F {  // 16 float32
  float32x4_t v[4];
};
struct I {  // 16 int32
  int32x4_t v[4];
};
struct U {  // 64 bytes: 16 rows of 4 codes
  uint8x16_t v[4];
};

constexpr int kFewTokens = 2;   // tokens in registers at once, codes of two tiles from the packed panel
constexpr int kLoneTokens = 6;  // the same, a tile after the other
constexpr int kManyTokens = 2;  // the same, codes from an unpacked chunk
constexpr int kAttendRows = 1;  // query rows in registers at once

#define VEC inline __attribute__((always_inline))

template <class T, class Op>
VEC T each(Op op) {
  return {{op(0), op(1), op(2), op(3)}};
}

VEC F load(const float* p) {
  return each<F>([=](int i) { return vld1q_f32(p + 4 * i); });
}
VEC F splat(float x) {
  return each<F>([=](int) { return vdupq_n_f32(x); });
}
VEC void store(float* p, F x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
VEC F fma(F a, F b, F c) {
  return each<F>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
VEC F operator+(F a, F b) {
  return each<F>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
VEC F operator-(F a, F b) {
  return each<F>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
VEC F operator*(F a, F b) {
  return each<F>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
VEC F operator/(F a, F b) {
  return each<F>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
VEC F max(F a, F b) {  // as x86 has it: b where either is not a number; fmax gives that one instead
  return each<F>([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
VEC F min(F a, F b) {
  return each<F>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
VEC F zero_where_zero(F mask, F x) {  // 0 in the lanes in which mask is 0
  return each<F>([&](int i) { return vbslq_f32(vceqzq_f32(mask.v[i]), vdupq_n_f32(0.0f), x.v[i]); });
}
VEC F zero_where_less(F a, F b, F x) {  // 0 in the lanes in which a < b
  return each<F>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), vdupq_n_f32(0.0f), x.v[i]); });
}
VEC F abs(F a) {
  return each<F>([&](int i) { return vabsq_f32(a.v[i]); });
}
VEC F rint(F a) {
  return each<F>([&](int i) { return vrndnq_f32(a.v[i]); });
}
VEC F to_float(I a) {
  return each<F>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
VEC I to_int(F a) {  // what does not fit saturates: only x86 gives INT_MIN, and no answer depends on it
  return each<I>([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
}
VEC F power_of_two(I n) {  // 2 ** n for -126 <= n <= 127
  return each<F>([&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[i], vdupq_n_s32(127)), 23)); });
}

VEC F load_f16(const void* p) {
  const auto* half = static_cast<const uint16_t*>(p);
  return each<F>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + 4 * i))); });
}
VEC F load_bf16(const void* p) {
  const auto* half = static_cast<const uint16_t*>(p);
  return each<F>([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(half + 4 * i), 16)); });
}
VEC F load_i8(const void* p) {
  const int8x16_t bytes = vld1q_s8(static_cast<const int8_t*>(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
VEC void store_f16(uint16_t* p, F x) {
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}

VEC float sum(F x) {  // halves are added until one lane is left
  const float32x4_t q = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  return vpadds_f32(vadd_f32(vget_low_f32(q), vget_high_f32(q)));
}
VEC float largest(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[2]), vmaxq_f32(x.v[1], x.v[3]))); }

VEC I isplat(int32_t x) {
  return each<I>([=](int) { return vdupq_n_s32(x); });
}
VEC F as_float(I a) {
  return each<F>([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
}
VEC I operator+(I a, I b) {
  return each<I>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
VEC int32_t sum(I a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[2]), vaddq_s32(a.v[1], a.v[3]))); }
VEC void store_i8(int8_t* p, I a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
VEC I load_quad(const int8_t* p) {  // four codes, to every row
  int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return isplat(quad);
}

VEC U load_codes(const uint8_t* p) {
  return each<U>([=](int i) { return vld1q_u8(p + 16 * i); });
}
VEC void store(uint8_t* p, U x) {
  for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, x.v[i]);
}
// x >> kBit, or << -kBit
template <int kBit>
VEC uint8x16_t shift(uint8x16_t x) {
  if constexpr (kBit == 0) return x;
  return vshlq_u8(x, vdupq_n_s8(-kBit));
}
// (x >> kBit) & kMask, byte by byte
template <int kBit, int kMask>
VEC U bits(U x) {
  return each<U>([&](int i) { return vandq_u8(shift<kBit>(x.v[i]), vdupq_n_u8(kMask)); });
}
// code | ((plane >> kBit) & kMask) << kTo
template <int kBit, int kMask, int kTo>
VEC U add_plane(U code, U plane) {
  return each<U>(
      [&](int i) { return vorrq_u8(code.v[i], vandq_u8(shift<kBit - kTo>(plane.v[i]), vdupq_n_u8(kMask << kTo))); });
}
// Bytes of four vectors side by side, within each 16 bytes: out[j] has 4 bytes of each place 4 j to 4 j + 3.
VEC void interleave(U a, U b, U c, U d, U (&out)[4]) {
  for (int i = 0; i < 4; i++) {
    const uint8x16x2_t ab = vzipq_u8(a.v[i], b.v[i]), cd = vzipq_u8(c.v[i], d.v[i]);
    const uint16x8x2_t low = vzipq_u16(vreinterpretq_u16_u8(ab.val[0]), vreinterpretq_u16_u8(cd.val[0]));
    const uint16x8x2_t high = vzipq_u16(vreinterpretq_u16_u8(ab.val[1]), vreinterpretq_u16_u8(cd.val[1]));
    out[0].v[i] = vreinterpretq_u8_u16(low.val[0]);
    out[1].v[i] = vreinterpretq_u8_u16(low.val[1]);
    out[2].v[i] = vreinterpretq_u8_u16(high.val[0]);
    out[3].v[i] = vreinterpretq_u8_u16(high.val[1]);
  }
}
VEC U load_pieces(const uint8_t* const* rows, size_t offset) {  // 16 bytes of each fourth of 13 rows
  return each<U>([=](int i) { return vld1q_u8(rows[4 * i] + offset); });
}
// Words of four vectors, within each 16 bytes: out[j] has word j of each.
VEC void transpose_words(U a, U b, U c, U d, U (&out)[4]) {
  const auto words = [](uint8x16_t x) { return vreinterpretq_u32_u8(x); };
  const auto join = [](uint32x2_t low, uint32x2_t high) { return vreinterpretq_u8_u32(vcombine_u32(low, high)); };
  for (int i = 0; i < 4; i++) {
    const uint32x4x2_t ab = vzipq_u32(words(a.v[i]), words(b.v[i])), cd = vzipq_u32(words(c.v[i]), words(d.v[i]));
    for (int j = 0; j < 2; j++) {
      out[2 * j].v[i] = join(vget_low_u32(ab.val[j]), vget_low_u32(cd.val[j]));
      out[2 * j + 1].v[i] = join(vget_high_u32(ab.val[j]), vget_high_u32(cd.val[j]));
    }
  }
}
VEC U load_table(const uint8_t* p) {  // 16 bytes that four bits choose from
  return each<U>([=](int) { return vld1q_u8(p); });
}
VEC U look_up(U table, U nibbles) {
  return each<U>([&](int i) { return vqtbl1q_u8(table.v[i], nibbles.v[i]); });
}

}  // namespace
