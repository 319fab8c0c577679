// What a sampler needs of a row of logits, where it wants the `kept` largest only: see Shortlist in program/backend.py,
// and native/runtime/sampler.cpp, whose sums these are. A group is a row of the head's.
#ifdef __OPENCL_VERSION__
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#endif
#define LARGEST_FLOAT 0x1.fffffep127f
#define SUM_LANES 32
#define STRETCH (8 * LANES)
#define HEADER_WORDS 8

// e to the x for x <= 0, as the sampler's: not the contract's.
INLINE float exp_below(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return x >= -87.0f ? p * FLOAT_OF((BITS_OF(shifted) - 0x4B400000u + 127u) << 23) : 0.0f;
}

// Rises with x; -0 is 0.
INLINE uint order_of(float x) {
  const uint bits = BITS_OF(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The largest logit; whether one is NaN or infinite.
INLINE float find_peak(GLOBAL const float* logits, int width, LOCAL float* shared, LOCAL int* unsound) {
  float peak = -INFINITY;
  if (LANE == 0) *unsound = 0;
  BARRIER();
  for (int i = LANE; i < width; i += LANES) {
    if (!(logits[i] <= LARGEST_FLOAT)) *unsound = 1;
    peak = logits[i] > peak ? logits[i] : peak;
  }
  shared[LANE] = peak;
  BARRIER();
  for (int i = 0; i < LANES; i++) peak = shared[i] > peak ? shared[i] : peak;
  BARRIER();
  return peak;
}

// The sum of all weights exp(logit - peak): lane i % 32 of the sum has every 32nd; on lane 0.
INLINE double weigh(GLOBAL const float* logits, int width, float peak, LOCAL float* shared, LOCAL double* lanes) {
  double sum = 0;
  for (int start = 0; start < width; start += STRETCH) {
    const int count = min(STRETCH, width - start);
    for (int i = LANE; i < count; i += LANES) shared[i] = exp_below(logits[start + i] - peak);
    BARRIER();
    if (LANE < SUM_LANES)
      for (int i = LANE; i < count; i += SUM_LANES) sum += shared[i];
    BARRIER();
  }
  if (LANE < SUM_LANES) lanes[LANE] = sum;
  BARRIER();
  double total = 0;
  for (int i = 0; i < SUM_LANES; i++) total += lanes[i];
  return total;
}

// The order of the kept-th largest of those above -inf, or of the least of them where they are fewer; digit by digit.
// rest: how many of those that are equal to it are kept.
INLINE uint find_bound(GLOBAL const float* logits, int width, int kept, LOCAL int* digits, LOCAL uint* shared, int* rest) {
  const uint none = order_of(-INFINITY);
  uint bound = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = LANE; i < 256; i += LANES) digits[i] = 0;
    BARRIER();
    for (int i = LANE; i < width; i += LANES) {
      const uint order = order_of(logits[i]);
      const int is_alike = shift == 24 || order >> (shift + 8) == bound >> (shift + 8);
      if (is_alike && order > none) ATOMIC_ADD(&digits[order >> shift & 255], 1);
    }
    BARRIER();
    if (LANE == 0) {
      int digit = 255, before = 0;
      while (digit > 0 && before + digits[digit] < kept) before += digits[digit--];
      if (before + digits[digit] < kept) {  // there are fewer: the least of them is the bound
        while (digit < 255 && digits[digit] == 0) digit++;
        before -= digit > 0 ? digits[digit] : 0;
      }
      shared[0] = bound | (uint)digit << shift;
      shared[1] = (uint)min(kept - before, digits[digit]);
    }
    BARRIER();
    bound = shared[0];
    kept = (int)shared[1];
    BARRIER();
  }
  *rest = kept;
  return bound;
}

// The ids and logits above the bound, and the first `rest` of those at it, by rising id: lanes have runs of ids.
INLINE int collect(GLOBAL const float* logits, int width, uint bound, int rest, LOCAL int* above, LOCAL int* equal,
                   GLOBAL uint* ids, GLOBAL uint* values) {
  const int run = (width + LANES - 1) / LANES, first = LANE * run, last = min(first + run, width);
  int num_above = 0, num_equal = 0;
  for (int i = first; i < last; i++) {
    num_above += order_of(logits[i]) > bound;
    num_equal += order_of(logits[i]) == bound;
  }
  above[LANE] = num_above;
  equal[LANE] = num_equal;
  BARRIER();
  int at = 0, seen = 0, total = 0;
  for (int i = 0; i < LANES; i++) {
    if (i < LANE) at += above[i], seen += equal[i];
    total += above[i];
  }
  at += min(seen, rest);
  for (int i = first; i < last; i++) {
    const uint order = order_of(logits[i]);
    if (order < bound || (order == bound && seen++ >= rest)) continue;
    ids[at] = (uint)i;
    values[at++] = BITS_OF(logits[i]);
  }
  return total + rest;
}

// head: rows, which they are [rows], how many are kept of each [rows]. out [rows][HEADER_WORDS + 2 * most]: unsound,
// how many, peak, -, the sum of weights as a double, -, -, ids [most], logits [most].
KERNEL(LANES) void shortlist(GLOBAL const float* logits, GLOBAL const int* head, GLOBAL uint* out, int width, int most) {
  SHARED float shared[STRETCH];
  SHARED double lanes[SUM_LANES];
  SHARED int digits[256], above[LANES], equal[LANES], unsound;
  SHARED uint found[2];
  const int row = GROUP(1), kept = head[1 + NUM_ROWS(head) + row];
  logits += (size_t)row * width;
  out += (size_t)row * (HEADER_WORDS + 2 * most);
  const float peak = find_peak(logits, width, shared, &unsound);
  const int is_unsound = unsound || peak == -INFINITY;
  const double total = weigh(logits, width, peak, shared, lanes);  // of unsound rows too: no barrier stands in a branch
  int rest;
  const uint bound = find_bound(logits, width, kept, digits, found, &rest);
  const int count = collect(logits, width, bound, rest, above, equal, out + HEADER_WORDS, out + HEADER_WORDS + most);
  if (LANE == 0) {
    *(GLOBAL double*)(out + 4) = total;
    out[0] = (uint)is_unsound;
    out[1] = (uint)count;
    out[2] = BITS_OF(peak);
  }
}
