// Rotation, KV pages and causal attention in absolute blocks of 512 positions. A page of a head is its keys, then its
// values, as native/kernels/table.h has it. Set beforehand: HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, GROUP_HEADS (query heads
// that a group computes, of one KV head), IS_Q8.
#define PAGE_TOKENS 64
#define BLOCK_TOKENS 512
#define SCALE_BLOCKS ((HEAD_DIM + 31) / 32)
#define SCALES_BYTES (IS_Q8 ? 2 * PAGE_TOKENS * SCALE_BLOCKS : 0)
#define HALF_BYTES (SCALES_BYTES + PAGE_TOKENS * HEAD_DIM * (IS_Q8 ? 1 : 2))
#define NO_SCORE (-INFINITY)

INLINE float bounded(float x) {
  x = x > -65504.0f ? x : -65504.0f;
  return x < 65504.0f ? x : 65504.0f;
}

// A page's keys (or values): element i of its order, of position `slot` and dimension d.
INLINE float element(GLOBAL const u8* plane, int i, int slot, int d) {
#if IS_Q8
  return (float)(i8)plane[SCALES_BYTES + i] * half_at(plane + 2 * (d / 32 * PAGE_TOKENS + slot));
#else
  return half_at(plane + 2 * i);
#endif
}

// Writes one head of one position.
INLINE void append(GLOBAL u8* plane, LOCAL const float* x, int slot, int is_key) {
#if IS_Q8
  for (int b = LANE; b < SCALE_BLOCKS; b += LANES) {
    const int first = 32 * b, last = min(first + 32, HEAD_DIM);
    float top = 0.0f;
    for (int d = first; d < last; d++) top = fmax(fabs(bounded(x[d])), top);
    GLOBAL u8* kept = plane + 2 * (b * PAGE_TOKENS + slot);
    store_half(top / 127.0f, kept);
    const float scale = half_at(kept), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int d = first; d < last; d++) {
      const float code = fmax(fmin(rint(bounded(x[d]) * inverse), 127.0f), -127.0f);
      plane[SCALES_BYTES + (is_key ? d * PAGE_TOKENS + slot : slot * HEAD_DIM + d)] = (u8)(i8)(int)code;
    }
  }
#else
  for (int d = LANE; d < HEAD_DIM; d += LANES)
    store_half(bounded(x[d]), plane + 2 * (is_key ? d * PAGE_TOKENS + slot : slot * HEAD_DIM + d));
#endif
}

INLINE size_t page_of(GLOBAL const int* table, int position, int kv_head) {
  return ((size_t)table[position / PAGE_TOKENS] * NUM_KV_HEADS + kv_head) * 2 * HALF_BYTES;
}

