// Only the neurons that fire: their rows of up, gathered into tiles, and their columns of down, added up block by
// block. Both give the bits of the dense kernels. quantization/neurons.py has the layouts.
namespace {

using namespace isotherm;

// --- rows of up -----------------------------------------------------------------------------------------------------

// What a row has per unit of columns, of one lane of a P32 tile: words of 32 bits in this order, each of which is 64
// bytes of the tile: as it is, as two halves or as four bytes.
struct RowUnit {
  int columns, first_words, half_words, byte_words, words;

  constexpr int num_words() const { return first_words + half_words + byte_words + words; }
};

constexpr RowUnit factored_unit(int bits, int factors) { return {256, 1, 0, factors / 4, 8 * bits}; }

// clang-format off: in the order of WeightType
constexpr RowUnit kRowUnits[kNumWeightTypes] = {
    {1, 1, 0, 0, 0}, {2, 0, 1, 0, 0}, {2, 0, 1, 0, 0},                                       // F32, F16, BF16
    {64, 0, 1, 0, 8}, {32, 0, 1, 0, 4}, {64, 0, 1, 0, 10}, {32, 0, 1, 0, 5}, {64, 0, 1, 0, 16},  // Q4_0 to Q8_0
    {256, 0, 1, 3, 32}, {256, 0, 1, 3, 40}, factored_unit(6, 16),                            // Q4_K, Q5_K, Q6_K
    {64, 0, 1, 0, 8}, factored_unit(4, 8), {128, 0, 0, 1, 16}, {64, 0, 0, 1, 8},             // IQ4, MXFP4, NVFP4
    {256, 0, 1, 4, 16}, factored_unit(3, 16), factored_unit(2, 0), factored_unit(2, 0),      // Q2_K, Q3_K, TQ
    factored_unit(4, 8), factored_unit(4, 16), factored_unit(4, 8), factored_unit(4, 16),    // IQ1, IQ2_XXS, IQ2_XS
    factored_unit(4, 16), factored_unit(4, 8), factored_unit(4, 8),                          // IQ2_S, IQ3
};
// clang-format on
constexpr int kLineBytes = 64, kWordBytes = 4, kPieceWords = 4;
constexpr int kMaxTileChunkBytes = kChunkColumns * kTileRows * kWordBytes;

using LineWords = uint32_t __attribute__((vector_size(64)));
using LineHalves = uint16_t __attribute__((vector_size(32)));
using LineBytes = uint8_t __attribute__((vector_size(16)));

// A line of words as a line of their parts, first parts first.
template <class Parts>
VEC void split_line(uint8_t* line) {
  LineWords words;
  __builtin_memcpy(&words, line, kLineBytes);
  for (size_t at = 0; at < kLineBytes; at += sizeof(Parts), words >>= 8 * sizeof(Parts) / kTileRows) {
    const Parts parts = __builtin_convertvector(words, Parts);
    __builtin_memcpy(line + at, &parts, sizeof(Parts));
  }
}

// One tile over a chunk of columns that begins at `offset` of each of its 16 rows.
void gather_tile(const uint8_t* const* rows, size_t offset, const RowUnit& unit, int num_units, uint8_t* tile) {
  const int num_words = num_units * unit.num_words();
  for (int word = 0; word < num_words; word += kPieceWords) {
    const int first = word + kPieceWords <= num_words ? word : num_words - kPieceWords;  // some words twice
    const size_t at = offset + static_cast<size_t>(kWordBytes * first);
    U lines[kPieceWords];
    transpose_words(load_pieces(rows, at), load_pieces(rows + 1, at), load_pieces(rows + 2, at),
                    load_pieces(rows + 3, at), lines);
    for (int i = 0; i < kPieceWords; i++) store(tile + kLineBytes * (first + i), lines[i]);
  }
  for (int i = 0; i < num_units; i++) {
    uint8_t* line = tile + kLineBytes * (i * unit.num_words() + unit.first_words);
    for (int n = 0; n < unit.half_words; n++, line += kLineBytes) split_line<LineHalves>(line);
    for (int n = 0; n < unit.byte_words; n++, line += kLineBytes) split_line<LineBytes>(line);
  }
}

void multiply_rows(const RowsArgs& args) {
  const TypeKernels& k = kTypes[static_cast<int>(args.type)];
  const RowUnit& unit = kRowUnits[static_cast<int>(args.type)];
  const QuantRows& x = *args.x;
  alignas(64) uint8_t gathered[2][kMaxTileChunkBytes];
  const uint8_t* tiles[2] = {gathered[0], gathered[1]};
  const int num_tiles = args.count > kTileRows ? 2 : 1;
  const uint8_t* rows[2][kTileRows];
  for (int i = 0; i < num_tiles * kTileRows; i++)  // short of rows, the last one stands in
    rows[i / kTileRows][i % kTileRows] =
        args.rows + static_cast<size_t>(args.ids[i < args.count ? i : args.count - 1]) * args.row_bytes;
  __builtin_memset(args.totals, 0, sizeof(float) * kPanelRows * static_cast<size_t>(args.num_rows));
  size_t offset = 0;
  for (int column = 0; column < x.columns; column += kChunkColumns) {
    const int columns = chunk_columns(x.columns, column), num_units = (columns + unit.columns - 1) / unit.columns;
    for (int n = 0; n < num_tiles; n++) gather_tile(rows[n], offset, unit, num_units, gathered[n]);
    const size_t bytes = static_cast<size_t>(num_units * unit.num_words() * kWordBytes);
    for (int i = 0; i < args.num_next; i++) {
      const uint8_t* next = args.rows + static_cast<size_t>(args.next[i]) * args.row_bytes + offset;
      for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at, 0, 2);
    }
    offset += bytes;
    multiply_few(k, tiles, {0, num_tiles}, columns, x, args.num_rows, column, args.totals);
  }
}

