// Panels of 32 weight rows times rows of quantised activations. A lane is a weight row. A sum over blocks of 32 columns
// is one chain of fma's, blocks rising: slices of 32 lanes compute what blocks give beside each other, the chain waits
// for all of them.
//
// Arguments: weight; the input's codes, scales and sums of 16 codes, by row; `batch`, for the number of rows.

INLINE GLOBAL const u8* panel_at(GLOBAL const u8* weight, int num_blocks, int panel) {
  const int last = num_blocks % 8, chunks = num_blocks / 8;
  const size_t bytes = (size_t)chunks * (tile_bytes_a(8) + tile_bytes_b(8)) + tile_bytes_a(last) + tile_bytes_b(last);
  return weight + (size_t)panel * bytes;
}

// Tile A of a chunk of 256 columns, or tile B behind it.
INLINE GLOBAL const u8* tile_at(GLOBAL const u8* panel, int num_blocks, int chunk, int is_second) {
  const int blocks = min(num_blocks - 8 * chunk, 8);
  return panel + (size_t)chunk * (tile_bytes_a(8) + tile_bytes_b(8)) + (is_second ? tile_bytes_a(blocks) : 0);
}

// Block b of the lane's row in a panel.
INLINE void read_block(GLOBAL const u8* panel, int num_blocks, int b, int lane, Block* block) {
  const int in_chunk = b % 8, row = lane % 16;
  GLOBAL const u8* tile = tile_at(panel, num_blocks, b / 8, lane >= 16);
  if (lane < 16 || IS_ONE_TYPE)
    read_a(tile + in_chunk / UNIT_BLOCKS_A * UNIT_BYTES_A, row, in_chunk % UNIT_BLOCKS_A, block);
  else
    read_b(tile + in_chunk / UNIT_BLOCKS_B * UNIT_BYTES_B, row, in_chunk % UNIT_BLOCKS_B, block);
}

// Times the block at `at` of all rows' blocks, which every lane of the slice reads.
INLINE float dot_block(const Block* block, int lane, GLOBAL const uint* codes, GLOBAL const int* sums, size_t at) {
  const uint4 low = ((GLOBAL const uint4*)codes)[2 * at], high = ((GLOBAL const uint4*)codes)[2 * at + 1];
  const uint x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const int first = sums[2 * at], second = sums[2 * at + 1];
  return lane < 16 || IS_ONE_TYPE ? dot_a(block, x, first, second) : dot_b(block, x, first, second);
}

// Slices of a kernel for so many rows: what they give of a round fits 8 KB of local memory.
#define SLICES_OF(tokens) (FEW_SLICES * (tokens) <= 64 ? FEW_SLICES : 64 / (tokens))

// Few rows: decode. Slices take blocks in turn; row t's chain is slice t's.
INLINE void multiply_few(GLOBAL const u8* weight, int num_blocks, GLOBAL const uint* codes, GLOBAL const float* scales,
                         GLOBAL const int* sums, GLOBAL const int* batch, LOCAL float* parts, const int tokens,
                         const int slices, FINISH_PARAMETERS) {
  const int lane = LANE % 32, slice = LANE / 32, rows = NUM_ROWS(batch), first_row = GROUP(1) * tokens;
  GLOBAL const u8* panel = panel_at(weight, num_blocks, GROUP(0));
  const int my_row = min(first_row + slice, rows - 1);
  float total = 0.0f;
  int turn = 0;  // parts are written in one half while the other is read
  for (int first = 0; first < num_blocks; first += slices, turn ^= 1) {
    LOCAL float* part = parts + turn * tokens * slices * 32;
    const int b = first + slice, count = min(slices, num_blocks - first);
    if (b < num_blocks) {
      Block block;
      read_block(panel, num_blocks, b, lane, &block);
      for (int t = 0; t < tokens; t++) {
        const size_t at = (size_t)min(first_row + t, rows - 1) * num_blocks + b;
        part[(t * slices + slice) * 32 + lane] = dot_block(&block, lane, codes, sums, at);
      }
    }
    BARRIER();
    if (slice < tokens)
#pragma unroll 8
      for (int i = 0; i < count; i++)
        total = FMA(part[(slice * slices + i) * 32 + lane], scales[(size_t)my_row * num_blocks + first + i], total);
  }
  BARRIER();
  const int is_row = slice < tokens && first_row + slice < rows;
  finish(total, my_row, is_row, lane, parts + 32 * slice, FINISH_ARGUMENTS);
}

