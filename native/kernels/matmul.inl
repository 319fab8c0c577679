// Panels of 32 weight rows times quantised activations.
//
//   block = float(group's integer dot) * scale, [block = fma(sum of the group's codes, minimum, block)]
//   [groups of half a block: block += the second half's in the same way, by fma]
//   total = fma(block, activation scale, total), blocks rising
//
// Few tokens read codes straight from the packed panel; many read a chunk that was unpacked into L1 once.
// Both run multiply_chunk, so that both give the same bits.
namespace {

using namespace isotherm;

// Where the numbers of one bundle of rows and one chunk stand: that of row t and quad, group or block i at
// [i * bundle_rows + t].
struct Rows {
  const int8_t* codes;
  const int32_t* starts;  // by group; null for weights with a minimum
  const float* sums;      // by group; null for all others
  const float* scales;    // by block
};

// What tells weight types of one codec apart.
struct Variant {
  StartIndex start;
  const Table* table;
};

template <class C>
VEC Rows bundle_at(const QuantRows& x, const Variant& type, int row, int column) {
  const size_t at = static_cast<size_t>(row) * x.columns + static_cast<size_t>(column) * x.bundle_rows;
  const size_t group = at / (4 * C::kGroupQuads);
  Rows rows{x.codes + at, nullptr, nullptr, x.scales + at / kBlockColumns};
  if constexpr (C::kHasMinimum)
    rows.sums = (C::kGroupQuads == 8 ? x.sums : x.half_sums) + group;
  else
    rows.starts = x.starts[type.start] + group;
  return rows;
}

// A kernel's shape: kTokens rows of a bundle of kBundle, times kTiles tiles.
template <int kTokensOf, int kTilesOf, int kBundleOf>
struct Shape {
  static constexpr int kTokens = kTokensOf, kTiles = kTilesOf, kBundle = kBundleOf;
  using Floats = F[kTokens][kTiles];
  using Ints = I[kTokens][kTiles];
};

template <class C, class S, int j>
VEC void dot_pair(const uint8_t* const* tiles, int b, const Rows& rows, U table, typename S::Ints& acc) {
  Pair codes[S::kTiles];
#pragma GCC unroll 2
  for (int n = 0; n < S::kTiles; n++) codes[n] = codes_of<C, j>(tiles[n], b, table);
  const int8_t* quads = rows.codes + (b * 8 + 2 * j) * S::kBundle * 4;
#pragma GCC unroll 8
  for (int t = 0; t < S::kTokens; t++) {
    const I quad = load_quad(quads + 4 * t);
#pragma GCC unroll 2
    for (int n = 0; n < S::kTiles; n++) acc[t][n] = dot<C::kWide>(acc[t][n], codes[n].first, quad);
  }
#pragma GCC unroll 8
  for (int t = 0; t < S::kTokens; t++) {
    const I quad = load_quad(quads + 4 * (S::kBundle + t));
#pragma GCC unroll 2
    for (int n = 0; n < S::kTiles; n++) acc[t][n] = dot<C::kWide>(acc[t][n], codes[n].second, quad);
  }
}

// Integer dots of one group of block b, as kMagicFloat + dot.
template <class C, class S, int kGroup>
VEC void dot_group(const uint8_t* const* tiles, int b, const Rows& rows, U table, typename S::Ints& acc) {
  const int g = b * (8 / C::kGroupQuads) + kGroup;
#pragma GCC unroll 8
  for (int t = 0; t < S::kTokens; t++) {
    const I start = isplat(C::kHasMinimum ? kMagic : rows.starts[g * S::kBundle + t]);
#pragma GCC unroll 2
    for (int n = 0; n < S::kTiles; n++) acc[t][n] = start;
  }
  dot_pair<C, S, 2 * kGroup>(tiles, b, rows, table, acc);
  dot_pair<C, S, 2 * kGroup + 1>(tiles, b, rows, table, acc);
  if constexpr (C::kGroupQuads == 8) {
    dot_pair<C, S, 2>(tiles, b, rows, table, acc);
    dot_pair<C, S, 3>(tiles, b, rows, table, acc);
  }
}

// block = float(dot) * scale of the first group. That is fma(magic + dot, scale, -magic * scale): scales have at most
// 18 significant bits, so the last product is exact and the rounding is the same.
template <class C, class S>
VEC void first_group(const uint8_t* const* tiles, int b, const Rows& rows, U table, typename S::Floats& block) {
  const int g = b * (8 / C::kGroupQuads);
  typename S::Ints acc;
  dot_group<C, S, 0>(tiles, b, rows, table, acc);
#pragma GCC unroll 2
  for (int n = 0; n < S::kTiles; n++) {
    const F scale = C::scale(tiles[n], g), offset = scale * splat(-kMagicFloat);
#pragma GCC unroll 8
    for (int t = 0; t < S::kTokens; t++) block[t][n] = fma(as_float(acc[t][n]), scale, offset);
  }
}

// block += float(dot) * scale of the second group.
template <class C, class S>
VEC void next_group(const uint8_t* const* tiles, int b, const Rows& rows, U table, typename S::Floats& block) {
  const int g = b * 2 + 1;
  typename S::Ints acc;
  dot_group<C, S, 1>(tiles, b, rows, table, acc);
#pragma GCC unroll 2
  for (int n = 0; n < S::kTiles; n++) {
    const F scale = C::scale(tiles[n], g);
#pragma GCC unroll 8
    for (int t = 0; t < S::kTokens; t++)
      block[t][n] = fma(as_float(acc[t][n]) - splat(kMagicFloat), scale, block[t][n]);
  }
}

template <class C, class S>
VEC void add_minimum(const uint8_t* const* tiles, int g, const Rows& rows, typename S::Floats& block) {
#pragma GCC unroll 2
  for (int n = 0; n < S::kTiles; n++) {
    const F minimum = C::minimum(tiles[n], g);
#pragma GCC unroll 8
    for (int t = 0; t < S::kTokens; t++) block[t][n] = fma(splat(rows.sums[g * S::kBundle + t]), minimum, block[t][n]);
  }
}

// y += one block.
template <class C, class S>
VEC void multiply_block(const uint8_t* const* tiles, int b, const Rows& rows, U table, typename S::Floats& y) {
  constexpr int kGroups = 8 / C::kGroupQuads;
  typename S::Floats block;
  first_group<C, S>(tiles, b, rows, table, block);
  if constexpr (C::kHasMinimum) add_minimum<C, S>(tiles, b * kGroups, rows, block);
  if constexpr (kGroups == 2) {
    next_group<C, S>(tiles, b, rows, table, block);
    if constexpr (C::kHasMinimum) add_minimum<C, S>(tiles, b * kGroups + 1, rows, block);
  }
#pragma GCC unroll 8
  for (int t = 0; t < S::kTokens; t++) {
    const F scale = splat(rows.scales[b * S::kBundle + t]);
#pragma GCC unroll 2
    for (int n = 0; n < S::kTiles; n++) y[t][n] = fma(block[t][n], scale, y[t][n]);
  }
}

// totals [tokens][32] += one chunk of tiles times the first rows of a bundle.
template <class C, class S>
void multiply_chunk(const uint8_t* const* tiles, int columns, const Variant& type, const QuantRows& x, int row,
                    int column, float* totals) {
  const Rows rows = bundle_at<C>(x, type, row, column);
  U table{};
  if constexpr (C::kHasTable) table = load_table(type.table->bytes);
  typename S::Floats y;
#pragma GCC unroll 8
  for (int t = 0; t < S::kTokens; t++)
#pragma GCC unroll 2
    for (int n = 0; n < S::kTiles; n++) y[t][n] = load(totals + t * kPanelRows + n * kTileRows);
  for (int b = 0; b < columns / kBlockColumns; b++) {
    if constexpr (C::kStreams)
      for (int n = 0; n < S::kTiles; n++) prefetch_next_chunk<C>(tiles[n], b);
    multiply_block<C, S>(tiles, b, rows, table, y);
  }
#pragma GCC unroll 8
  for (int t = 0; t < S::kTokens; t++)
#pragma GCC unroll 2
    for (int n = 0; n < S::kTiles; n++) store(totals + t * kPanelRows + n * kTileRows, y[t][n]);
}

template <class C, int kTokens, int kTiles>
void multiply_float_chunk(const uint8_t* const* tiles, int columns, const Variant&, const QuantRows& x, int row,
                          int column, float* totals) {
  F y[kTokens][kTiles];
  const float* values = x.values + static_cast<size_t>(row) * x.columns + column;
  for (int t = 0; t < kTokens; t++)
    for (int n = 0; n < kTiles; n++) y[t][n] = load(totals + t * kPanelRows + n * kTileRows);
  for (int k = 0; k < columns; k++) {
    F w[kTiles];
#pragma GCC unroll 2
    for (int n = 0; n < kTiles; n++) w[n] = C::read(tiles[n] + k * kTileRows * C::kBytes);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; t++) {
      const F v = splat(values[static_cast<size_t>(t) * x.columns + k]);
#pragma GCC unroll 2
      for (int n = 0; n < kTiles; n++) y[t][n] = fma(w[n], v, y[t][n]);
    }
  }
  for (int t = 0; t < kTokens; t++)
    for (int n = 0; n < kTiles; n++) store(totals + t * kPanelRows + n * kTileRows, y[t][n]);
}

