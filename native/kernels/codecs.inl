// How each weight type lies in a tile chunk (ARCHITECTURE.md, P32), as a codec:
//   kGroupQuads    quads (4 columns) that share a scale: 8, or 4
//   kHasMinimum    a float minimum is added per group; all other types have a zero point (kStartOf)
//   kHasTable      codes are four bits, and stand for bytes of a table
//   kWide          codes may pass 127
//   kStreams       read from memory once, so that it pays to prefetch
//   chunk_bytes(columns), scale(tile, g), minimum(tile, g) of group g
//   pair<j>(tile, b): codes of quads 2j and 2j + 1 of block b, which is 32 columns
namespace {

using namespace isotherm;

struct Pair {
  U first, second;
};

// 16 bytes, one a row: the compiler's own vector, the same on every instruction set.
using Bytes = uint8_t __attribute__((vector_size(16)));
using Words = int16_t __attribute__((vector_size(32)));

VEC Bytes load_bytes(const void* p) {
  Bytes bytes;
  __builtin_memcpy(&bytes, p, 16);
  return bytes;
}
VEC F to_float(Bytes bytes) {  // each at most 127
  return load_i8(&bytes);
}
// E8M0, halved: 2 ** (byte - 128), by way of bfloat16, in which the two least are subnormal.
VEC F load_e8m0(const void* p) {
  const Words e = __builtin_convertvector(load_bytes(p), Words);
  const Words normal = (e - 1) << 7, subnormal = (e + 1) << 5, halves = normal > subnormal ? normal : subnormal;
  return load_bf16(&halves);
}
// E4M3 without its sign, halved; 127 is 0. By way of float16, whose exponent has another bias.
VEC F load_e4m3(const void* p) {
  const Words byte = __builtin_convertvector(load_bytes(p), Words);
  const Words halves = byte == 127 ? byte ^ byte : (byte & 127) << 7;
  return load_f16(&halves) * splat(128.0f);
}

enum class Bits { kTwo, kThree, kFour, kFive, kSix, kEight };

// Bytes of a block of one tile: lines of two or four bits of each code, then planes of the bits above them.
constexpr int code_bytes(Bits bits) {
  constexpr int kBytes[] = {128, 192, 256, 320, 384, 512};
  return kBytes[static_cast<int>(bits)];
}

template <Bits kBits, int j>
VEC Pair read_pair(const uint8_t* block) {
  if constexpr (kBits == Bits::kEight) {
    return {load_codes(block + 128 * j), load_codes(block + 128 * j + 64)};
  } else if constexpr (kBits == Bits::kTwo || kBits == Bits::kThree) {
    const U line = load_codes(block + 64 * (j / 2));
    Pair pair{bits<j % 2 * 4, 3>(line), bits<j % 2 * 4 + 2, 3>(line)};
    if constexpr (kBits == Bits::kThree) {
      const U plane = load_codes(block + 128);
      pair = {add_plane<2 * j, 1, 2>(pair.first, plane), add_plane<2 * j + 1, 1, 2>(pair.second, plane)};
    }
    return pair;
  } else {
    const U line = load_codes(block + 64 * j);
    Pair pair{bits<0, 15>(line), bits<4, 15>(line)};
    if constexpr (kBits == Bits::kFive) {
      const U plane = load_codes(block + 256);
      pair = {add_plane<2 * j, 1, 4>(pair.first, plane), add_plane<2 * j + 1, 1, 4>(pair.second, plane)};
    }
    if constexpr (kBits == Bits::kSix) {
      const U plane = load_codes(block + 256 + 64 * (j / 2));
      constexpr int kBit = j % 2 * 4;
      pair = {add_plane<kBit, 3, 4>(pair.first, plane), add_plane<kBit + 2, 3, 4>(pair.second, plane)};
    }
    return pair;
  }
}

template <int kQuads, bool kMinimum, bool kTable, bool kIsWide>
struct Traits {
  static constexpr bool kStreams = true;
  static constexpr int kGroupQuads = kQuads;
  static constexpr bool kHasMinimum = kMinimum, kHasTable = kTable, kWide = kIsWide;
};

// Per 64 columns a line of float16 scales of two groups, then their codes.
template <Bits kBits, bool kTable = false>
struct Symmetric : Traits<8, false, kTable, kTable || kBits == Bits::kEight> {
  static constexpr int kUnit = 64 + 2 * code_bytes(kBits);
  static constexpr int chunk_bytes(int columns) { return columns / 64 * kUnit; }
  static VEC F scale(const uint8_t* tile, int g) { return load_f16(tile + g / 2 * kUnit + g % 2 * 32); }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int b) {
    return read_pair<kBits, j>(tile + b / 2 * kUnit + 64 + b % 2 * code_bytes(kBits));
  }
};

