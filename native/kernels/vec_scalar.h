// The vector layer in plain C++: the twin that every other one must equal, and the one that builds anywhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct F {  // 16 float32
  float v[16];
};
struct I {  // 16 int32
  int32_t v[16];
};
struct U {  // 64 bytes: 16 rows of 4 codes
  uint8_t v[64];
};

constexpr int kFewTokens = 1;   // tokens in registers at once, codes of two tiles from the packed panel
constexpr int kLoneTokens = 1;  // the same, a tile after the other
constexpr int kManyTokens = 1;  // the same, codes from an unpacked chunk
constexpr int kAttendRows = 1;  // query rows in registers at once

#define VEC inline

template <class T, class Op>
VEC T each(Op op) {
  T out;
  for (int i = 0; i < 16; i++) out.v[i] = op(i);
  return out;
}

VEC F load(const float* p) {
  return each<F>([=](int i) { return p[i]; });
}
VEC F splat(float x) {
  return each<F>([=](int) { return x; });
}
VEC void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
VEC F fma(F a, F b, F c) {
  return each<F>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
VEC F operator+(F a, F b) {
  return each<F>([&](int i) { return a.v[i] + b.v[i]; });
}
VEC F operator-(F a, F b) {
  return each<F>([&](int i) { return a.v[i] - b.v[i]; });
}
VEC F operator*(F a, F b) {
  return each<F>([&](int i) { return a.v[i] * b.v[i]; });
}
VEC F operator/(F a, F b) {
  return each<F>([&](int i) { return a.v[i] / b.v[i]; });
}
VEC F max(F a, F b) {  // as x86 has it: b where either is not a number
  return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
VEC F min(F a, F b) {
  return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
VEC F zero_where_zero(F mask, F x) {  // 0 in the lanes in which mask is 0
  return each<F>([&](int i) { return mask.v[i] == 0.0f ? 0.0f : x.v[i]; });
}
VEC F zero_where_less(F a, F b, F x) {  // 0 in the lanes in which a < b
  return each<F>([&](int i) { return a.v[i] < b.v[i] ? 0.0f : x.v[i]; });
}
VEC F abs(F a) {
  return each<F>([&](int i) { return std::fabs(a.v[i]); });
}
VEC F rint(F a) {
  return each<F>([&](int i) { return std::nearbyint(a.v[i]); });
}
VEC F to_float(I a) {
  return each<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
VEC I to_int(F a) {  // what x86 gives for what does not fit
  return each<I>([&](int i) {
    return std::fabs(a.v[i]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(a.v[i])) : INT32_MIN;
  });
}
VEC float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
VEC F power_of_two(I n) {  // 2 ** n for -126 <= n <= 127
  return each<F>([&](int i) { return from_bits(static_cast<uint32_t>(n.v[i] + 127) << 23); });
}

VEC float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return from_bits(sign | 0x7F800000 | (mantissa ? 0x400000 | mantissa << 13 : 0));
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * from_bits(103u << 23);  // mantissa * 2 ** -24
  return sign ? -magnitude : magnitude;
}
VEC uint16_t to_f16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00 | static_cast<uint16_t>(bits >> 13 & 0x1FF);
  if (bits >= 0x47800000) return sign | 0x7C00;
  if (bits < 0x38800000) {  // below the least normal: adding 0.5 rounds at 2 ** -24
    const float shifted = from_bits(bits) + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, 4);
    return sign | static_cast<uint16_t>(rounded - 0x3F000000);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13);
}
template <class T>
VEC T at(const void* p, int i) {
  T x;
  std::memcpy(&x, static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  return x;
}
VEC F load_f16(const void* p) {
  return each<F>([=](int i) { return from_f16(at<uint16_t>(p, i)); });
}
VEC F load_bf16(const void* p) {
  return each<F>([=](int i) { return from_bits(static_cast<uint32_t>(at<uint16_t>(p, i)) << 16); });
}
VEC F load_i8(const void* p) {
  return each<F>([=](int i) { return static_cast<float>(at<int8_t>(p, i)); });
}
VEC void store_f16(uint16_t* p, F x) {
  for (int i = 0; i < 16; i++) p[i] = to_f16(x.v[i]);
}

VEC float sum(F x) {  // halves are added until one lane is left
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x.v[i] = x.v[i] + x.v[i + half];
  return x.v[0];
}
VEC float largest(F x) {
  float best = x.v[0];
  for (float v : x.v) best = v > best ? v : best;
  return best;
}

VEC I isplat(int32_t x) {
  return each<I>([=](int) { return x; });
}
VEC F as_float(I a) {
  F out;
  std::memcpy(out.v, a.v, sizeof out.v);
  return out;
}
VEC I operator+(I a, I b) {  // wraps around, as vectors do
  return each<I>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
}
VEC int32_t sum(I a) {
  int32_t total = 0;
  for (int32_t v : a.v) total += v;
  return total;
}
VEC void store_i8(int8_t* p, I a) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(a.v[i]);
}
VEC I load_quad(const int8_t* p) {  // four codes, to every row
  int32_t quad;
  std::memcpy(&quad, p, 4);
  return isplat(quad);
}

VEC U load_codes(const uint8_t* p) {
  U x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
VEC void store(uint8_t* p, U x) { std::memcpy(p, x.v, sizeof x.v); }
// (x >> kBit) & kMask, byte by byte
template <int kBit, int kMask>
VEC U bits(U x) {
  for (uint8_t& b : x.v) b = b >> kBit & kMask;
  return x;
}
// code | ((plane >> kBit) & kMask) << kTo
template <int kBit, int kMask, int kTo>
VEC U add_plane(U code, U plane) {
  for (int i = 0; i < 64; i++) code.v[i] |= static_cast<uint8_t>((plane.v[i] >> kBit & kMask) << kTo);
  return code;
}
// Bytes of four vectors side by side, within each 16 bytes: out[j] has 4 bytes of each place 4 j to 4 j + 3.
VEC void interleave(const U& a, const U& b, const U& c, const U& d, U (&out)[4]) {
  const U* const in[4] = {&a, &b, &c, &d};
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 64; i++) out[j].v[i] = in[i % 4]->v[i / 16 * 16 + 4 * j + i % 16 / 4];
}
VEC U load_pieces(const uint8_t* const* rows, size_t offset) {  // 16 bytes of each fourth of 13 rows
  U x;
  for (int i = 0; i < 64; i++) x.v[i] = rows[i / 16 * 4][offset + static_cast<size_t>(i % 16)];
  return x;
}
// Words of four vectors, within each 16 bytes: out[j] has word j of each.
VEC void transpose_words(const U& a, const U& b, const U& c, const U& d, U (&out)[4]) {
  const U* const in[4] = {&a, &b, &c, &d};
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 64; i++) out[j].v[i] = in[i % 16 / 4]->v[i / 16 * 16 + 4 * j + i % 4];
}
VEC U load_table(const uint8_t* p) {  // 16 bytes that four bits choose from
  U table;
  for (int i = 0; i < 64; i++) table.v[i] = p[i % 16];
  return table;
}
VEC U look_up(const U& table, U nibbles) {
  for (uint8_t& b : nibbles.v) b = table.v[b];
  return nibbles;
}

// acc + sum over the four columns of code * activation. kWide: codes may pass 127.
template <bool kWide>
VEC I dot(I acc, U codes, I quad) {
  int8_t a[4];
  std::memcpy(a, quad.v, 4);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 4; k++) acc.v[i] += codes.v[4 * i + k] * a[k];
  return acc;
}

}  // namespace