using ChunkFn = void (*)(const uint8_t* const*, int, const Variant&, const QuantRows&, int, int, float*);

// One weight type's functions, by number of tiles and of tokens; `many` read unpacked chunks.
struct TypeKernels {
  int (*chunk_bytes)(int columns);
  Variant variant;
  void (*unpack)(const uint8_t* source, int columns, const Table* table, uint8_t* tile);  // null: stored as floats
  // One row of a tile chunk, as floats; it is unpacked first, where there is something to unpack.
  void (*decode)(const uint8_t* tile, int columns, int zero_point, int lane, float* out);
  ChunkFn lone[kLoneTokens];  // one tile
  ChunkFn few[kFewTokens];    // two
  ChunkFn many[2][kManyTokens];
};

// kBundle 0: a bundle has as many rows as the kernel takes.
template <class C, int kTiles, int kBundle, int kTokens>
constexpr void fill_quant(ChunkFn* out) {
  if constexpr (kTokens > 0) {
    fill_quant<C, kTiles, kBundle, kTokens - 1>(out);
    out[kTokens - 1] = &multiply_chunk<C, Shape<kTokens, kTiles, kBundle ? kBundle : kTokens>>;
  }
}

template <class C, int kTiles, int kTokens>
constexpr void fill_float(ChunkFn* out) {
  if constexpr (kTokens > 0) {
    fill_float<C, kTiles, kTokens - 1>(out);
    out[kTokens - 1] = &multiply_float_chunk<C, kTokens, kTiles>;
  }
}

