// As matmul.cl, of weights stored as floats (FLOAT_BYTES, IS_BRAIN): activations are not quantised, and a sum is one
// chain of fma's over all columns. Slices bring columns into local memory, from which every slice multiplies them by
// rows of its own.
#define FLOAT_COLUMNS 16  // that a slice brings at once

INLINE float float_weight(GLOBAL const u8* tile, int column, int row) {
  GLOBAL const u8* at = tile + (column * 16 + row) * FLOAT_BYTES;
#if FLOAT_BYTES == 4
  return float_at(at);
#elif IS_BRAIN
  return FLOAT_OF((uint)*(GLOBAL const ushort*)at << 16);
#else
  return half_at(at);
#endif
}

// Where a chunk of 256 columns of a tile begins in its panel.
INLINE GLOBAL const u8* float_tile(GLOBAL const u8* panel, int columns, int chunk, int tile) {
  const int rest = columns - 256 * chunk, width = rest < 256 ? rest : 256;
  return panel + ((size_t)chunk * 256 * 2 + width * tile) * 16 * FLOAT_BYTES;
}

INLINE void multiply_floats(GLOBAL const u8* weight, int num_blocks, GLOBAL const float* values,
                            GLOBAL const int* batch, LOCAL float* shared, const int tokens, float* totals,
                            FINISH_PARAMETERS) {
  const int lane = LANE % 32, slice = LANE / 32, rows = NUM_ROWS(batch), columns = 32 * num_blocks;
  const int first_row = (GROUP(1) * MANY_SLICES + slice) * tokens;
  GLOBAL const u8* panel = weight + (size_t)GROUP(0) * columns * 32 * FLOAT_BYTES;
  for (int t = 0; t < tokens; t++) totals[t] = 0.0f;
  for (int first = 0; first < columns; first += MANY_SLICES * FLOAT_COLUMNS) {
    const int column = first + slice * FLOAT_COLUMNS;
    if (column < columns) {  // all of them: columns are padded to 64
      GLOBAL const u8* tile = float_tile(panel, columns, column / 256, lane / 16);
      float x[FLOAT_COLUMNS];
#pragma unroll
      for (int i = 0; i < FLOAT_COLUMNS; i++) x[i] = float_weight(tile, column % 256 + i, lane % 16);
#pragma unroll
      for (int i = 0; i < FLOAT_COLUMNS; i++) shared[(slice * FLOAT_COLUMNS + i) * 32 + lane] = x[i];
    }
    BARRIER();
    const int count = min(MANY_SLICES * FLOAT_COLUMNS, columns - first);
    if (first_row < rows)
      for (int i = 0; i < count; i++)
        for (int t = 0; t < tokens; t++)
          totals[t] = FMA(shared[i * 32 + lane], values[(size_t)min(first_row + t, rows - 1) * columns + first + i],
                          totals[t]);
    BARRIER();
  }
  for (int t = 0; t < tokens; t++)
    finish(totals[t], first_row + t, first_row + t < rows, lane, shared + 32 * slice, FINISH_ARGUMENTS);
}

#define FLOAT_PARAMETERS                                                                     \
  GLOBAL const u8 *weight, int num_blocks, GLOBAL const float *values, GLOBAL const int *batch, FINISH_PARAMETERS
#define FLOATS(name, tokens)                                                                              \
  KERNEL(MANY_SLICES * 32) void name(FLOAT_PARAMETERS) {                                                                    \
    SHARED float shared[MANY_SLICES * FLOAT_COLUMNS * 32];                                                 \
    float totals[tokens];                                                                                 \
    multiply_floats(weight, num_blocks, values, batch, shared, tokens, totals, FINISH_ARGUMENTS);         \
  }
FLOATS(multiply_floats_few, 1)
FLOATS(multiply_floats_many, MANY_TOKENS)

KERNEL(LANES) void embed_floats(GLOBAL const u8* weight, int num_blocks, GLOBAL const int* batch, GLOBAL float* out, int width,
                         int stride, float factor) {
  const int id = TOKEN_ID(batch, GROUP(1)), columns = 32 * num_blocks;
  GLOBAL const u8* panel = weight + (size_t)(id / 32) * columns * 32 * FLOAT_BYTES;
  for (int column = LANE; column < width; column += LANES)
    out[(size_t)GROUP(1) * stride + column] =
        float_weight(float_tile(panel, columns, column / 256, id % 32 / 16), column % 256, id % 16) * factor;
}
