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

VEC F load_kv(const uint16_t* p) { return load_f16(p); }
VEC F load_kv(const float* p) { return load(p); }

// scores [kRows][512] of one page's positions, from position `at` of the block.
template <int kRows, class T>
void score_page(const T* keys, const float* const* q, int head_dim, float scale, float* scores, int at) {
  F acc[kRows][4];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < 4; n++) acc[r][n] = splat(0.0f);
  for (int d = 0; d < head_dim; d++) {
    F k[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) k[n] = load_kv(keys + d * kPageTokens + 16 * n);
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

// out [kRows], 16 * kVectors columns of it, += p times the values of positions [first, last) of one page.
template <int kRows, int kVectors, class T>
void weigh_page(const T* values, int head_dim, const float* p, int first, int last, float* const* out) {
  F acc[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < kVectors; n++) acc[r][n] = load(out[r] + 16 * n);
  for (int t = first; t < last; t++) {
    F v[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) v[n] = load_kv(values + t * head_dim + 16 * n);
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

// By number of rows, and 16 or 64 columns at a time.
template <class T>
struct RowKernels {
  void (*score[kAttendRows])(const T*, const float* const*, int, float, float*, int);
  void (*weigh[kAttendRows][2])(const T*, int, const float*, int, int, float* const*);
};

template <class T, int kRows>
constexpr void fill_rows(RowKernels<T>& k) {
  if constexpr (kRows > 0) {
    fill_rows<T, kRows - 1>(k);
    k.score[kRows - 1] = &score_page<kRows, T>;
    k.weigh[kRows - 1][0] = &weigh_page<kRows, 1, T>;
    k.weigh[kRows - 1][1] = &weigh_page<kRows, 4, T>;
  }
}

template <class T>
constexpr RowKernels<T> row_kernels() {
  RowKernels<T> k{};
  fill_rows<T, kAttendRows>(k);
  return k;
}

template <class T>
constexpr RowKernels<T> kRowKernels = row_kernels<T>();

// Keys or values of one page as the kernels want them: as they lie, or widened to float32 for tiles of many rows.
VEC const uint16_t* widened(const uint16_t* half, int, float*, const uint16_t*) { return half; }
VEC const float* widened(const uint16_t* half, int count, float* single, const float*) {
  for (int i = 0; i < count; i += 16) store(single + i, load_f16(half + i));
  return single;
}

// The rows of a tile over one block; see attend_block.
template <class T>
void attend_pages(const AttendArgs& a, int block, float* partials) {
  const int rows = a.num_tokens * a.group, start = block * kAttentionBlock, page_elements = kPageTokens * a.head_dim;
  const size_t stride = partial_floats(a.head_dim);
  float *scores = a.scratch, *single = scores + static_cast<size_t>(rows) * kAttentionBlock;
  Span all{start + kAttentionBlock, start};
  for (int t = 0; t < a.num_tokens; t++) {
    const Span span = seen(a, t, block);
    if (span.empty()) continue;
    all = {span.first < all.first ? span.first : all.first, span.last > all.last ? span.last : all.last};
  }
  const auto page_at = [&](int position) {
    return a.kv + static_cast<size_t>(a.pages[position / kPageTokens]) * a.page_stride;
  };
  for (int page = all.first & ~(kPageTokens - 1); page < all.last; page += kPageTokens) {
    const T* keys = widened(page_at(page), page_elements, single, static_cast<const T*>(nullptr));
    for (int row = 0; row < rows; row += kAttendRows) {
      const int count = rows - row < kAttendRows ? rows - row : kAttendRows;
      const float* q[kAttendRows];
      for (int r = 0; r < count; r++)
        q[r] = a.q + (row + r) / a.group * a.token_stride + (row + r) % a.group * a.head_dim;
      kRowKernels<T>.score[count - 1](keys, q, a.head_dim, a.scale, scores + row * kAttentionBlock, page - start);
    }
  }
  for (int r = 0; r < rows; r++) {
    const Span span = seen(a, r / a.group, block);
    float *partial = partials + r * stride, *p = scores + r * kAttentionBlock - start;
    partial[0] = kNone;
    for (int d = 0; d < a.head_dim; d += 16) store(partial + 4 + d, splat(0.0f));
    if (!span.empty()) softmax_row(p + start, {span.first - start, span.last - start}, partial, partial + 1);
    // Zeros where another row of the tile sees and this one does not.
    for (int i = all.first; i < (span.empty() ? all.last : span.first); i++) p[i] = 0.0f;
    for (int i = span.empty() ? all.last : span.last; i < all.last; i++) p[i] = 0.0f;
  }
  for (int page = all.first & ~(kPageTokens - 1); page < all.last; page += kPageTokens) {
    const T* values = widened(page_at(page) + page_elements, page_elements, single, static_cast<const T*>(nullptr));
    const int first = all.first > page ? all.first - page : 0;
    const int last = all.last - page < kPageTokens ? all.last - page : kPageTokens;
    for (int row = 0; row < rows; row += kAttendRows) {
      const int count = rows - row < kAttendRows ? rows - row : kAttendRows;
      const float* p = scores + row * kAttentionBlock + page - start;
      for (int d = 0; d < a.head_dim; d += a.head_dim - d >= 64 ? 64 : 16) {
        float* out[kAttendRows];
        for (int r = 0; r < count; r++) out[r] = partials + (row + r) * stride + 4 + d;
        kRowKernels<T>.weigh[count - 1][a.head_dim - d >= 64](values + d, a.head_dim, p, first, last, out);
      }
    }
  }
}

// A partial [best, total, -, -, out] for every row of the tile over one block.
void attend_block(const AttendArgs& a, int block, float* partials) {
  if (a.num_tokens * a.group > kAttendRows) {
    attend_pages<float>(a, block, partials);
  } else {
    attend_pages<uint16_t>(a, block, partials);
  }
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
  float* partials = a.scratch + static_cast<size_t>(rows) * kAttentionBlock + kPageTokens * a.head_dim;
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
