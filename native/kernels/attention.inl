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

// Brings elements of what a kernel reads next while it reads those of the page at hand: pages lie apart, and the
// hardware's own prefetcher begins anew in each.
template <int kCount, int kBytes>
VEC void fetch_elements(const uint8_t* next, int i) {
  for (int byte = 0; byte < kCount * kBytes; byte += 64) __builtin_prefetch(next + i * kBytes + byte, 0, 3);
}

// Keys or values of one page as kernels read them: element i in the page's order, times the scale of its 32 columns
// where there is one. `next` are those that are read after them.
struct Halves {
  static constexpr bool kScaled = false;
  const uint16_t* data;
  const uint8_t* next;
  VEC F at(int i) const { return load_f16(data + i); }
  template <int kCount>
  VEC void fetch(int i) const {
    fetch_elements<kCount, 2>(next, i);
  }
};
struct Floats {
  static constexpr bool kScaled = false;
  const float* data;
  VEC F at(int i) const { return load(data + i); }
  template <int kCount>
  VEC void fetch(int) const {}
};
struct Codes {
  static constexpr bool kScaled = true;
  const int8_t* data;
  const uint16_t* scales;  // [blocks][64]
  const uint8_t* next;
  VEC F at(int i) const { return load_i8(data + i); }
  template <int kCount>
  VEC void fetch(int i) const {
    fetch_elements<kCount, 1>(next, i);
  }
  VEC F scales_of(int block, int position) const { return load_f16(scales + block * kPageTokens + position); }
};

// scores [kRows][512] of one page's positions, from position `at` of the block.
template <int kRows, class Page>
void score_page(const Page& keys, const float* const* q, int head_dim, float scale, float* scores, int at) {
  F acc[kRows][4];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < 4; n++) acc[r][n] = splat(0.0f);
  for (int first = 0; first < head_dim; first += kKvScaleColumns) {
    [[maybe_unused]] F scales[4];
    if constexpr (Page::kScaled)
      for (int n = 0; n < 4; n++) scales[n] = keys.scales_of(first / kKvScaleColumns, 16 * n);
    const int last = first + kKvScaleColumns < head_dim ? first + kKvScaleColumns : head_dim;
    for (int d = first; d < last; d++) {
      keys.template fetch<kPageTokens>(d * kPageTokens);
      F k[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) {
        k[n] = keys.at(d * kPageTokens + 16 * n);
        if constexpr (Page::kScaled) k[n] = k[n] * scales[n];
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        const F x = splat(q[r][d]);
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) acc[r][n] = fma(k[n], x, acc[r][n]);
      }
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < 4; n++) store(scores + r * kAttentionBlock + at + 16 * n, acc[r][n] * splat(scale));
}