// A group is a head of q or of k, and a token. Norms the head (flags 1: of q, 2: of k) and rotates it; q stays where it
// is, k and v go to their page. rope: where the rotations of token 0 stand in `batch`, but for its rows.
KERNEL(LANES) void rotate_append(GLOBAL float* q, int q_offset, int q_stride, GLOBAL const float* k, int k_offset, int k_stride,
                          GLOBAL const float* v, int v_offset, int v_stride, int flags, GLOBAL const float* q_norm,
                          float q_eps, GLOBAL const float* k_norm, float k_eps, GLOBAL const int* batch, int num_states,
                          int state, int rope_before, int rope_dims, GLOBAL u8* pages) {
  SHARED float x[HEAD_DIM], y[HEAD_DIM], lanes[16];
  const int token = GROUP(1), rows = NUM_ROWS(batch), position = POSITION(batch, token), pairs = rope_dims / 2;
  const int is_query = GROUP(0) < NUM_HEADS, head = is_query ? GROUP(0) : GROUP(0) - NUM_HEADS;
  const int is_normed = flags & (is_query ? 1 : 2);
  GLOBAL const float* from =
      (is_query ? q + q_offset + (size_t)token * q_stride : k + k_offset + (size_t)token * k_stride) + head * HEAD_DIM;
  if (LANE < 16) {
    float sum = 0.0f;
    for (int i = LANE; i < HEAD_DIM; i += 16) sum = FMA(from[i], from[i], sum);
    lanes[LANE] = sum;
  }
  BARRIER();
  const float factor = 1.0f / sqrt(sum_lanes(lanes) / (float)HEAD_DIM + (is_query ? q_eps : k_eps));
  for (int d = LANE; d < HEAD_DIM; d += LANES)
    x[d] = is_normed ? (from[d] * factor) * (is_query ? q_norm : k_norm)[d] : from[d];
  if (!is_query)
    for (int d = LANE; d < HEAD_DIM; d += LANES) y[d] = v[v_offset + (size_t)token * v_stride + head * HEAD_DIM + d];
  BARRIER();
  GLOBAL const float* rope =
      (GLOBAL const float*)(batch + 1 + (2 + num_states + rope_before) * rows + (size_t)token * rope_dims);
  for (int i = LANE; i < pairs; i += LANES) {
    const float first = x[i], second = x[pairs + i], c = rope[i], s = rope[pairs + i];
    x[i] = FMA(first, c, -(second * s));
    x[pairs + i] = FMA(second, c, first * s);
  }
  BARRIER();
  if (is_query) {
    for (int d = LANE; d < HEAD_DIM; d += LANES) q[q_offset + (size_t)token * q_stride + head * HEAD_DIM + d] = x[d];
  } else {
    GLOBAL u8* page = pages + page_of(PAGE_TABLE(batch, token, state), position, head);
    append(page, x, position % PAGE_TOKENS, 1);
    append(page + HALF_BYTES, y, position % PAGE_TOKENS, 0);
  }
}

// One block of one token, for the group's heads: p from `first` to `last`, then best and total.
INLINE void score_block(LOCAL const float* q, GLOBAL const u8* pages, GLOBAL const int* table, int kv_head, int start,
                        int first, int last, float scale, LOCAL float* p, LOCAL float* lanes, LOCAL float* best,
                        LOCAL float* total) {
  const int from = first - start & ~15, to = (last - start + 15) & ~15;
  for (int i = from + LANE; i < to; i += LANES) {
    const int position = start + i;
    float sums[GROUP_HEADS];
    for (int h = 0; h < GROUP_HEADS; h++) sums[h] = 0.0f;
    if (position >= first && position < last) {
      GLOBAL const u8* keys = pages + page_of(table, position, kv_head);
#pragma unroll 32
      for (int d = 0; d < HEAD_DIM; d++) {
        const float key = element(keys, d * PAGE_TOKENS + position % PAGE_TOKENS, position % PAGE_TOKENS, d);
#pragma unroll
        for (int h = 0; h < GROUP_HEADS; h++) sums[h] = FMA(key, q[h * HEAD_DIM + d], sums[h]);
      }
    }
    for (int h = 0; h < GROUP_HEADS; h++)
      p[h * BLOCK_TOKENS + i] = position >= first && position < last ? sums[h] * scale : NO_SCORE;
  }
  BARRIER();
  const int h = LANE / 16, lane = LANE % 16;  // 16 lanes a head: every lane sums what is at its place modulo 16
  if (h < GROUP_HEADS) {
    float high = NO_SCORE;
    for (int i = from + lane; i < to; i += 16) high = p[h * BLOCK_TOKENS + i] > high ? p[h * BLOCK_TOKENS + i] : high;
    lanes[16 * h + lane] = high;
  }
  BARRIER();
  float high = NO_SCORE, sum = 0.0f;
  if (h < GROUP_HEADS)
    for (int i = 0; i < 16; i++) high = lanes[16 * h + i] > high ? lanes[16 * h + i] : high;
  BARRIER();
  if (h < GROUP_HEADS) {
    for (int i = from + lane; i < to; i += 16) {
      const int position = start + i, is_seen = position >= first && position < last;
      const float x = is_seen ? exp_(p[h * BLOCK_TOKENS + i] - high) : 0.0f;
      p[h * BLOCK_TOKENS + i] = x;
      sum = sum + x;
    }
    lanes[16 * h + lane] = sum;
  }
  BARRIER();
  if (h < GROUP_HEADS && lane == 0) {
    best[h] = high;
    total[h] = sum_lanes(lanes + 16 * h);
  }
  BARRIER();
}