// One row of an unpacked tile chunk: scale * (code - zero point) + minimum.
template <class Flat>
void decode_row(const uint8_t* tile, int columns, int zero_point, int lane, float* out) {
  for (int k = 0; k < columns; k++) {
    const int g = k / (4 * Flat::kGroupQuads);
    float scales[16], minima[16] = {};
    store(scales, Flat::scale(tile, g));
    if constexpr (Flat::kHasMinimum) store(minima, Flat::minimum(tile, g));
    const int code = tile[Flat::kCodes + k / 4 * 64 + lane * 4 + k % 4] - zero_point;
    const float product = scales[lane] * static_cast<float>(code);
    out[k] = Flat::kHasMinimum ? product + minima[lane] : product;
  }
}

template <class C>
void decode_float_row(const uint8_t* tile, int columns, int, int lane, float* out) {
  for (int k = 0; k < columns; k++) {
    float row[16];
    store(row, C::read(tile + k * kTileRows * C::kBytes));
    out[k] = row[lane];
  }
}

template <class C>
constexpr TypeKernels quant_kernels(StartIndex start, const Table* table = nullptr) {
  using Flat = UnpackedOf<C>;
  TypeKernels k{&C::chunk_bytes, {start, table}, &unpack<C>, &decode_row<Flat>, {}, {}, {}};
  fill_quant<C, 1, 0, kLoneTokens>(k.lone);
  fill_quant<C, 2, 0, kFewTokens>(k.few);
  fill_quant<Flat, 1, kManyTokens, kManyTokens>(k.many[0]);
  fill_quant<Flat, 2, kManyTokens, kManyTokens>(k.many[1]);
  return k;
}

