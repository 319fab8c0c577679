// One weight type in P32 (ARCHITECTURE.md): 16 rows of a tile, unit after unit of UNIT_BLOCKS blocks of 32 columns. Set
// beforehand: CODEC(name), UNIT_BLOCKS, UNIT_BYTES, HEADER, BITS, ZERO_POINT, HAS_HALVES (groups of 16 columns, not 32),
// HAS_MINIMUM, SCALES (which of those below), and VALUES, a table that four bits are an index of, or nothing.
//
// Codes are given as signed bytes: eight bits lose their zero point by a flipped sign, a table has none.

// Bytes of so many blocks of one tile.
INLINE uint CODEC(tile_bytes)(uint num_blocks) { return (num_blocks + UNIT_BLOCKS - 1) / UNIT_BLOCKS * UNIT_BYTES; }

// Group `part` (0, or 1 where there are halves) of block b.
INLINE float CODEC(scale)(GLOBAL const u8* unit, uint row, uint b, int part) {
#if SCALES == 0  // float16 by block
  return half_at(unit + 32 * b + 2 * row);
#elif SCALES == 1  // float16 times six bits: Q4_K, Q5_K
  return half_at(unit + 2 * row) * (float)(unit[64 + 16 * b + row] & 15 | (unit[192 + 16 * (b / 2) + row] >> 4 * (b % 2) & 3) << 4);
#elif SCALES == 2  // float16 times four bits: Q2_K
  return half_at(unit + 2 * row) * (float)(unit[64 + 16 * (2 * b + part) + row] & 15);
#elif SCALES == 3  // float32 times an int8
  return float_at(unit + 4 * row) * (float)(i8)unit[64 + 16 * (HAS_HALVES ? 2 * b + part : b) + row];
#elif SCALES == 4  // float32
  return float_at(unit + 4 * row);
#elif SCALES == 5  // E8M0, halved: by way of bfloat16, in which the two least are subnormal
  const int e = unit[16 * b + row], normal = (e - 1) << 7, subnormal = (e + 1) << 5;
  return FLOAT_OF((uint)(normal > subnormal ? normal : subnormal) << 16);
#else  // E4M3 without its sign, halved; 127 is 0
  const int e = unit[16 * (2 * b + part) + row];
  return half_of(e == 127 ? 0 : (e & 127) << 7) * 128.0f;
#endif
}

#if HAS_MINIMUM
INLINE float CODEC(minimum)(GLOBAL const u8* unit, uint row, uint b, int part) {
#if SCALES == 0
  return half_at(unit + 32 + 2 * row);
#elif SCALES == 1
  return -(half_at(unit + 32 + 2 * row) *
           (float)(unit[64 + 16 * b + row] >> 4 | (unit[192 + 16 * (b / 2) + row] >> (4 * (b % 2) + 2) & 3) << 4));
#else
  return -(half_at(unit + 32 + 2 * row) * (float)(unit[64 + 16 * (2 * b + part) + row] >> 4));
#endif
}
#endif

// Quad j (four columns, a byte each) of block b.
INLINE uint CODEC(quad)(GLOBAL const u8* unit, uint row, uint b, int j) {
  GLOBAL const u8* lines = unit + HEADER + 64 * BITS * b + 4 * row;
#if BITS == 8
  return word_at(lines + 64 * j) ^ 0x80808080u;
#elif BITS < 4
  uint codes = word_at(lines + 64 * (j / 4)) >> 2 * (j % 4) & 0x03030303u;
#if BITS == 3
  codes |= (word_at(lines + 128) >> j & 0x01010101u) << 2;
#endif
  return codes;
#else
  uint codes = word_at(lines + 64 * (j / 2)) >> 4 * (j % 2) & 0x0F0F0F0Fu;
#if BITS == 5
  codes |= (word_at(lines + 256) >> j & 0x01010101u) << 4;
#elif BITS == 6
  codes |= (word_at(lines + 256 + 64 * (j / 4)) >> 2 * (j % 4) & 0x03030303u) << 4;
#endif
#ifdef VALUES
  codes = (uint)(u8)VALUES[codes & 15] | (uint)(u8)VALUES[codes >> 8 & 15] << 8 |
          (uint)(u8)VALUES[codes >> 16 & 15] << 16 | (uint)(u8)VALUES[codes >> 24] << 24;
#endif
  return codes;
#endif
}

INLINE void CODEC(read)(GLOBAL const u8* unit, uint row, uint b, Block* block) {
  for (int part = 0; part < 2; part++) {
    block->scale[part] = block->minimum[part] = 0.0f;
    if (part > HAS_HALVES) break;
    const float scale = CODEC(scale)(unit, row, b, part);
    block->scale[part] = fabs(scale) < 0x1p105f ? scale : NOT_A_NUMBER;
#if HAS_MINIMUM
    block->minimum[part] = CODEC(minimum)(unit, row, b, part);
#endif
  }
#pragma unroll
  for (int j = 0; j < 8; j++) block->codes[j] = CODEC(quad)(unit, row, b, j);
}

// The block times 32 activation codes x whose halves have the sums first and second.
INLINE float CODEC(dot)(const Block* block, const uint* x, int first, int second) {
  int products[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 8; j++) products[j / 4] = dot4(block->codes[j], x[j], products[j / 4]);
#if HAS_HALVES
  float sum = FMA((float)(products[0] - ZERO_POINT * first), block->scale[0], 0.0f);
#if HAS_MINIMUM
  sum = FMA((float)first, block->minimum[0], sum);
#endif
  sum = FMA((float)(products[1] - ZERO_POINT * second), block->scale[1], sum);
#if HAS_MINIMUM
  sum = FMA((float)second, block->minimum[1], sum);
#endif
#else
  float sum = FMA((float)(products[0] + products[1] - ZERO_POINT * (first + second)), block->scale[0], 0.0f);
#if HAS_MINIMUM
  sum = FMA((float)(first + second), block->minimum[0], sum);
#endif
#endif
  return sum;
}

// One weight, as an embedding has it.
INLINE float CODEC(weight)(GLOBAL const u8* unit, uint row, uint b, int column) {
  const int part = HAS_HALVES ? column / 16 : 0;
  const int code = (i8)(CODEC(quad)(unit, row, b, column / 4) >> 8 * (column % 4));
  float x = CODEC(scale)(unit, row, b, part) * (float)(code - ZERO_POINT);
#if HAS_MINIMUM
  x = x + CODEC(minimum)(unit, row, b, part);
#endif
  return x;
}

#undef CODEC
#undef UNIT_BLOCKS
#undef UNIT_BYTES
#undef HEADER
#undef BITS
#undef ZERO_POINT
#undef HAS_HALVES
#undef HAS_MINIMUM
#undef SCALES
#undef VALUES
