// How each weight type lies in a tile chunk (ARCHITECTURE.md, P32), as a codec:
//   kGroupQuads    quads (4 columns) that share a scale: 8, or 4 for Q6_K
//   kStart         which of QuantRows::starts has its zero point
//   kHasMinimum    a float minimum is added per group
//   kWide          codes may pass 127
//   kStreams       read from memory once, so that it pays to prefetch
//   chunk_bytes(columns), scale(tile, g), minimum(tile, g), pair<j>(tile, g): codes of quads 2j and 2j + 1 of group g
namespace {

using namespace isotherm;

struct Pair {
  U first, second;
};

// 16 bytes, one a row: the compiler's own vector, the same on every instruction set.
using Bytes = uint8_t __attribute__((vector_size(16)));

VEC Bytes load_bytes(const void* p) {
  Bytes bytes;
  __builtin_memcpy(&bytes, p, 16);
  return bytes;
}
VEC F to_float(Bytes bytes) {  // each at most 127
  return load_i8(&bytes);
}

enum class Bits { kFour, kFive, kSix, kEight };

// Bytes of 32 columns of one tile: four nibble lines, then planes of the bits above them.
constexpr int code_bytes(Bits bits) {
  return bits == Bits::kFour ? 256 : bits == Bits::kFive ? 320 : bits == Bits::kSix ? 384 : 512;
}

template <Bits kBits, int j>
VEC Pair read_pair(const uint8_t* group) {
  if constexpr (kBits == Bits::kEight) {
    return {load_codes(group + 128 * j), load_codes(group + 128 * j + 64)};
  } else {
    const U line = load_codes(group + 64 * j);
    Pair pair{low_nibbles(line), high_nibbles(line)};
    if constexpr (kBits == Bits::kFive) {
      const U plane = load_codes(group + 256);
      pair = {add_plane<2 * j, 1>(pair.first, plane), add_plane<2 * j + 1, 1>(pair.second, plane)};
    }
    return pair;
  }
}

// Q4_0, Q5_0, Q8_0: per 64 columns a line of float16 scales of two groups, then their codes.
template <Bits kBits, int kStartIndex>
struct Symmetric {
  static constexpr bool kStreams = true;
  static constexpr int kGroupQuads = 8, kStart = kStartIndex;
  static constexpr bool kHasMinimum = false, kWide = kBits == Bits::kEight;
  static constexpr int kUnit = 64 + 2 * code_bytes(kBits);
  static constexpr int chunk_bytes(int columns) { return columns / 64 * kUnit; }
  static VEC F scale(const uint8_t* tile, int g) { return load_f16(tile + g / 2 * kUnit + g % 2 * 32); }
  static VEC F minimum(const uint8_t*, int) { return splat(0.0f); }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int g) {
    return read_pair<kBits, j>(tile + g / 2 * kUnit + 64 + g % 2 * code_bytes(kBits));
  }
};

// Q4_1, Q5_1: per 32 columns a line of float16 scales and minima, then the codes.
template <Bits kBits>
struct Affine {
  static constexpr bool kStreams = true;
  static constexpr int kGroupQuads = 8, kStart = 0;
  static constexpr bool kHasMinimum = true, kWide = false;
  static constexpr int kUnit = 64 + code_bytes(kBits);
  static constexpr int chunk_bytes(int columns) { return columns / 32 * kUnit; }
  static VEC F scale(const uint8_t* tile, int g) { return load_f16(tile + g * kUnit); }
  static VEC F minimum(const uint8_t* tile, int g) { return load_f16(tile + g * kUnit + 32); }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int g) {
    return read_pair<kBits, j>(tile + g * kUnit + 64);
  }
};

// Q4_K, Q5_K: float16 d and dmin, 6-bit scales and minima in a plane of low and a plane of high bits, codes.
template <Bits kBits>
struct SuperAffine {
  static constexpr bool kStreams = true;
  static constexpr int kGroupQuads = 8, kStart = 0;
  static constexpr bool kHasMinimum = true, kWide = false;
  static constexpr int kHeader = 64 + 128 + 64;
  static constexpr int chunk_bytes(int) { return kHeader + 8 * code_bytes(kBits); }
  static VEC Bytes low_plane(const uint8_t* tile, int g) { return load_bytes(tile + 64 + 16 * g); }
  // The two top bits of scale and minimum: bits 0..1 and 2..3 of each byte.
  static VEC Bytes high_plane(const uint8_t* tile, int g) { return load_bytes(tile + 192 + g / 2 * 16) >> g % 2 * 4; }
  static VEC F scale(const uint8_t* tile, int g) {
    return load_f16(tile) * to_float((low_plane(tile, g) & 15) | (high_plane(tile, g) << 4 & 0x30));
  }
  static VEC F minimum(const uint8_t* tile, int g) {
    return load_f16(tile + 32) * to_float((low_plane(tile, g) >> 4) | (high_plane(tile, g) << 2 & 0x30)) * splat(-1.0f);
  }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int g) {
    return read_pair<kBits, j>(tile + kHeader + g * code_bytes(kBits));
  }
};

