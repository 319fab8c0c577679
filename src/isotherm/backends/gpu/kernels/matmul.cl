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
INLINE GLOBAL const u8* tile_at(GLOBAL const u8* panel, uint num_blocks, uint chunk, int is_second) {
  const uint blocks = min(num_blocks - 8 * chunk, 8u);
  return panel + (size_t)chunk * (tile_bytes_a(8) + tile_bytes_b(8)) + (is_second ? tile_bytes_a(blocks) : 0);
}

// A block of the lane's row in its tile.
INLINE void read_block(GLOBAL const u8* tile, uint in_chunk, uint lane, Block* block) {
  const uint row = lane % 16;
  if (lane < 16 || IS_ONE_TYPE)
    read_a(tile + in_chunk / UNIT_BLOCKS_A * UNIT_BYTES_A, row, in_chunk % UNIT_BLOCKS_A, block);
  else
    read_b(tile + in_chunk / UNIT_BLOCKS_B * UNIT_BYTES_B, row, in_chunk % UNIT_BLOCKS_B, block);
}

// Times the block at `at` of all rows' blocks, which every lane of the slice reads.
INLINE float dot_block(const Block* block, uint lane, GLOBAL const uint* codes, GLOBAL const int* sums, int at) {
  const uint4 low = ((GLOBAL const uint4*)codes)[2 * at], high = ((GLOBAL const uint4*)codes)[2 * at + 1];
  const uint x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const int2 sum = ((GLOBAL const int2*)sums)[at];
  return lane < 16 || IS_ONE_TYPE ? dot_a(block, x, sum.x, sum.y) : dot_b(block, x, sum.x, sum.y);
}

// Slices of a kernel for so many rows, and neighbouring blocks that one takes at a time: what they give of a round fits
// 8 KB of local memory.
#define SLICES_OF(tokens) (FEW_SLICES * (tokens) <= 64 ? FEW_SLICES : 64 / (tokens))
#define DEPTH_OF(tokens) ((tokens) == 1 ? FEW_DEPTH : 1)
#define ROUND_OF(tokens) (SLICES_OF(tokens) * DEPTH_OF(tokens))

// Few rows: decode. Slices take blocks in turn; row t's chain is slice t's. parts: [turn][row][block of a round][lane],
// scale_parts alike without lanes.
typedef struct {
  GLOBAL const uint* codes;
  GLOBAL const float* scales;
  GLOBAL const int* sums;
  int num_blocks, first_row, last_row;
} Input;

// `depth` blocks from b on, the at-th and so on of their round. A depth of 2 leaves none over: columns are padded to 64.
INLINE void dot_few(const Input* input, GLOBAL const u8* panel, int b, int at, LOCAL float* parts,
                    LOCAL float* scale_parts, const int depth, const int tokens, const int round) {
  const uint lane = LANE & 31;
  GLOBAL const u8* tile = tile_at(panel, input->num_blocks, (uint)b / 8, lane >= 16);
  GLOBAL const float* scales = input->scales + min(input->first_row + (int)lane, input->last_row) * input->num_blocks + b;
  Block blocks[2];
  float scale[2];
#pragma unroll
  for (int k = 0; k < depth; k++) {
    scale[k] = scales[k];
    read_block(tile, (uint)b % 8 + k, lane, &blocks[k]);
  }
#pragma unroll
  for (int t = 0; t < tokens; t++) {
    const int row = min(input->first_row + t, input->last_row);
#pragma unroll
    for (int k = 0; k < depth; k++)
      parts[(t * round + at + k) * 32 + lane] =
          dot_block(&blocks[k], lane, input->codes, input->sums, row * input->num_blocks + b + k);
  }
#pragma unroll
  for (int k = 0; k < depth; k++)
    if (lane < tokens) scale_parts[lane * round + at + k] = scale[k];
}

INLINE void multiply_few(GLOBAL const u8* weight, int num_blocks, GLOBAL const uint* codes, GLOBAL const float* scales,
                         GLOBAL const int* sums, GLOBAL const int* batch, LOCAL float* parts, LOCAL float* scale_parts,
                         const int tokens, const int depth, const int round, FINISH_PARAMETERS) {
  const int lane = LANE & 31, slice = (uint)LANE / 32, rows = NUM_ROWS(batch), first_row = GROUP(1) * tokens;
  const Input input = {codes, scales, sums, num_blocks, first_row, rows - 1};
  GLOBAL const u8* panel = panel_at(weight, num_blocks, GROUP(0));
  float total = 0.0f;
  int turn = 0;  // one half is written while the other is read
  for (int first = 0; first < num_blocks; first += round, turn ^= 1) {
    LOCAL float* part = parts + turn * tokens * round * 32;
    LOCAL float* scale = scale_parts + turn * tokens * round;
    const int at = slice * depth, b = first + at, count = min(round, num_blocks - first);
    if (b < num_blocks) dot_few(&input, panel, b, at, part, scale, depth, tokens, round);
    BARRIER();
    if (slice < tokens)
#pragma unroll 8
      for (int i = 0; i < count; i++)
        total = FMA(part[(slice * round + i) * 32 + lane], scale[slice * round + i], total);
  }
  BARRIER();
  const int is_row = slice < tokens && first_row + slice < rows;
  finish(total, min(first_row + slice, rows - 1), is_row, lane, parts + 32 * slice, FINISH_ARGUMENTS);
}

#define MATMUL_PARAMETERS                                                                                    \
  GLOBAL const u8 *weight, int num_blocks, GLOBAL const uint *codes, GLOBAL const float *scales,              \
      GLOBAL const int *sums, GLOBAL const int *batch, FINISH_PARAMETERS
#define FEW(KIND, tokens)                                                                                    \
  KIND(SLICES_OF(tokens) * 32) void multiply_##tokens(MATMUL_PARAMETERS) {                                  \
    SHARED float parts[2 * tokens * ROUND_OF(tokens) * 32], scale_parts[2 * tokens * ROUND_OF(tokens)];        \
    multiply_few(weight, num_blocks, codes, scales, sums, batch, parts, scale_parts, tokens, DEPTH_OF(tokens), \
                 ROUND_OF(tokens), FINISH_ARGUMENTS);                                                          \
  }
FEW(ROOMY_KERNEL, 1)
FEW(KERNEL, 2)
FEW(KERNEL, 4)
FEW(KERNEL, 8)

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
  const int lane = LANE & 31, slice = (uint)LANE / 32, rows = NUM_ROWS(batch);
  const int first_row = (GROUP(1) * MANY_SLICES + slice) * MANY_TOKENS;
  GLOBAL const u8* panel = panel_at(weight, num_blocks, GROUP(0));
  float totals[MANY_TOKENS];
  for (int t = 0; t < MANY_TOKENS; t++) totals[t] = 0.0f;
  for (int first = 0; first < num_blocks; first += MANY_SLICES) {
    Block block;
    if (first + slice < num_blocks) {
      const uint b = first + slice;
      read_block(tile_at(panel, num_blocks, b / 8, lane >= 16), b % 8, lane, &block);
      put_block(&block, shared + slice * BLOCK_WORDS * 32 + lane);
    }
    BARRIER();
    const int count = min(MANY_SLICES, num_blocks - first);
    for (int i = 0; i < count; i++) {
      get_block(shared + i * BLOCK_WORDS * 32 + lane, &block);
#pragma unroll
      for (int t = 0; t < MANY_TOKENS; t++) {
        const int at = min(first_row + t, rows - 1) * num_blocks + first + i;
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
