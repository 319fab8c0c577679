// Causal attention over pages, in absolute blocks of 512 positions:
//
//   scores of a block = dot by fma, dimensions rising, times the scale
//   best = their maximum, p = exp(score - best), total = sum of p (lane = position mod 16, then halves)
//   out = fma(p, value, out), positions rising
//
// Blocks are merged in order by merge(). A position that a row does not see has p = 0 and adds nothing.
namespace {

using namespace isotherm;

constexpr float kNone = -__builtin_inff();

struct Span {
  int first, last;  // positions [first, last)
  bool empty() const { return first >= last; }
};

// What row `token` sees of block `block`.
VEC Span seen(const AttendArgs& a, int token, int block) {
  const int position = a.first_position + token;
  const int oldest = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
  const int start = block * kAttentionBlock, end = start + kAttentionBlock;
  return {oldest > start ? oldest : start, position + 1 < end ? position + 1 : end};
}

// scores [kRows][512] of one page's positions, from position `at` of the block.
template <int kRows>
void score_page(const uint16_t* keys, const float* const* q, int head_dim, float scale, float* scores, int at) {
  F acc[kRows][4];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < 4; n++) acc[r][n] = splat(0.0f);
  for (int d = 0; d < head_dim; d++) {
    F k[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) k[n] = load_f16(keys + d * kPageTokens + 16 * n);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const F x = splat(q[r][d]);
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) acc[r][n] = fma(k[n], x, acc[r][n]);
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < 4; n++) store(scores + r * kAttentionBlock + at + 16 * n, acc[r][n] * splat(scale));
}

// out [kRows][head_dim], 64 columns from `column`, += p times the values of positions [first, last) of one page.
template <int kRows, int kVectors>
void weigh_page(const uint16_t* values, int head_dim, const float* p, int first, int last, float* const* out) {
  F acc[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < kVectors; n++) acc[r][n] = load(out[r] + 16 * n);
  for (int t = first; t < last; t++) {
    F v[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) v[n] = load_f16(values + t * head_dim + 16 * n);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const F x = splat(p[r * kAttentionBlock + t]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; n++) acc[r][n] = fma(x, v[n], acc[r][n]);
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < kVectors; n++) store(out[r] + 16 * n, acc[r][n]);
}

// Turns a row's scores into p, zero outside `span`; gives the row's maximum and the sum of p.
VEC void softmax_row(float* scores, Span span, float* best, float* total) {
  const int from = span.first & ~15, to = (span.last + 15) & ~15;
  for (int i = from; i < span.first; i++) scores[i] = kNone;
  for (int i = span.last; i < to; i++) scores[i] = kNone;
  F high = splat(kNone);
  for (int i = from; i < to; i += 16) high = max(load(scores + i), high);
  *best = largest(high);
  const F top = splat(*best);
  for (int i = from; i < to; i += 16) store(scores + i, exp(load(scores + i) - top));
  for (int i = from; i < span.first; i++) scores[i] = 0.0f;
  for (int i = span.last; i < to; i++) scores[i] = 0.0f;
  F lanes = splat(0.0f);
  for (int i = from; i < to; i += 16) lanes = lanes + load(scores + i);
  *total = sum(lanes);
}

using ScoreFn = void (*)(const uint16_t*, const float* const*, int, float, float*, int);
using WeighFn = void (*)(const uint16_t*, int, const float*, int, int, float* const*);

template <int kRows>
constexpr void fill_rows(ScoreFn* score, WeighFn (*weigh)[2]) {
  if constexpr (kRows > 0) {
    fill_rows<kRows - 1>(score, weigh);
    score[kRows - 1] = &score_page<kRows>;
    weigh[kRows - 1][0] = &weigh_page<kRows, 1>;
    weigh[kRows - 1][1] = &weigh_page<kRows, 4>;
  }
}

struct RowKernels {
  ScoreFn score[kAttendRows];
  WeighFn weigh[kAttendRows][2];  // 16 or 64 columns at a time
};
constexpr RowKernels kRowKernels = [] {
  RowKernels k{};
  fill_rows<kAttendRows>(k.score, k.weigh);
  return k;
}();

const uint16_t* page_of(const AttendArgs& a, int position) {
  return a.kv + static_cast<size_t>(a.pages[position / kPageTokens]) * a.page_stride;
}