// Q6_K: float32 d, int8 scales of groups of 16, then per 32 columns nibbles and two lines of 2-bit planes.
struct SuperSymmetric {
  static constexpr bool kStreams = true;
  static constexpr int kGroupQuads = 4, kStart = kHalfBlockStart;
  static constexpr bool kHasMinimum = false, kWide = false;
  static constexpr int kHeader = 64 + 256;
  static constexpr int chunk_bytes(int) { return kHeader + 8 * code_bytes(Bits::kSix); }
  static VEC F scale(const uint8_t* tile, int g) {
    return load(reinterpret_cast<const float*>(tile)) * load_i8(tile + 64 + 16 * g);
  }
  static VEC F minimum(const uint8_t*, int) { return splat(0.0f); }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int g) {
    const uint8_t* group = tile + kHeader + g / 2 * code_bytes(Bits::kSix);
    const U line = load_codes(group + g % 2 * 128 + 64 * j), plane = load_codes(group + 256 + g % 2 * 64);
    return {add_plane<4 * j, 3>(low_nibbles(line), plane), add_plane<4 * j + 2, 3>(high_nibbles(line), plane)};
  }
};

using Q4_0 = Symmetric<Bits::kFour, 1>;
using Q5_0 = Symmetric<Bits::kFive, 2>;
using Q8_0 = Symmetric<Bits::kEight, 4>;
using Q4_1 = Affine<Bits::kFour>;
using Q5_1 = Affine<Bits::kFive>;
using Q4_K = SuperAffine<Bits::kFour>;
using Q5_K = SuperAffine<Bits::kFive>;
using Q6_K = SuperSymmetric;

// A chunk of one tile, unpacked once and read by many tokens: codes a byte each, scales and minima as float32.
template <class Source>
struct Unpacked {
  static constexpr bool kStreams = false;
  static constexpr int kGroupQuads = Source::kGroupQuads, kStart = Source::kStart;
  static constexpr bool kHasMinimum = Source::kHasMinimum, kWide = Source::kWide;
  static constexpr int kMaxGroups = kChunkColumns / 4 / kGroupQuads;
  static constexpr int kMinima = 64 * kMaxGroups, kCodes = kMinima + (kHasMinimum ? 64 * kMaxGroups : 0);
  static constexpr int kBytes = kCodes + 64 * (kChunkColumns / 4);
  static constexpr int chunk_bytes(int) { return kBytes; }
  static VEC F scale(const uint8_t* tile, int g) { return load(reinterpret_cast<const float*>(tile + 64 * g)); }
  static VEC F minimum(const uint8_t* tile, int g) {
    return load(reinterpret_cast<const float*>(tile + kMinima + 64 * g));
  }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int g) {
    const uint8_t* quads = tile + kCodes + 64 * (g * kGroupQuads + 2 * j);
    return {load_codes(quads), load_codes(quads + 64)};
  }

  template <int j>
  static VEC void unpack_pair(const uint8_t* source, int g, uint8_t* tile) {
    const Pair codes = Source::template pair<j>(source, g);
    store(tile + kCodes + 64 * (g * kGroupQuads + 2 * j), codes.first);
    store(tile + kCodes + 64 * (g * kGroupQuads + 2 * j + 1), codes.second);
  }
  static void unpack(const uint8_t* source, int columns, uint8_t* tile) {
    for (int g = 0; g < columns / 4 / kGroupQuads; g++) {
      store(reinterpret_cast<float*>(tile + 64 * g), Source::scale(source, g));
      if constexpr (kHasMinimum) store(reinterpret_cast<float*>(tile + kMinima + 64 * g), Source::minimum(source, g));
      unpack_pair<0>(source, g, tile);
      unpack_pair<1>(source, g, tile);
      if constexpr (kGroupQuads == 8) {
        unpack_pair<2>(source, g, tile);
        unpack_pair<3>(source, g, tile);
      }
    }
  }
};

struct Float32 {
  static constexpr int kBytes = 4;
  static VEC F read(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct Float16 {
  static constexpr int kBytes = 2;
  static VEC F read(const uint8_t* p) { return load_f16(p); }
};
struct BFloat16 {
  static constexpr int kBytes = 2;
  static VEC F read(const uint8_t* p) { return load_bf16(p); }
};

}  // namespace