// Per 32 columns a line of float16 scales and minima, then the codes.
template <Bits kBits>
struct Affine : Traits<8, true, false, false> {
  static constexpr int kUnit = 64 + code_bytes(kBits);
  static constexpr int chunk_bytes(int columns) { return columns / 32 * kUnit; }
  static VEC F scale(const uint8_t* tile, int g) { return load_f16(tile + g * kUnit); }
  static VEC F minimum(const uint8_t* tile, int g) { return load_f16(tile + g * kUnit + 32); }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int b) {
    return read_pair<kBits, j>(tile + b * kUnit + 64);
  }
};

// Float16 d and dmin, 6-bit scales and minima in a plane of low and a plane of high bits, codes.
template <Bits kBits>
struct SuperAffine : Traits<8, true, false, false> {
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
  static VEC Pair pair(const uint8_t* tile, int b) {
    return read_pair<kBits, j>(tile + kHeader + b * code_bytes(kBits));
  }
};

// Float16 d and dmin, a byte of 4-bit scale and minimum per 16 columns, 2-bit codes.
struct HalfBlockAffine : Traits<4, true, false, false> {
  static constexpr int kHeader = 64 + 256;
  static constexpr int chunk_bytes(int) { return kHeader + 8 * code_bytes(Bits::kTwo); }
  static VEC Bytes scales(const uint8_t* tile, int g) { return load_bytes(tile + 64 + 16 * g); }
  static VEC F scale(const uint8_t* tile, int g) { return load_f16(tile) * to_float(scales(tile, g) & 15); }
  static VEC F minimum(const uint8_t* tile, int g) {
    return load_f16(tile + 32) * to_float(scales(tile, g) >> 4) * splat(-1.0f);
  }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int b) {
    return read_pair<Bits::kTwo, j>(tile + kHeader + b * code_bytes(Bits::kTwo));
  }
};

// Float32 d, an int8 factor of it per group, codes.
template <Bits kBits, int kQuads, bool kTable = false, bool kIsWide = false>
struct Factored : Traits<kQuads, false, kTable, kIsWide> {
  static constexpr int kHeader = 64 + 16 * (kChunkColumns / 4 / kQuads);
  static constexpr int chunk_bytes(int) { return kHeader + 8 * code_bytes(kBits); }
  static VEC F scale(const uint8_t* tile, int g) {
    return load(reinterpret_cast<const float*>(tile)) * load_i8(tile + 64 + 16 * g);
  }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int b) {
    return read_pair<kBits, j>(tile + kHeader + b * code_bytes(kBits));
  }
};

// Float32 d for 256 columns, 2-bit codes.
struct Ternary : Traits<8, false, false, false> {
  static constexpr int kHeader = 64;
  static constexpr int chunk_bytes(int) { return kHeader + 8 * code_bytes(Bits::kTwo); }
  static VEC F scale(const uint8_t* tile, int) { return load(reinterpret_cast<const float*>(tile)); }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int b) {
    return read_pair<Bits::kTwo, j>(tile + kHeader + b * code_bytes(Bits::kTwo));
  }
};

// Per 128 columns a line of E8M0 scales of four groups, then codes of a table.
struct Exponents : Traits<8, false, true, false> {
  static constexpr int kUnit = 64 + 4 * code_bytes(Bits::kFour);
  static constexpr int chunk_bytes(int columns) { return (columns + 127) / 128 * kUnit; }
  static VEC F scale(const uint8_t* tile, int g) { return load_e8m0(tile + g / 4 * kUnit + g % 4 * 16); }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int b) {
    return read_pair<Bits::kFour, j>(tile + b / 4 * kUnit + 64 + b % 4 * code_bytes(Bits::kFour));
  }
};

// Per 64 columns a line of E4M3 scales of four groups, then codes of a table.
struct SmallFloats : Traits<4, false, true, false> {
  static constexpr int kUnit = 64 + 2 * code_bytes(Bits::kFour);
  static constexpr int chunk_bytes(int columns) { return columns / 64 * kUnit; }
  static VEC F scale(const uint8_t* tile, int g) { return load_e4m3(tile + g / 4 * kUnit + g % 4 * 16); }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int b) {
    return read_pair<Bits::kFour, j>(tile + b / 2 * kUnit + 64 + b % 2 * code_bytes(Bits::kFour));
  }
};