template <class C>
constexpr TypeKernels float_kernels() {
  TypeKernels k{[](int columns) { return columns * kTileRows * C::kBytes; },
                {kNoStart, nullptr},
                nullptr,
                &decode_float_row<C>,
                {},
                {},
                {}};
  fill_float<C, 1, kLoneTokens>(k.lone);
  fill_float<C, 2, kFewTokens>(k.few);
  return k;
}

constexpr Table kNonlinear128 = make_table(kNonlinear, 128), kE2M1By16 = make_table(kE2M1, 16),
                kE2M1By32 = make_table(kE2M1, 32), kTernaryShifted16 = make_table(kTernaryShifted, 16),
                kTernaryShifted32 = make_table(kTernaryShifted, 32),
                kThreeMagnitudes64 = make_table(kThreeMagnitudes, 64),
                kEightMagnitudes64 = make_table(kEightMagnitudes, 64), kEightOdd16 = make_table(kEightOdd, 16);

// In the order of WeightType.
constexpr TypeKernels kTypes[kNumWeightTypes] = {
    float_kernels<Float32>(),
    float_kernels<Float16>(),
    float_kernels<BFloat16>(),
    quant_kernels<Symmetric<Bits::kFour>>(kStart8),
    quant_kernels<Affine<Bits::kFour>>(kNoStart),
    quant_kernels<Symmetric<Bits::kFive>>(kStart16),
    quant_kernels<Affine<Bits::kFive>>(kNoStart),
    quant_kernels<Symmetric<Bits::kEight>>(kStart128),
    quant_kernels<SuperAffine<Bits::kFour>>(kNoStart),
    quant_kernels<SuperAffine<Bits::kFive>>(kNoStart),
    quant_kernels<Factored<Bits::kSix, 4>>(kHalf32),
    quant_kernels<Symmetric<Bits::kFour, true>>(kStart128, &kNonlinear128),          // IQ4_NL
    quant_kernels<Factored<Bits::kFour, 8, true, true>>(kStart128, &kNonlinear128),  // IQ4_XS
    quant_kernels<Exponents>(kStart16, &kE2M1By16),                                  // MXFP4
    quant_kernels<SmallFloats>(kHalf32, &kE2M1By32),                                 // NVFP4
    quant_kernels<HalfBlockAffine>(kNoStart),                                        // Q2_K
    quant_kernels<Factored<Bits::kThree, 4>>(kHalf4),                                // Q3_K
    quant_kernels<Ternary>(kStart1),                                                 // TQ1_0
    quant_kernels<Ternary>(kStart1),                                                 // TQ2_0
    quant_kernels<Factored<Bits::kFour, 8, true>>(kStart16, &kTernaryShifted16),     // IQ1_S
    quant_kernels<Factored<Bits::kFour, 4, true>>(kHalf32, &kTernaryShifted32),      // IQ1_M
    quant_kernels<Factored<Bits::kFour, 8, true>>(kStart64, &kThreeMagnitudes64),    // IQ2_XXS
    quant_kernels<Factored<Bits::kFour, 4, true>>(kHalf64, &kThreeMagnitudes64),     // IQ2_XS
    quant_kernels<Factored<Bits::kFour, 4, true>>(kHalf64, &kThreeMagnitudes64),     // IQ2_S
    quant_kernels<Factored<Bits::kFour, 8, true>>(kStart64, &kEightMagnitudes64),    // IQ3_XXS
    quant_kernels<Factored<Bits::kFour, 8, true>>(kStart16, &kEightOdd16),           // IQ3_S
};
static_assert([] {
  for (int i = 0; i < kNumWeightTypes; i++)
    if (kTypes[i].variant.start != kStartOf[i]) return false;
  return true;
}());
constexpr int kMaxUnpackedBytes = 64 * (kChunkColumns / 4) + 128 * 16;

