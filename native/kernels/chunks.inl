// A chunk of a panel's weights times rows of quantised activations:
//
//   block = float(group's integer dot) * scale, [block = fma(sum of the group's codes, minimum, block)]
//   [groups of half a block: block += the second half's in the same way, by fma]
//   total = fma(block, activation scale, total), blocks rising
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

// totals [tokens][32] += a chunk of packed tiles, or unpacked columns, times the first rows of a bundle.
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
      for (int n = 0; n < S::kTiles; n++) prefetch_block<C>(tiles[n], b);
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

}  // namespace
