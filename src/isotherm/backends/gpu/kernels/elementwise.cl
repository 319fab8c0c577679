// Norms, quantising, sums, selection: a group is a row, its second number. A row of x begins at x_offset + row * x_stride floats.

// 1 / sqrt(mean of squares + eps) of x, whose lanes of 16 are chains of fma's. Every lane of the group comes here.
//
// The chains are short only where they need not wait for memory: all lanes bring the next stretch of the row while 16
// of them add up the one before.
#define STRETCH (8 * LANES)
INLINE float norm_factor(GLOBAL const float* x, int width, float eps, LOCAL float* stretch) {
  float next[8], sum = 0.0f;
  for (int n = 0; n < 8; n++) next[n] = LANE + n * LANES < width ? x[LANE + n * LANES] : 0.0f;
  for (int start = 0; start < width; start += STRETCH) {
    for (int n = 0; n < 8; n++) stretch[LANE + n * LANES] = next[n];
    BARRIER();
    for (int n = 0; n < 8; n++) {
      const int column = start + STRETCH + LANE + n * LANES;
      next[n] = column < width ? x[column] : 0.0f;
    }
    const int count = min(STRETCH, width - start);
    if (LANE < 16) {
#pragma unroll 16
      for (int i = LANE; i < count; i += 16) sum = FMA(stretch[i], stretch[i], sum);
    }
    BARRIER();
  }
  if (LANE < 16) stretch[LANE] = sum;
  BARRIER();
  return 1.0f / sqrt(sum_lanes(stretch) / (float)width + eps);
}

#define QUANTISE_PARAMETERS                                                                                    \
  GLOBAL const float *x, int x_offset, int x_stride, int width, int num_blocks, int keeps_values,                  \
      GLOBAL const float *weight, float eps, GLOBAL uint *codes, GLOBAL float *scales, GLOBAL int *sums,            \
      GLOBAL float *values

// Rows as int8 codes, a scale and two sums of codes for each 32 columns; where values are kept, as floats too. Padded
// with zeros to whole blocks. A lane has four columns, eight lanes a block: neighbours read and write what lies side by
// side. is_normed is a constant.
typedef struct {
  float tops[LANES];  // of a quad's magnitudes; without end where one is no number
  int sums[LANES];
  int is_unsound;
} Quantised;

INLINE void quantise_row(const int is_normed, LOCAL float* stretch, LOCAL Quantised* shared, QUANTISE_PARAMETERS) {
  const int row = GROUP(1), quad = LANE & 7, lane = LANE - quad;
  x += x_offset + (size_t)row * x_stride;
  codes += (size_t)row * num_blocks * 8;
  scales += (size_t)row * num_blocks;
  sums += (size_t)row * num_blocks * 2;
  values += (size_t)row * num_blocks * 32;
  if (LANE == 0) shared->is_unsound = 0;
  const float factor = is_normed ? norm_factor(x, width, eps, stretch) : 1.0f;
  for (int first = 0; first < num_blocks; first += LANES / 8) {
    const int b = first + lane / 8, column = 32 * b + 4 * quad;
    float v[4], top = 0.0f, doubt = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      v[i] = column + i < width ? x[column + i] : 0.0f;
      if (is_normed && column + i < width) v[i] = (v[i] * factor) * weight[column + i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      top = fabs(v[i]) > top ? fabs(v[i]) : top;
      doubt = doubt + (v[i] - v[i]);  // 0 as long as all are finite
      if (keeps_values && b < num_blocks) values[column + i] = v[i];
    }
    shared->tops[LANE] = doubt == 0.0f ? top : INFINITY;
    BARRIER();
    for (int i = 0; i < 8; i++) top = shared->tops[lane + i] > top ? shared->tops[lane + i] : top;
    const int is_sound = top < INFINITY, is_live = top >= 0x1p-100f && is_sound;
    const float inverse = is_live ? 127.0f / top : 0.0f;
    int sum = 0;
    uint word = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int code = is_sound ? (int)rint(v[i] * inverse) : 0;
      sum += code;
      word |= (uint)(code & 255) << 8 * i;
    }
    shared->sums[LANE] = sum;
    if (!is_sound) shared->is_unsound = 1;
    BARRIER();
    if (b < num_blocks) {
      codes[8 * b + quad] = word;
      if (quad < 2) {
        LOCAL const int* quads = shared->sums + lane + 4 * quad;
        sums[2 * b + quad] = quads[0] + quads[1] + quads[2] + quads[3];
      }
      if (quad == 0) scales[b] = is_live ? top / 127.0f : 0.0f;
    }
  }
  if (shared->is_unsound && quad == 0)  // the lane that wrote the scale
    for (int b = lane / 8; b < num_blocks; b += LANES / 8) scales[b] = NOT_A_NUMBER;
}

#define QUANTISE(name, is_normed)                                                                                \
  KERNEL(LANES) void name(QUANTISE_PARAMETERS) {                                                                   \
    SHARED float stretch[is_normed ? STRETCH : 1];                                                                   \
    SHARED Quantised shared;                                                                                         \
    quantise_row(is_normed, stretch, &shared, x, x_offset, x_stride, width, num_blocks, keeps_values, weight, eps,   \
                 codes, scales, sums, values);                                                                       \
  }
QUANTISE(quantise, 0)
QUANTISE(quantise_normed, 1)

// out = a + b, all of `width` columns, rows `stride` apart.
KERNEL(LANES) void add(GLOBAL const float* a, GLOBAL const float* b, GLOBAL float* out, int width, int stride) {
  const size_t row = (size_t)GROUP(1) * stride;
  for (int i = LANE; i < width; i += LANES) out[row + i] = a[row + i] + b[row + i];
}

// out = a + norm(b), alike.
KERNEL(LANES) void add_norm(GLOBAL const float* a, GLOBAL const float* b, GLOBAL const float* weight, float eps,
                            GLOBAL float* out, int width, int stride) {
  SHARED float stretch[STRETCH];
  const size_t row = (size_t)GROUP(1) * stride;
  const float factor = norm_factor(b + row, width, eps, stretch);
  for (int i = LANE; i < width; i += LANES) out[row + i] = a[row + i] + (b[row + i] * factor) * weight[i];
}

// The rows of a batch that the head reads.
KERNEL(LANES) void select_rows(GLOBAL const float* x, GLOBAL const int* head, GLOBAL float* out, int width, int stride) {
  const size_t from = (size_t)head[1 + GROUP(1)] * stride, to = (size_t)GROUP(1) * stride;
  for (int i = LANE; i < width; i += LANES) out[to + i] = x[from + i];
}
