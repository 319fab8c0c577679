// What a device can do at best.
KERNEL(LANES) void nothing(GLOBAL int* out) {}

KERNEL(LANES) void check_dot4(GLOBAL const uint* a, GLOBAL const uint* b, GLOBAL int* out) {
  out[LANE] = dot4(a[LANE], b[LANE], LANE);
}

// 8 * 8 multiply-adds of int8 by each lane and round, in registers.
KERNEL(LANES) void multiply_int8(GLOBAL int* out, int rounds) {
  int sums[8];
  uint a = (uint)LANE * 0x01010101u, b = (uint)GROUP(0) | 0x01020304u;
  for (int i = 0; i < 8; i++) sums[i] = i;
  for (int round = 0; round < rounds; round++) {
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = dot4(a ^ (uint)sums[i], b, dot4(b, a + (uint)i, sums[i]));
  }
  int sum = 0;
  for (int i = 0; i < 8; i++) sum += sums[i];
  out[GROUP(0) * LANES + LANE] = sum;
}