// The rows [row, row + count) of the tile over one block: a partial [best, total, -, -, out] a row.
void attend_rows(const AttendArgs& a, int block, int row, int count, float* partials, float* scores) {
  const float* q[kAttendRows];
  float* out[kAttendRows];
  Span spans[kAttendRows], all{(block + 1) * kAttentionBlock, 0};
  const int start = block * kAttentionBlock;
  for (int r = 0; r < count; r++) {
    const int token = (row + r) / a.group, head = (row + r) % a.group;
    q[r] = a.q + token * a.token_stride + head * a.head_dim;
    spans[r] = seen(a, token, block);
    if (spans[r].empty()) continue;
    all = {spans[r].first < all.first ? spans[r].first : all.first, spans[r].last > all.last ? spans[r].last : all.last};
  }
  for (int page = all.first & ~(kPageTokens - 1); page < all.last; page += kPageTokens)
    kRowKernels.score[count - 1](page_of(a, page), q, a.head_dim, a.scale, scores, page - start);
  for (int r = 0; r < count; r++) {
    float* partial = partials + (row + r) * partial_floats(a.head_dim);
    float* p = scores + r * kAttentionBlock;
    partial[0] = kNone;
    if (!spans[r].empty()) softmax_row(p, {spans[r].first - start, spans[r].last - start}, partial, partial + 1);
    // Zeros where another row of the tile sees and this one does not.
    const int from = spans[r].empty() ? all.last : spans[r].first, to = spans[r].empty() ? all.last : spans[r].last;
    for (int i = all.first; i < from; i++) p[i - start] = 0.0f;
    for (int i = to; i < all.last; i++) p[i - start] = 0.0f;
    for (int d = 0; d < a.head_dim; d++) partial[4 + d] = 0.0f;
  }
  for (int page = all.first & ~(kPageTokens - 1); page < all.last; page += kPageTokens) {
    const uint16_t* values = page_of(a, page) + a.head_dim * kPageTokens;
    const int first = all.first > page ? all.first - page : 0;
    const int last = all.last - page < kPageTokens ? all.last - page : kPageTokens;
    for (int d = 0; d < a.head_dim;) {
      const bool wide = a.head_dim - d >= 64;
      for (int r = 0; r < count; r++) out[r] = partials + (row + r) * partial_floats(a.head_dim) + 4 + d;
      kRowKernels.weigh[count - 1][wide](values + d, a.head_dim, scores + page - start, first, last, out);
      d += wide ? 64 : 16;
    }
  }
}

void attend_block(const AttendArgs& a, int block, float* partials) {
  float* scores = a.scratch;
  const int rows = a.num_tokens * a.group;
  for (int row = 0; row < rows; row += kAttendRows)
    attend_rows(a, block, row, rows - row < kAttendRows ? rows - row : kAttendRows, partials, scores);
}

struct Running {
  float best, total;
};

// Adds one block's partial to a row's running softmax.
VEC void merge(Running& running, float* acc, const float* partial, int head_dim) {
  if (partial[0] == kNone) return;
  const float best = partial[0] > running.best ? partial[0] : running.best;
  const F old = exp(splat(running.best - best)), fresh = exp(splat(partial[0] - best));
  float lane[16];
  store(lane, fma(splat(running.total), old, splat(partial[1]) * fresh));
  running = {best, lane[0]};
  for (int d = 0; d < head_dim; d += 16) store(acc + d, fma(load(acc + d), old, load(partial + 4 + d) * fresh));
}

// One row: partials of its blocks, `block_stride` floats apart, into out [head_dim].
void merge_blocks(const float* partials, size_t block_stride, int num_blocks, int head_dim, float* out) {
  Running running{kNone, 0.0f};
  for (int d = 0; d < head_dim; d += 16) store(out + d, splat(0.0f));
  for (int b = 0; b < num_blocks; b++) merge(running, out, partials + b * block_stride, head_dim);
  for (int d = 0; d < head_dim; d += 16) store(out + d, load(out + d) / splat(running.total));
}

void attend(const AttendArgs& a) {
  const int rows = a.num_tokens * a.group;
  const size_t stride = partial_floats(a.head_dim);
  float* partials = a.scratch + kAttendRows * kAttentionBlock;
  float* running = partials + rows * stride;  // best and total of each row
  for (int r = 0; r < rows; r++) {
    running[2 * r] = kNone;
    running[2 * r + 1] = 0.0f;
    float* out = a.out + r / a.group * a.token_stride + r % a.group * a.head_dim;
    for (int d = 0; d < a.head_dim; d += 16) store(out + d, splat(0.0f));
  }
  const int last = a.first_position + a.num_tokens - 1;
  const int first = a.window && a.first_position + 1 > a.window ? a.first_position + 1 - a.window : 0;
  for (int block = first / kAttentionBlock; block <= last / kAttentionBlock; block++) {
    attend_block(a, block, partials);
    for (int r = 0; r < rows; r++) {
      Running row{running[2 * r], running[2 * r + 1]};
      merge(row, a.out + r / a.group * a.token_stride + r % a.group * a.head_dim, partials + r * stride, a.head_dim);
      running[2 * r] = row.best;
      running[2 * r + 1] = row.total;
    }
  }
  for (int r = 0; r < rows; r++) {
    float* out = a.out + r / a.group * a.token_stride + r % a.group * a.head_dim;
    for (int d = 0; d < a.head_dim; d += 16) store(out + d, load(out + d) / splat(running[2 * r + 1]));
  }
}

// float16 to nearest even, never infinite.
void append(const float* k, const float* v, int head_dim, int slot, uint16_t* page) {
  const F high = splat(65504.0f), low = splat(-65504.0f);
  uint16_t lanes[16];
  for (int d = 0; d < head_dim; d += 16) {
    store_f16(lanes, min(max(load(k + d), low), high));
    for (int i = 0; i < 16; i++) page[(d + i) * kPageTokens + slot] = lanes[i];
    store_f16(page + head_dim * kPageTokens + slot * head_dim + d, min(max(load(v + d), low), high));
  }
}

}  // namespace