#define MATMUL_PARAMETERS                                                                                    \
  GLOBAL const u8 *weight, int num_blocks, GLOBAL const uint *codes, GLOBAL const float *scales,              \
      GLOBAL const int *sums, GLOBAL const int *batch, FINISH_PARAMETERS
#define FEW(tokens)                                                                                          \
  KERNEL(SLICES_OF(tokens) * 32) void multiply_##tokens(MATMUL_PARAMETERS) {                                  \
    SHARED float parts[2 * tokens * SLICES_OF(tokens) * 32];                                                  \
    multiply_few(weight, num_blocks, codes, scales, sums, batch, parts, tokens, SLICES_OF(tokens), FINISH_ARGUMENTS); \
  }
FEW(1)
FEW(2)
FEW(4)
FEW(8)

// A block in local memory: word after word of all lanes, so that lanes keep out of each other's banks.
#define BLOCK_WORDS 12
INLINE void put_block(const Block* block, LOCAL uint* words) {
#pragma unroll
  for (int j = 0; j < 8; j++) words[32 * j] = block->codes[j];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    words[32 * (8 + j)] = BITS_OF(block->scale[j]);
    words[32 * (10 + j)] = BITS_OF(block->minimum[j]);
  }
}
INLINE void get_block(LOCAL const uint* words, Block* block) {
#pragma unroll
  for (int j = 0; j < 8; j++) block->codes[j] = words[32 * j];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    block->scale[j] = FLOAT_OF(words[32 * (8 + j)]);
    block->minimum[j] = FLOAT_OF(words[32 * (10 + j)]);
  }
}

// MANY_SLICES * MANY_TOKENS rows: prefill. Slices unpack blocks in turn into local memory, from which every slice
// multiplies them by rows of its own.
KERNEL(MANY_SLICES * 32) void multiply_many(MATMUL_PARAMETERS) {
  SHARED uint shared[MANY_SLICES * BLOCK_WORDS * 32];
  SHARED float exchange[MANY_SLICES * 32];
  const int lane = LANE % 32, slice = LANE / 32, rows = NUM_ROWS(batch);
  const int first_row = (GROUP(1) * MANY_SLICES + slice) * MANY_TOKENS;
  GLOBAL const u8* panel = panel_at(weight, num_blocks, GROUP(0));
  float totals[MANY_TOKENS];
  for (int t = 0; t < MANY_TOKENS; t++) totals[t] = 0.0f;
  for (int first = 0; first < num_blocks; first += MANY_SLICES) {
    Block block;
    if (first + slice < num_blocks) {
      read_block(panel, num_blocks, first + slice, lane, &block);
      put_block(&block, shared + slice * BLOCK_WORDS * 32 + lane);
    }
    BARRIER();
    const int count = min(MANY_SLICES, num_blocks - first);
    for (int i = 0; i < count; i++) {
      get_block(shared + i * BLOCK_WORDS * 32 + lane, &block);
#pragma unroll
      for (int t = 0; t < MANY_TOKENS; t++) {
        const size_t at = (size_t)min(first_row + t, rows - 1) * num_blocks + first + i;
        totals[t] = FMA(dot_block(&block, lane, codes, sums, at), scales[at], totals[t]);
      }
    }
    BARRIER();
  }
  for (int t = 0; t < MANY_TOKENS; t++)
    finish(totals[t], first_row + t, first_row + t < rows, lane, exchange + 32 * slice, FINISH_ARGUMENTS);
}

// Rows of the batch's tokens, times `factor`. Panels of one type.
KERNEL(LANES) void embed(GLOBAL const u8* weight, int num_blocks, GLOBAL const int* batch, GLOBAL float* out, int width,
                  int stride, float factor) {
  const int id = TOKEN_ID(batch, GROUP(1)), tile_row = id % 32;
  GLOBAL const u8* panel = panel_at(weight, num_blocks, id / 32);
  for (int column = LANE; column < width; column += LANES) {
    const int b = column / 32 % 8;
    GLOBAL const u8* tile = tile_at(panel, num_blocks, column / 256, tile_row / 16);
    const float x = weight_a(tile + b / UNIT_BLOCKS_A * UNIT_BYTES_A, tile_row % 16, b % UNIT_BLOCKS_A, column % 32);
    out[(size_t)GROUP(1) * stride + column] = x * factor;
  }
}