// Column d of what head h says of a block.
//
// Positions are read many at a time, of a page's half also those that are not seen: one by one, each would wait for the
// one before it.
#define AHEAD 32
INLINE float weigh_block(GLOBAL const u8* pages, GLOBAL const int* table, int kv_head, int start, int first, int last,
                         LOCAL const float* p, int h, int d) {
  float sum = 0.0f;
  for (int position = first & ~(AHEAD - 1); position < last; position += AHEAD) {
    const int slot = position % PAGE_TOKENS, from = first - position, to = last - position;
    GLOBAL const u8* values = pages + page_of(table, position, kv_head) + HALF_BYTES;
    LOCAL const float* weights = p + h * BLOCK_TOKENS + position - start;
    float v[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) v[i] = element(values, (slot + i) * HEAD_DIM + d, slot + i, d);
    if (from <= 0 && to >= AHEAD) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++) sum = FMA(weights[i], v[i], sum);
    } else {
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (i >= from && i < to) sum = FMA(weights[i], v[i], sum);
    }
  }
  return sum;
}

#define ATTEND_PARAMETERS                                                                                            \
  GLOBAL const float *q, int q_offset, int q_stride, GLOBAL const u8 *pages, GLOBAL const int *batch, int state,       \
      float scale, int window, GLOBAL float *out, int out_stride, GLOBAL float *partials, int num_blocks
#define ITEMS ((GROUP_HEADS * HEAD_DIM + LANES - 1) / LANES)

INLINE void load_queries(LOCAL float* shared, GLOBAL const float* q, int q_offset, int q_stride) {
  q += q_offset + (size_t)GROUP(1) * q_stride + GROUP(0) * GROUP_HEADS * HEAD_DIM;
  for (int i = LANE; i < GROUP_HEADS * HEAD_DIM; i += LANES) shared[i] = q[i];
  BARRIER();
}

// Few tokens: a group a block, of which partials [token][head][num_blocks][2 + HEAD_DIM] are left: best, total, sums.
ROOMY_KERNEL(LANES) void attend_blocks(ATTEND_PARAMETERS) {
  SHARED float queries[GROUP_HEADS * HEAD_DIM], p[GROUP_HEADS * BLOCK_TOKENS], lanes[GROUP_HEADS * 16];
  SHARED float best[GROUP_HEADS], total[GROUP_HEADS];
  const int token = GROUP(1), position = POSITION(batch, token), start = GROUP(2) * BLOCK_TOKENS;
  GLOBAL const int* table = PAGE_TABLE(batch, token, state);
  const int head = GROUP(0) * GROUP_HEADS, kv_head = head / (NUM_HEADS / NUM_KV_HEADS);
  const int oldest = window && position + 1 > window ? position + 1 - window : 0;
  const int first = max(oldest, start), last = max(first, min(position + 1, start + BLOCK_TOKENS));  // it may see nothing
  partials += (((size_t)token * NUM_HEADS + head) * num_blocks + GROUP(2)) * (2 + HEAD_DIM);
  const size_t head_stride = (size_t)num_blocks * (2 + HEAD_DIM);
  load_queries(queries, q, q_offset, q_stride);
  score_block(queries, pages, table, kv_head, start, first, last, scale, p, lanes, best, total);
  if (LANE < GROUP_HEADS) {
    partials[LANE * head_stride] = best[LANE];
    partials[LANE * head_stride + 1] = total[LANE];
  }
  for (int i = LANE; i < GROUP_HEADS * HEAD_DIM; i += LANES) {
    const int h = i / HEAD_DIM, d = i % HEAD_DIM;
    partials[h * head_stride + 2 + d] = weigh_block(pages, table, kv_head, start, first, last, p, h, d);
  }
}