VEC int chunk_columns(int columns, int start) {
  return columns - start < kChunkColumns ? columns - start : kChunkColumns;
}

// Tiles of one type over all rows, chunk by chunk: weights are read from memory once, whatever the number of rows. Few
// rows take two tiles at a time, which share each broadcast; more than registers hold of that take one; many take
// chunks that were unpacked.
void multiply_tiles(const TypeKernels& k, const PanelArgs& args, int num_tiles, bool second, float* totals) {
  alignas(64) uint8_t unpacked[2][kMaxUnpackedBytes];
  const QuantRows& x = *args.x;
  const bool unpacks = k.unpack && args.num_rows > kLoneTokens;
  const bool is_pair = num_tiles == 2 && (unpacks || !k.unpack || args.num_rows <= kFewTokens);
  const int max_tokens = unpacks ? kManyTokens : is_pair ? kFewTokens : kLoneTokens;
  const ChunkFn* functions = unpacks ? k.many[is_pair] : is_pair ? k.few : k.lone;
  const TypeKernels &a = kTypes[static_cast<int>(args.type_a)], &b = kTypes[static_cast<int>(args.type_b)];
  const uint8_t* chunk = args.panel;
  for (int column = 0; column < x.columns; column += kChunkColumns) {
    const int columns = chunk_columns(x.columns, column);
    const uint8_t* tiles[2] = {chunk + (second ? a.chunk_bytes(columns) : 0), chunk + a.chunk_bytes(columns)};
    chunk += a.chunk_bytes(columns) + b.chunk_bytes(columns);
    if (unpacks)
      for (int n = 0; n < num_tiles; n++) {
        k.unpack(tiles[n], columns, k.variant.table, unpacked[n]);
        tiles[n] = unpacked[n];
      }
    for (int n = 0; n < num_tiles; n += is_pair ? 2 : 1)
      for (int row = 0; row < args.num_rows; row += max_tokens) {
        const int tokens = args.num_rows - row < max_tokens ? args.num_rows - row : max_tokens;
        float* out = totals + static_cast<size_t>(row) * kPanelRows + n * kTileRows;
        functions[tokens - 1](tiles + n, columns, k.variant, x, row, column, out);
      }
  }
}

void multiply_panel(const PanelArgs& args) {
  __builtin_memset(args.totals, 0, sizeof(float) * kPanelRows * static_cast<size_t>(args.num_rows));
  const TypeKernels &a = kTypes[static_cast<int>(args.type_a)], &b = kTypes[static_cast<int>(args.type_b)];
  if (args.type_a == args.type_b) {
    multiply_tiles(a, args, 2, false, args.totals);
  } else {
    multiply_tiles(a, args, 1, false, args.totals);
    multiply_tiles(b, args, 1, true, args.totals + kTileRows);
  }
}

// Row `lane` (0 to 31) of a panel whose tiles are of one type.
void embed_row(const uint8_t* panel, WeightType type, int lane, int columns, float scale, float* out) {
  alignas(64) uint8_t unpacked[kMaxUnpackedBytes];
  const TypeKernels& k = kTypes[static_cast<int>(type)];
  const StartIndex start = k.variant.start;
  const int zero_point = start == kNoStart ? 0 : kStarts[start].zero_point;
  for (int column = 0; column < columns; column += kChunkColumns) {
    const int width = chunk_columns(columns, column), bytes = k.chunk_bytes(width);
    const uint8_t* tile = panel + (lane / kTileRows) * bytes;
    if (k.unpack) {
      k.unpack(tile, width, k.variant.table, unpacked);
      tile = unpacked;
    }
    k.decode(tile, width, zero_point, lane % kTileRows, out + column);
    panel += 2 * bytes;
  }
  for (int i = 0; i < columns; i += 16) store(out + i, load(out + i) * splat(scale));
}

}  // namespace
