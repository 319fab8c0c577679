// What a sampler needs of a row of logits, where it wants the `kept` largest only: see Shortlist in program/backend.py,
// and native/runtime/sampler.cpp, whose sums these are. A group is a row of the head's.
#ifdef __OPENCL_VERSION__
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#endif
#define LARGEST_FLOAT 0x1.fffffep127f
#define AHEAD 16          // logits that a lane has on their way
#define MOST_FOUND 2048   // candidates in local memory
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

// Rises with the logit, and falls with the id where logits are equal: no two keys are.
INLINE u64 key_of(float x, uint id) { return (u64)order_of(x) << 32 | (0xFFFFFFFFu - id); }

typedef struct {
  double lanes[LANES];
  float peaks[LANES];
  uint ids[MOST_FOUND];
  float values[MOST_FOUND];
  u8 is_chosen[MOST_FOUND];
  int counts[LANES];
  int num_found, is_unsound;
  float bound;
} Shortlist;

// The lane's logits from `start` on, LANES apart; -inf behind the last.
INLINE void read_ahead(GLOBAL const float* logits, int start, int width, float* x) {
#pragma unroll
  for (int n = 0; n < AHEAD; n++) {
    const int i = start + n * LANES + LANE;
    x[n] = i < width ? logits[i] : -INFINITY;
  }
}

// The largest logit; whether one is NaN or infinite. And a bound below which none of the `kept` largest is: the kept-th
// largest of what each lane found.
INLINE float find_peak(GLOBAL const float* logits, int width, int kept, LOCAL Shortlist* shared) {
  float own = -INFINITY, x[AHEAD];
  int is_unsound = 0, rank = 0;
  if (LANE == 0) shared->is_unsound = shared->num_found = 0;
  for (int start = 0; start < width; start += AHEAD * LANES) {
    read_ahead(logits, start, width, x);
    for (int n = 0; n < AHEAD; n++) {
      if (!(x[n] <= LARGEST_FLOAT)) is_unsound = 1;
      own = x[n] > own ? x[n] : own;
    }
  }
  shared->peaks[LANE] = own;
  BARRIER();
  if (is_unsound) shared->is_unsound = 1;
  float peak = -INFINITY;
  for (int i = 0; i < LANES; i++) {
    const float other = shared->peaks[i];
    peak = other > peak ? other : peak;
    rank += other > own || (other == own && i < LANE);
  }
  if (rank == kept - 1) shared->bound = own > -LARGEST_FLOAT ? own : -LARGEST_FLOAT;
  BARRIER();
  return peak;
}

INLINE void add_candidate(LOCAL Shortlist* shared, float x, uint id) {
  const int at = ATOMIC_ADD(&shared->num_found, 1);
  if (at >= MOST_FOUND) return;
  shared->ids[at] = id;
  shared->values[at] = x;
}

// The sum of all weights exp(logit - peak), a lane for every LANES-th, then halves added; and candidates, in any order.
INLINE double weigh(GLOBAL const float* logits, int width, float peak, LOCAL Shortlist* shared) {
  const float bound = shared->bound;
  double sum = 0;
  float x[AHEAD];
  for (int start = 0; start < width; start += AHEAD * LANES) {
    read_ahead(logits, start, width, x);
    for (int n = 0; n < AHEAD; n++) {
      sum += exp_below(x[n] - peak);
      if (x[n] >= bound) add_candidate(shared, x[n], start + n * LANES + LANE);
    }
  }
  shared->lanes[LANE] = sum;
  BARRIER();
  for (int left = LANES / 2; left > 0; left /= 2) {
    if (LANE < left) shared->lanes[LANE] += shared->lanes[LANE + left];
    BARRIER();
  }
  return shared->lanes[0];
}

// Where candidates are too many, as of a row of equal logits: bit after bit the key that `kept` have or surpass, and
// those are the candidates. Otherwise no round is made.
INLINE void find_again(GLOBAL const float* logits, int width, int kept, LOCAL Shortlist* shared) {
  const int is_needed = shared->num_found > MOST_FOUND;
  u64 bound = 0;
  for (int bit = is_needed ? 63 : -1; bit >= 0; bit--) {
    const u64 trial = bound | (u64)1 << bit;
    int count = 0;
    for (int i = LANE; i < width; i += LANES) count += key_of(logits[i], i) >= trial;
    shared->counts[LANE] = count;
    BARRIER();
    count = 0;
    for (int i = 0; i < LANES; i++) count += shared->counts[i];
    if (count >= kept) bound = trial;
    BARRIER();
  }
  if (is_needed && LANE == 0) shared->num_found = 0;
  BARRIER();
  for (int i = LANE; i < (is_needed ? width : 0); i += LANES)
    if (key_of(logits[i], i) >= bound) add_candidate(shared, logits[i], i);
  BARRIER();
}

// The `kept` first candidates, by rising id.
INLINE void write_chosen(int kept, LOCAL Shortlist* shared, GLOBAL uint* ids, GLOBAL uint* values) {
  const int num_found = shared->num_found;
  for (int i = LANE; i < num_found; i += LANES) {
    const u64 own = key_of(shared->values[i], shared->ids[i]);
    int rank = 0;
    for (int j = 0; j < num_found; j++) rank += key_of(shared->values[j], shared->ids[j]) > own;
    shared->is_chosen[i] = rank < kept;
  }
  BARRIER();
  for (int i = LANE; i < num_found; i += LANES) {
    const uint own = shared->ids[i];
    int at = 0;
    for (int j = 0; j < num_found; j++) at += shared->is_chosen[j] && shared->ids[j] < own;
    if (!shared->is_chosen[i]) continue;
    ids[at] = own;
    values[at] = BITS_OF(shared->values[i]);
  }
}

// head: rows, which they are [rows], how many are kept of each [rows]. out [rows][HEADER_WORDS + 2 * most]: unsound,
// how many, peak, -, the sum of weights as a double, -, -, ids [most], logits [most].
ROOMY_KERNEL(LANES) void shortlist(GLOBAL const float* logits, GLOBAL const int* head, GLOBAL uint* out, int width, int most) {
  SHARED Shortlist shared;
  const int row = GROUP(1), kept = head[1 + NUM_ROWS(head) + row];
  logits += (size_t)row * width;
  out += (size_t)row * (HEADER_WORDS + 2 * most);
  const float peak = find_peak(logits, width, kept, &shared);
  const double total = weigh(logits, width, peak, &shared);  // of unsound rows too: no barrier stands in a branch
  find_again(logits, width, kept, &shared);
  write_chosen(kept, &shared, out + HEADER_WORDS, out + HEADER_WORDS + most);
  if (LANE == 0) {
    *(GLOBAL double*)(out + 4) = total;
    out[0] = (uint)(shared.is_unsound || peak == -INFINITY);
    out[1] = (uint)min(kept, shared.num_found);
    out[2] = BITS_OF(peak);
  }
}