// --- columns of down ------------------------------------------------------------------------------------------------

// How a neuron's codes lie: 64 outputs in 64 bytes, or 128 in the low and high halves of 64 bytes; within 64 outputs
// byte 16 l + 4 j + i is that of output 16 j + 4 l + i, so that `interleave` gives outputs in order.
template <bool kIsNibble>
constexpr int kOutputsPerLine = kIsNibble ? 128 : 64;

// The codes of some of a block's neurons for 16 * kVectors outputs from `line` on.
template <bool kIsNibble, int kVectors>
VEC void dot_quads(const NeuronsArgs& args, int first, int end, size_t line, I (&acc)[kVectors]) {
  for (int q = first; q < end; q++) {
    U row[4];
    for (int i = 0; i < 4; i++)
      row[i] = load_codes(args.codes + static_cast<size_t>(args.ids[4 * q + i]) * args.row_bytes + 64 * line);
    const I quad = load_quad(args.activations + 4 * q);
    U codes[4];
    if constexpr (kIsNibble) {
      interleave(bits<0, 15>(row[0]), bits<0, 15>(row[1]), bits<0, 15>(row[2]), bits<0, 15>(row[3]), codes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[j] = dot<false>(acc[j], codes[j], quad);
      interleave(bits<4, 15>(row[0]), bits<4, 15>(row[1]), bits<4, 15>(row[2]), bits<4, 15>(row[3]), codes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[4 + j] = dot<false>(acc[4 + j], codes[j], quad);
    } else {
      interleave(row[0], row[1], row[2], row[3], codes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) acc[j] = dot<true>(acc[j], codes[j], quad);
    }
  }
}

// y += one block of neurons, over the outputs from first_output to end_output.
template <bool kIsNibble, bool kIsHalf, bool kHasMinimum, bool kIsHalved>
void add_neurons(const NeuronsArgs& args) {
  constexpr int kOutputs = kOutputsPerLine<kIsNibble>, kVectors = kOutputs / 16, kScaleBytes = kIsHalf ? 2 : 4;
  const auto read = [](const uint8_t* p) {
    if constexpr (kIsHalf)
      return load_f16(p);
    else
      return load(reinterpret_cast<const float*>(p));
  };
  const F activation_scale = splat(args.scale);
  for (int output = args.first_output; output < args.end_output; output += kOutputs) {
    const size_t line = static_cast<size_t>(output / kOutputs);
    for (int i = 0; i < args.num_next; i++)  // into L1, unlike the scales: as measured
      __builtin_prefetch(args.codes + static_cast<size_t>(args.next[i]) * args.row_bytes + 64 * line, 0, 3);
    for (int at = output * kScaleBytes; args.num_next && at < (output + kOutputs) * kScaleBytes; at += 64) {
      __builtin_prefetch(args.scales + args.next_block + at, 0, 2);
      if constexpr (kIsHalved) __builtin_prefetch(args.scales + args.next_block + args.plane_bytes + at, 0, 2);
      if constexpr (kHasMinimum) __builtin_prefetch(args.minima + args.next_block + at, 0, 2);
    }
    F block[kVectors];
    for (int half = 0; half < (kIsHalved ? 2 : 1); half++) {
      const size_t plane = static_cast<size_t>(half) * args.plane_bytes;
      const F sum = splat(args.sums[half]);
      I acc[kVectors];
      for (int j = 0; j < kVectors; j++)
        acc[j] = isplat(kMagic - args.form.zero_point * static_cast<int32_t>(args.sums[half]));
      dot_quads<kIsNibble>(args, half ? args.ends[0] : 0, args.ends[half], line, acc);
      for (int j = 0; j < kVectors; j++) {
        const size_t at = plane + static_cast<size_t>(output + 16 * j) * kScaleBytes;
        const F scale = read(args.scales + at);
        block[j] = half ? fma(as_float(acc[j]) - splat(kMagicFloat), scale, block[j])
                        : fma(as_float(acc[j]), scale, scale * splat(-kMagicFloat));
        if constexpr (kHasMinimum) block[j] = fma(sum, read(args.minima + at), block[j]);
      }
    }
    for (int j = 0; j < kVectors; j++) {
      float* y = args.y + output + 16 * j;
      store(y, fma(block[j], activation_scale, load(y)));
    }
  }
}

template <bool kIsHalf, bool kIsHalved>
constexpr void (*kAddNeurons[2][2])(const NeuronsArgs&) = {
    {&add_neurons<false, kIsHalf, false, kIsHalved>, &add_neurons<false, kIsHalf, true, kIsHalved>},
    {&add_neurons<true, kIsHalf, false, kIsHalved>, &add_neurons<true, kIsHalf, true, kIsHalved>},
};

void add_neurons(const NeuronsArgs& args) {
  const NeuronForm& form = args.form;
  const auto& functions = form.is_halved ? kAddNeurons<false, true>
                          : form.is_half ? kAddNeurons<true, false>
                                         : kAddNeurons<false, false>;
  functions[form.is_nibble][form.has_minimum](args);
}

}  // namespace
