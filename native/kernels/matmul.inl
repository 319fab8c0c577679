// Panels of 32 weight rows times quantised activations: what each weight type has for it, and the walk over a panel's
// chunks. Few tokens read codes straight from the packed panel; many read columns that were unpacked into L1 once. Both
// run multiply_chunk, so that both give the same bits.
namespace {

using namespace isotherm;

using ChunkFn = void (*)(const uint8_t* const*, int, const Variant&, const QuantRows&, int, int, float*);

// One weight type's functions, by number of tiles and of tokens; `many` read unpacked chunks.
struct TypeKernels {
  int (*chunk_bytes)(int columns);
  Variant variant;
  // null: stored as floats
  void (*unpack)(const uint8_t* source, int columns, const Table* table, int first_block, uint8_t* tile);
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
constexpr int kMaxUnpackedBytes = (64 / 4 + 128 / 16) * kUnpackColumns;

VEC int chunk_columns(int columns, int start) {
  return columns - start < kChunkColumns ? columns - start : kChunkColumns;
}

// Some of a panel's two tiles, all of one type.
struct Tiles {
  int first, count;
};

VEC int chunk_bytes(const PanelArgs& args, int columns) {
  return kTypes[static_cast<int>(args.type_a)].chunk_bytes(columns) +
         kTypes[static_cast<int>(args.type_b)].chunk_bytes(columns);
}

// Where tile `n` (0 or 1) begins in a chunk of so many columns.
VEC int tile_offset(const PanelArgs& args, int n, int columns) {
  return n ? kTypes[static_cast<int>(args.type_a)].chunk_bytes(columns) : 0;
}

// A chunk of packed tiles times few rows: two tiles at a time, which share each broadcast; more rows than registers
// hold of that take one.
VEC void multiply_few(const TypeKernels& k, const uint8_t* const* tiles, Tiles which, int columns, const QuantRows& x,
                      int num_rows, int column, float* totals) {
  const bool is_pair = which.count == 2 && (!k.unpack || num_rows <= kFewTokens);
  const int max_tokens = is_pair ? kFewTokens : kLoneTokens;
  const ChunkFn* functions = is_pair ? k.few : k.lone;
  for (int n = which.first; n < which.first + which.count; n += is_pair ? 2 : 1)
    for (int row = 0; row < num_rows; row += max_tokens) {
      const int tokens = num_rows - row < max_tokens ? num_rows - row : max_tokens;
      float* out = totals + static_cast<size_t>(row) * kPanelRows + n * kTileRows;
      functions[tokens - 1](tiles + n, columns, k.variant, x, row, column, out);
    }
}

// Few rows: codes straight from the panel.
void multiply_packed(const TypeKernels& k, const PanelArgs& args, Tiles which) {
  const uint8_t* chunk = args.panel;
  for (int column = 0; column < args.x->columns; column += kChunkColumns) {
    const int columns = chunk_columns(args.x->columns, column);
    const uint8_t* tiles[2] = {chunk, chunk + tile_offset(args, 1, columns)};
    multiply_few(k, tiles, which, columns, *args.x, args.num_rows, column, args.totals);
    chunk += chunk_bytes(args, columns);
  }
}

// Share `part` of `parts` of so many bytes, into the second cache level.
VEC void fetch_share(const uint8_t* bytes, int num_bytes, int part, int parts) {
  const int lines = num_bytes / 64;
  for (int i = lines * part / parts; i < lines * (part + 1) / parts; i++) __builtin_prefetch(bytes + 64 * i, 0, 2);
}

// Many rows: columns are unpacked once, and read by all rows. What is unpacked next is fetched a little with each
// bundle: fetched all at once it would be waited for, as a core has few lines under way.
void multiply_unpacked(const TypeKernels& k, const PanelArgs& args, Tiles which) {
  alignas(64) uint8_t unpacked[2][kMaxUnpackedBytes];
  const uint8_t* tiles[2] = {unpacked[0], unpacked[1]};
  const int num_bundles = (args.num_rows + kManyTokens - 1) / kManyTokens;
  const int next_bytes = chunk_bytes(args, kChunkColumns) * (kUnpackColumns / kChunkColumns);
  const uint8_t* chunk = args.panel;
  for (int column = 0; column < args.x->columns; column += kUnpackColumns) {
    int columns = 0;
    while (columns < kUnpackColumns && column + columns < args.x->columns) {
      const int width = chunk_columns(args.x->columns, column + columns);
      for (int n = 0; n < which.count; n++)
        k.unpack(chunk + tile_offset(args, which.first + n, width), width, k.variant.table, columns / kBlockColumns,
                 unpacked[n]);
      chunk += chunk_bytes(args, width);
      columns += width;
    }
    for (int i = 0; i < num_bundles; i++) {
      fetch_share(chunk, next_bytes, i, num_bundles);
      const int row = i * kManyTokens, left = args.num_rows - row, tokens = left < kManyTokens ? left : kManyTokens;
      float* out = args.totals + static_cast<size_t>(row) * kPanelRows + which.first * kTileRows;
      k.many[which.count - 1][tokens - 1](tiles, columns, k.variant, *args.x, row, column, out);
    }
  }
}

void multiply_tiles(const TypeKernels& k, const PanelArgs& args, Tiles which) {
  if (k.unpack && args.num_rows > kLoneTokens)
    multiply_unpacked(k, args, which);
  else
    multiply_packed(k, args, which);
}

void multiply_panel(const PanelArgs& args) {
  __builtin_memset(args.totals, 0, sizeof(float) * kPanelRows * static_cast<size_t>(args.num_rows));
  const TypeKernels &a = kTypes[static_cast<int>(args.type_a)], &b = kTypes[static_cast<int>(args.type_b)];
  if (args.type_a == args.type_b) {
    multiply_tiles(a, args, {0, 2});
  } else {
    multiply_tiles(a, args, {0, 1});
    multiply_tiles(b, args, {1, 1});
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
      k.unpack(tile, width, k.variant.table, 0, unpacked);
      tile = unpacked;
    }
    k.decode(tile, width, zero_point, lane % kTileRows, out + column);
    panel += 2 * bytes;
  }
  for (int i = 0; i < columns; i += 16) store(out + i, load(out + i) * splat(scale));
}

}  // namespace