// Adds a block to the running softmax of a head: its best and total, and one sum of it.
INLINE void merge(float* best, float* total, float* sum, float block_best, float block_total, float block_sum) {
  if (block_best == NO_SCORE) return;
  const float high = block_best > *best ? block_best : *best;
  const float old = exp_(*best - high), fresh = exp_(block_best - high);
  *total = FMA(*total, old, block_total * fresh);
  *sum = FMA(*sum, old, block_sum * fresh);
  *best = high;
}

// A group is a head and a token.
KERNEL(LANES) void merge_blocks(ATTEND_PARAMETERS) {
  const int token = GROUP(1), blocks = POSITION(batch, token) / BLOCK_TOKENS + 1;
  partials += ((size_t)token * NUM_HEADS + GROUP(0)) * num_blocks * (2 + HEAD_DIM);
  for (int d = LANE; d < HEAD_DIM; d += LANES) {
    float best = NO_SCORE, total = 0.0f, sum = 0.0f;
    for (int b = 0; b < blocks; b++) {
      GLOBAL const float* partial = partials + (size_t)b * (2 + HEAD_DIM);
      merge(&best, &total, &sum, partial[0], partial[1], partial[2 + d]);
    }
    out[(size_t)token * out_stride + GROUP(0) * HEAD_DIM + d] = sum / total;
  }
}

// A group walks the blocks of its token.
INLINE void attend_token(LOCAL float* queries, LOCAL float* p, LOCAL float* lanes, LOCAL float* best,
                         LOCAL float* total, ATTEND_PARAMETERS) {
  const int token = GROUP(1), position = POSITION(batch, token);
  GLOBAL const int* table = PAGE_TABLE(batch, token, state);
  const int head = GROUP(0) * GROUP_HEADS, kv_head = head / (NUM_HEADS / NUM_KV_HEADS);
  const int oldest = window && position + 1 > window ? position + 1 - window : 0;
  float bests[ITEMS], totals[ITEMS], sums[ITEMS];
  for (int n = 0; n < ITEMS; n++) {
    bests[n] = NO_SCORE;
    totals[n] = sums[n] = 0.0f;
  }
  load_queries(queries, q, q_offset, q_stride);
  for (int start = oldest / BLOCK_TOKENS * BLOCK_TOKENS; start <= position; start += BLOCK_TOKENS) {
    const int first = max(oldest, start), last = min(position + 1, start + BLOCK_TOKENS);
    score_block(queries, pages, table, kv_head, start, first, last, scale, p, lanes, best, total);
    for (int n = 0; n < ITEMS; n++) {
      const int i = LANE + n * LANES, h = i / HEAD_DIM, d = i % HEAD_DIM;
      if (h >= GROUP_HEADS) continue;
      const float sum = weigh_block(pages, table, kv_head, start, first, last, p, h, d);
      merge(&bests[n], &totals[n], &sums[n], best[h], total[h], sum);
    }
    BARRIER();
  }
  out += (size_t)token * out_stride + head * HEAD_DIM;
  for (int n = 0; n < ITEMS; n++)
    if (LANE + n * LANES < GROUP_HEADS * HEAD_DIM) out[LANE + n * LANES] = sums[n] / totals[n];
}

#define ATTEND(KIND, name)                                                                                           \
  KIND(LANES) void name(ATTEND_PARAMETERS) {                                                                         \
    SHARED float queries[GROUP_HEADS * HEAD_DIM], p[GROUP_HEADS * BLOCK_TOKENS], lanes[GROUP_HEADS * 16];            \
    SHARED float best[GROUP_HEADS], total[GROUP_HEADS];                                                              \
    attend_token(queries, p, lanes, best, total, q, q_offset, q_stride, pages, batch, state, scale, window, out,     \
                 out_stride, partials, num_blocks);                                                                  \
  }
ATTEND(ROOMY_KERNEL, attend_few)  // which see one block
ATTEND(KERNEL, attend_many)