// out [kRows], 16 * kVectors columns of it from `column` on, += p times the values of positions [first, last) of a
// page.
template <int kRows, int kVectors, class Page>
void weigh_page(const Page& values, int head_dim, int column, const float* p, int first, int last, float* const* out) {
  constexpr int kBlocks = kVectors > 1 ? 16 * kVectors / kKvScaleColumns : 1;
  [[maybe_unused]] float scales[kBlocks][kPageTokens];
  if constexpr (Page::kScaled)
    for (int b = 0; b < kBlocks; b++)
      for (int t = 0; t < kPageTokens; t += 16) store(scales[b] + t, values.scales_of(column / kKvScaleColumns + b, t));
  F acc[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < kVectors; n++) acc[r][n] = load(out[r] + 16 * n);
  for (int t = first; t < last; t++) {
    values.template fetch<16 * kVectors>(t * head_dim + column);
    F v[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; n++) {
      v[n] = values.at(t * head_dim + column + 16 * n);
      if constexpr (Page::kScaled) v[n] = v[n] * splat(scales[n * kBlocks / kVectors][t]);
    }
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
template <class Page>
struct RowKernels {
  void (*score[kAttendRows])(const Page&, const float* const*, int, float, float*, int);
  void (*weigh[kAttendRows][2])(const Page&, int, int, const float*, int, int, float* const*);
};

template <class Page, int kRows>
constexpr void fill_rows(RowKernels<Page>& k) {
  if constexpr (kRows > 0) {
    fill_rows<Page, kRows - 1>(k);
    k.score[kRows - 1] = &score_page<kRows, Page>;
    k.weigh[kRows - 1][0] = &weigh_page<kRows, 1, Page>;
    k.weigh[kRows - 1][1] = &weigh_page<kRows, 4, Page>;
  }
}

template <class Page>
constexpr RowKernels<Page> row_kernels() {
  RowKernels<Page> k{};
  fill_rows<Page, kAttendRows>(k);
  return k;
}

template <class Page>
constexpr RowKernels<Page> kRowKernels = row_kernels<Page>();

VEC Codes codes_at(const uint8_t* half, const uint8_t* next, int head_dim) {
  return {reinterpret_cast<const int8_t*>(half + kv_scales_bytes(KvType::Q8_0, head_dim)),
          reinterpret_cast<const uint16_t*>(half), next};
}

// Keys or values of one page as the kernels want them: as they lie, or widened to float32 for tiles of many rows.
VEC void open(const AttendArgs&, const uint8_t* half, const uint8_t* next, bool, float*, Halves& page) {
  page = {reinterpret_cast<const uint16_t*>(half), next};
}
VEC void open(const AttendArgs& a, const uint8_t* half, const uint8_t* next, bool, float*, Codes& page) {
  page = codes_at(half, next, a.head_dim);
}
void open(const AttendArgs& a, const uint8_t* half, const uint8_t*, bool is_keys, float* single, Floats& page) {
  page = {single};
  if (a.kv_type == KvType::F16) {
    for (int i = 0; i < kPageTokens * a.head_dim; i += 16) store(single + i, load_f16(half + 2 * i));
    return;
  }
  const Codes codes = codes_at(half, half, a.head_dim);
  for (int d = 0; d < a.head_dim; d += 16)
    for (int t = 0; t < kPageTokens; t += 16) {
      const F scales = codes.scales_of(d / kKvScaleColumns, t);
      float of_position[16];
      store(of_position, scales);
      for (int i = 0; i < 16; i++) {
        const int at = is_keys ? (d + i) * kPageTokens + t : (t + i) * a.head_dim + d;
        store(single + at, codes.at(at) * (is_keys ? scales : splat(of_position[i])));
      }
    }
}

// The rows of a tile over one block; see attend_block.
template <class Page>
void attend_pages(const AttendArgs& a, int block, float* partials) {
  const int rows = a.num_tokens * a.group, start = block * kAttentionBlock;
  const size_t stride = partial_floats(a.head_dim);
  float *scores = a.scratch, *single = scores + static_cast<size_t>(rows) * kAttentionBlock;
  Span all{start + kAttentionBlock, start};
  for (int t = 0; t < a.num_tokens; t++) {
    const Span span = seen(a, t, block);
    if (span.empty()) continue;
    all = {span.first < all.first ? span.first : all.first, span.last > all.last ? span.last : all.last};
  }
  const int first_page = all.first & ~(kPageTokens - 1);
  const auto keys_at = [&](int position) {
    return a.kv + static_cast<size_t>(a.pages[position / kPageTokens]) * a.page_stride;
  };
  const auto values_at = [&](int position) { return keys_at(position) + kv_half_bytes(a.kv_type, a.head_dim); };
  for (int page = first_page; page < all.last; page += kPageTokens) {
    const int next = page + kPageTokens;
    Page keys;
    open(a, keys_at(page), next < all.last ? keys_at(next) : values_at(first_page), true, single, keys);
    for (int row = 0; row < rows; row += kAttendRows) {
      const int count = rows - row < kAttendRows ? rows - row : kAttendRows;
      const float* q[kAttendRows];
      for (int r = 0; r < count; r++)
        q[r] = a.q + (row + r) / a.group * a.token_stride + (row + r) % a.group * a.head_dim;
      kRowKernels<Page>.score[count - 1](keys, q, a.head_dim, a.scale, scores + row * kAttentionBlock, page - start);
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
  for (int page = first_page; page < all.last; page += kPageTokens) {
    const int next = page + kPageTokens;
    Page values;
    open(a, values_at(page), values_at(next < all.last ? next : page), false, single, values);
    const int first = all.first > page ? all.first - page : 0;
    const int last = all.last - page < kPageTokens ? all.last - page : kPageTokens;
    for (int row = 0; row < rows; row += kAttendRows) {
      const int count = rows - row < kAttendRows ? rows - row : kAttendRows;
      const float* p = scores + row * kAttentionBlock + page - start;
      for (int d = 0; d < a.head_dim; d += a.head_dim - d >= 64 ? 64 : 16) {
        float* out[kAttendRows];
        for (int r = 0; r < count; r++) out[r] = partials + (row + r) * stride + 4 + d;
        kRowKernels<Page>.weigh[count - 1][a.head_dim - d >= 64](values, a.head_dim, d, p, first, last, out);
      }
    }
  }
}

// A partial [best, total, -, -, out] for every row of the tile over one block.
void attend_block(const AttendArgs& a, int block, float* partials) {
  if (a.num_tokens * a.group > kAttendRows) {
    attend_pages<Floats>(a, block, partials);
  } else if (a.kv_type == KvType::F16) {
    attend_pages<Halves>(a, block, partials);
  } else {
    attend_pages<Codes>(a, block, partials);
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

// What a cache keeps is finite, also of what is not: p = 0 of another row must hide it.
VEC F bounded(F x) { return min(max(x, splat(-65504.0f)), splat(65504.0f)); }

// float16 to nearest even.
void append_halves(const float* k, const float* v, int head_dim, int slot, uint16_t* page) {
  uint16_t lanes[16];
  for (int d = 0; d < head_dim; d += 16) {
    store_f16(lanes, bounded(load(k + d)));
    for (int i = 0; i < 16; i++) page[(d + i) * kPageTokens + slot] = lanes[i];
    store_f16(page + head_dim * kPageTokens + slot * head_dim + d, bounded(load(v + d)));
  }
}

// Codes of up to 32 columns, and the bits of their scale; columns past `count` are not read. See the contract, KV.
VEC uint16_t quantise_head(const float* x, int count, int8_t* codes) {
  const F a = bounded(load(x)), b = count > 16 ? bounded(load(x + 16)) : splat(0.0f);
  uint16_t bits[16];
  store_f16(bits, splat(largest(max(abs(a), abs(b))) / 127.0f));
  float scale[16];
  store(scale, load_f16(bits));
  const F inverse = splat(scale[0] > 0.0f ? 1.0f / scale[0] : 0.0f), high = splat(127.0f), low = splat(-127.0f);
  store_i8(codes, to_int(min(max(rint(a * inverse), low), high)));
  store_i8(codes + 16, to_int(min(max(rint(b * inverse), low), high)));
  return bits[0];
}

void append_codes(const float* k, const float* v, int head_dim, int slot, uint8_t* page) {
  uint8_t* values_page = page + kv_half_bytes(KvType::Q8_0, head_dim);
  const size_t scales_bytes = kv_scales_bytes(KvType::Q8_0, head_dim);
  for (int d = 0; d < head_dim; d += kKvScaleColumns) {
    const int count = head_dim - d < kKvScaleColumns ? head_dim - d : kKvScaleColumns;
    const size_t at = static_cast<size_t>(d / kKvScaleColumns * kPageTokens + slot);
    int8_t codes[kKvScaleColumns];
    reinterpret_cast<uint16_t*>(page)[at] = quantise_head(k + d, count, codes);
    for (int i = 0; i < count; i++) page[scales_bytes + (d + i) * kPageTokens + slot] = static_cast<uint8_t>(codes[i]);
    reinterpret_cast<uint16_t*>(values_page)[at] = quantise_head(v + d, count, codes);
    __builtin_memcpy(values_page + scales_bytes + slot * head_dim + d, codes, static_cast<size_t>(count));
  }
}

void append(KvType type, const float* k, const float* v, int head_dim, int slot, uint8_t* page) {
  if (type == KvType::F16) return append_halves(k, v, head_dim, slot, reinterpret_cast<uint16_t*>(page));
  append_codes(k, v, head_dim, slot, page);
}

}  // namespace