// What four bits stand for, zero point included; quantization/layouts.py has the values.
struct Table {
  uint8_t bytes[16];
};
constexpr Table make_table(const int (&values)[16], int zero_point) {
  Table table{};
  for (int i = 0; i < 16; i++) table.bytes[i] = static_cast<uint8_t>(values[i] + zero_point);
  return table;
}
constexpr int kNonlinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int kE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int kTernaryShifted[16] = {-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7};
constexpr int kThreeMagnitudes[16] = {8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43};
constexpr int kEightMagnitudes[16] = {4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62};
constexpr int kEightOdd[16] = {1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15};

constexpr int kUnpackColumns = 2 * kChunkColumns;  // unpacked at a time: two tiles of it fill half of L1

// Columns of one tile, unpacked once and read by many tokens: codes a byte each, scales and minima as float32. Types
// whose groups and range of codes are alike share the form, and the kernels that read it.
template <int kQuads, bool kMinimum, bool kIsWide>
struct Unpacked : Traits<kQuads, kMinimum, false, kIsWide> {
  static constexpr bool kStreams = false;
  static constexpr int kMaxGroups = kUnpackColumns / 4 / kQuads;
  static constexpr int kMinima = 64 * kMaxGroups, kCodes = kMinima + (kMinimum ? 64 * kMaxGroups : 0);
  static constexpr int kBytes = kCodes + 64 * (kUnpackColumns / 4);
  static constexpr int chunk_bytes(int) { return kBytes; }
  static VEC F scale(const uint8_t* tile, int g) { return load(reinterpret_cast<const float*>(tile + 64 * g)); }
  static VEC F minimum(const uint8_t* tile, int g) {
    return load(reinterpret_cast<const float*>(tile + kMinima + 64 * g));
  }
  template <int j>
  static VEC Pair pair(const uint8_t* tile, int b) {
    const uint8_t* quads = tile + kCodes + 64 * (b * 8 + 2 * j);
    return {load_codes(quads), load_codes(quads + 64)};
  }
};
template <class C>
using UnpackedOf = Unpacked<C::kGroupQuads, C::kHasMinimum, C::kWide>;

// Codes as the bytes that are multiplied.
template <class C, int j>
VEC Pair codes_of(const uint8_t* tile, int b, U table) {
  const Pair pair = C::template pair<j>(tile, b);
  if constexpr (C::kHasTable)
    return {look_up(table, pair.first), look_up(table, pair.second)};
  else
    return pair;
}

// Brings block b's lines of the tile's chunk after next into the second cache level, while this one's are at work. The
// hardware's own prefetcher stops at each page of 4 KB: on a Sapphire Rapids core this took decode from half of the
// read bandwidth to 0.88 of it, and into the first level to 0.84.
template <class C>
VEC void prefetch_block(const uint8_t* tile, int b) {
  constexpr int kChunk = C::chunk_bytes(kChunkColumns), kBlock = kChunk / (kChunkColumns / kBlockColumns);
  for (int i = 0; i < kBlock; i += 64) __builtin_prefetch(tile + 4 * kChunk + b * kBlock + i, 0, 2);
}

template <class C, int j>
VEC void unpack_pair(const uint8_t* source, int b, U table, uint8_t* codes) {
  const Pair pair = codes_of<C, j>(source, b, table);
  store(codes + 64 * (2 * j), pair.first);
  store(codes + 64 * (2 * j + 1), pair.second);
}

// A chunk of a tile, to block `first_block` on of its unpacked columns.
template <class C>
void unpack(const uint8_t* source, int columns, const Table* table, int first_block, uint8_t* tile) {
  using Flat = UnpackedOf<C>;
  constexpr int kGroups = 8 / C::kGroupQuads;
  U loaded{};
  if constexpr (C::kHasTable) loaded = load_table(table->bytes);
  uint8_t* scales = tile + 64 * kGroups * first_block;
  for (int g = 0; g < columns / kBlockColumns * kGroups; g++) {
    store(reinterpret_cast<float*>(scales + 64 * g), C::scale(source, g));
    if constexpr (C::kHasMinimum)
      store(reinterpret_cast<float*>(scales + Flat::kMinima + 64 * g), C::minimum(source, g));
  }
  for (int b = 0; b < columns / kBlockColumns; b++) {
    uint8_t* codes = tile + Flat::kCodes + 64 * 8 * (first_block + b);
    unpack_pair<C, 0>(source, b, loaded, codes);
    unpack_pair<C, 1>(source, b, loaded, codes);
    unpack_pair<C, 2>(source, b, loaded, codes);
    unpack_pair<C, 3>(source, b, loaded, codes);
  }
}

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
