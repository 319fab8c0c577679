// What each kind of step does on one thread. The barrier after a step is the walk's.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "panels.h"

namespace isotherm {
namespace {

// Query rows (tokens x heads of a group) that one attention task takes: enough to share its reads of the pages.
constexpr int kTileQueryRows = 24;

}  // namespace

bool Executor::run_step(const EmbedStep& step, size_t, int thread) {
  const Range rows = share(batch_.num_tokens, thread, pool_.num_threads());
  for (int i = rows.first; i < rows.last; i++) {
    const int id = batch_.token_ids[i];
    const uint8_t* panel = step.weight.data + static_cast<size_t>(id / kPanelRows) * step.weight.panel_bytes;
    kernels_.embed_row(panel, step.weight.type_a, id % kPanelRows, step.weight.padded_columns(), step.scale,
                       buffers_[step.out].row(i));
  }
  return false;
}

bool Executor::run_step(const EmbedPositionsStep& step, size_t, int thread) {
  const Range rows = share(batch_.num_tokens, thread, pool_.num_threads());
  const Matrix& w = step.weight;
  float* row = workers_[thread].normed;
  for (int i = rows.first; i < rows.last; i++) {
    const int at = step.first_row + positions_[static_cast<size_t>(i)];
    const uint8_t* panel = w.data + static_cast<size_t>(at / kPanelRows) * w.panel_bytes;
    kernels_.embed_row(panel, w.type_a, at % kPanelRows, w.padded_columns(), 1.0f, row);
    kernels_.add(buffers_[step.x].row(i), row, w.columns, buffers_[step.out].row(i));
  }
  return false;
}

// A row of buffer `x`, padded to 64 columns, through its norm if there is one.
const float* Executor::normed(int x, const Norm& norm, int row, int columns, int thread) {
  const float* values = buffers_[x].row(row);
  if (!norm.weight) return values;
  float* out = workers_[thread].normed;
  if (norm.bias) {
    kernels_.layer_norm(values, norm.weight, norm.bias, columns, norm.eps, out);
  } else {
    kernels_.rms_norm(values, norm.weight, columns, norm.eps, out);
  }
  std::fill(out + (columns + 15) / 16 * 16, out + (columns + 63) / 64 * 64, 0.0f);
  return out;
}

bool Executor::quantise(int x, Norm norm, int columns, const InputNeeds& needs, size_t index, int thread,
                        QuantRows& rows) {
  const int num_rows = rows_of(index);
  const bool redundant = num_rows <= kRedundantRows;
  rows = needs.part_of(redundant ? workers_[thread].rows : shared_, columns);
  rows.bundle_rows = bundle_rows(kernels_, num_rows);
  const Range mine = redundant ? Range{0, num_rows} : share(num_rows, thread, pool_.num_threads());
  for (int i = mine.first; i < mine.last; i++) kernels_.quantise(normed(x, norm, i, columns, thread), rows, i);
  if (!redundant) return barrier(index, thread, Phase::kPrepare);
  if (log_) log_->mark(thread, index, Phase::kPrepare);
  return false;
}

bool Executor::run_step(const LinearStep& step, size_t index, int thread) {
  InputNeeds needs;
  for (const Projection& p : step.projections) needs.add(p.weight);
  QuantRows x;
  if (quantise(step.x, step.norm, step.projections[0].weight.columns, needs, index, thread, x)) return true;
  multiply_linear(step, x, index, thread);
  return false;
}

// All panels of all projections.
void Executor::multiply_linear(const LinearStep& step, const QuantRows& x, size_t index, int thread) {
  const int num_rows = rows_of(index);
  int total = 0;
  for (const Projection& p : step.projections) total += p.weight.num_panels();
  float* totals = workers_[thread].totals;
  const auto panel = [&](int i) {
    const Projection* p = step.projections.data();
    for (; i >= p->weight.num_panels(); p++) i -= p->weight.num_panels();
    const Matrix& w = p->weight;
    kernels_.multiply_panel(
        {w.data + static_cast<size_t>(i) * w.panel_bytes, w.type_a, w.type_b, &x, num_rows, totals});
    for (int r = 0; r < num_rows; r++) store_linear(step, *p, r, i * kPanelRows, totals + r * kPanelRows);
  };
  each_panel(total, num_rows, index, thread, panel);
}

// 32 columns of a row's output.
void Executor::store_linear(const LinearStep& step, const Projection& p, int row, int column, const float* totals) {
  const Buffer& out = buffers_[p.out];
  const int valid = std::min(kPanelRows, out.width - column);
  const float* residual = step.residual < 0 ? nullptr : buffers_[step.residual].row(row) + column;
  const float* bias = p.bias ? p.bias + column : nullptr;
  float padded[kPanelRows];
  float* y = valid == kPanelRows ? out.row(row) + column : padded;
  kernels_.finish_linear(totals, bias, step.activation, residual, y);
  if (valid < kPanelRows) std::memcpy(out.row(row) + column, padded, sizeof(float) * static_cast<size_t>(valid));
}

bool Executor::run_step(const GluStep& step, size_t index, int thread) {
  const int num_rows = rows_of(index);
  const Matrix& w = step.weight;
  InputNeeds needs;
  needs.add(w);
  QuantRows x;
  if (quantise(step.x, step.norm, w.columns, needs, index, thread, x)) return true;
  float* totals = workers_[thread].totals;
  const auto panel = [&](int i) {
    kernels_.multiply_panel(
        {w.data + static_cast<size_t>(i) * w.panel_bytes, w.type_a, w.type_b, &x, num_rows, totals});
    const Buffer& out = buffers_[step.out];
    const int column = i * kTileRows, valid = std::min(kTileRows, out.width - column);
    for (int r = 0; r < num_rows; r++) {
      float y[kTileRows];
      kernels_.finish_glu(totals + r * kPanelRows, step.activation, y);
      std::memcpy(out.row(r) + column, y, sizeof(float) * static_cast<size_t>(valid));
    }
  };
  each_panel(w.num_panels(), num_rows, index, thread, panel);
  return false;
}

double Executor::read_weights() {
  const auto started = std::chrono::steady_clock::now();
  pool_.run([&](int thread) {
    const auto read = [&](const Matrix& m, int num_panels = 0) {
      const Range mine = share(num_panels ? num_panels : m.num_panels(), thread, pool_.num_threads());
      kernels_.read_lines(m.data + mine.first * m.panel_bytes, (mine.last - mine.first) * m.panel_bytes);
    };
    for (const Step& step : program_.steps) {
      if (const auto* linear = std::get_if<LinearStep>(&step))
        for (const Projection& p : linear->projections) read(p.weight);
      if (const auto* glu = std::get_if<GluStep>(&step)) read(glu->weight);
      if (const auto* predicted = std::get_if<PredictedStep>(&step)) read(predicted->linear.projections[0].weight);
      if (const auto* up = std::get_if<UpStep>(&step)) read(up->weight);
      if (const auto* down = std::get_if<DownStep>(&step)) read(down->linear.projections[0].weight);
      if (const auto* glu = std::get_if<ExpertGluStep>(&step)) read(glu->weight, glu->input.panels_used(glu->weight));
      if (const auto* gate = std::get_if<ExpertGateStep>(&step))
        read(gate->weight, gate->input.panels_used(gate->weight));
      if (const auto* up = std::get_if<ExpertUpStep>(&step)) read(up->weight, up->input.panels_used(up->weight));
      if (const auto* down = std::get_if<ExpertDownStep>(&step))
        read(down->weight, down->input.panels_used(down->weight));
    }
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

bool Executor::run_step(const AddNormStep& step, size_t index, int thread) {
  const Range rows = share(rows_of(index), thread, pool_.num_threads());
  const int width = buffers_[step.out].width;
  for (int i = rows.first; i < rows.last; i++) {
    const float *a = buffers_[step.a].row(i), *b = buffers_[step.b].row(i);
    float* out = buffers_[step.out].row(i);
    if (step.norm.weight) {
      kernels_.add_norm(a, b, step.norm.weight, width, step.norm.eps, out);
    } else {
      kernels_.add(a, b, width, out);
    }
  }
  return false;
}

bool Executor::run_step(const SelectStep& step, size_t, int thread) {
  const Range rows = share(head_count_, thread, pool_.num_threads());
  const size_t bytes = sizeof(float) * buffers_[step.x].stride;
  for (int i = rows.first; i < rows.last; i++)
    std::memcpy(buffers_[step.out].row(i), buffers_[step.x].row(batch_.logit_rows[head_first_ + i]), bytes);
  return false;
}

// --- attention ------------------------------------------------------------------------------------------------------

void Executor::append_tokens(const AttentionStep& step, int thread) {
  const int heads = step.num_heads + step.num_kv_heads;
  const Range items = share(batch_.num_tokens * heads, thread, pool_.num_threads());
  const KvPool& pool = program_.pools[step.state];
  size_t s = 0;
  for (int item = items.first; item < items.last; item++) {
    const int token = item / heads, head = item % heads, position = positions_[token];
    while (token >= batch_.sequences[s].start + batch_.sequences[s].num_new) s++;
    const bool is_query = head < step.num_heads;
    const Norm& norm = is_query ? step.q_norm : step.k_norm;
    const RopeArgs rope{step.rope_table + static_cast<size_t>(position) * step.rope_dims, step.rope_dims, step.head_dim,
                        norm.weight, norm.eps};
    if (is_query) {
      kernels_.rope(rope, buffers_[step.q].row(token) + head * step.head_dim);
      continue;
    }
    const int kv_head = head - step.num_heads;
    float* k = buffers_[step.k].row(token) + kv_head * step.head_dim;
    kernels_.rope(rope, k);
    const int page = batch_.sequences[s].page_tables[step.state][position / kPageTokens];
    kernels_.append(pool.type, k, buffers_[step.v].row(token) + kv_head * step.head_dim, step.head_dim,
                    position % kPageTokens,
                    pool.head(step.slot, kv_head) + static_cast<size_t>(page) * pool.page_bytes());
  }
}

int Executor::tile_tokens(const AttentionStep& step) const {
  const int group = step.num_heads / step.num_kv_heads;
  return std::max(1, kTileQueryRows / group);
}

int Executor::num_tiles(const AttentionStep& step) const {
  int tiles = 0;
  for (const SequenceView& s : batch_.sequences) tiles += (s.num_new + tile_tokens(step) - 1) / tile_tokens(step);
  return tiles;
}

// Task = (tile, KV head); tiles run through the sequences in order.
AttendArgs Executor::tile_args(const AttentionStep& step, int task, int thread) const {
  const int head = task % step.num_kv_heads, size = tile_tokens(step);
  int tile = task / step.num_kv_heads;
  const SequenceView* s = batch_.sequences.data();
  for (; tile >= (s->num_new + size - 1) / size; s++) tile -= (s->num_new + size - 1) / size;
  const int group = step.num_heads / step.num_kv_heads, first = tile * size, row = s->start + first;
  const KvPool& pool = program_.pools[step.state];
  const size_t column = static_cast<size_t>(head) * group * step.head_dim;
  return {buffers_[step.q].row(row) + column,
          buffers_[step.out].row(row) + column,
          buffers_[step.q].stride,
          std::min(size, s->num_new - first),
          group,
          step.head_dim,
          s->num_cached + first,
          step.window,
          step.scale,
          s->page_tables[step.state],
          pool.type,
          pool.head(step.slot, head),
          pool.page_bytes(),
          workers_[thread].attend};
}

// Too few tiles to share among the threads, and more than one block: blocks become tasks of their own.
bool Executor::should_split(const AttentionStep& step) const {
  const int last = *std::max_element(positions_.begin(), positions_.end());
  return last >= kAttentionBlock && num_tiles(step) * step.num_kv_heads < 4 * pool_.num_threads();
}

void Executor::attend_tiles(const AttentionStep& step, size_t index, int thread) {
  const int total = num_tiles(step) * step.num_kv_heads;
  for (int task; (task = counters_[index].next.fetch_add(1, std::memory_order_relaxed)) < total;)
    kernels_.attend(tile_args(step, total - 1 - task, thread));  // the longest rows first
}

bool Executor::attend_split(const AttentionStep& step, size_t index, int thread) {
  const int total = num_tiles(step) * step.num_kv_heads, group = step.num_heads / step.num_kv_heads;
  const int blocks = *std::max_element(positions_.begin(), positions_.end()) / kAttentionBlock + 1;
  const size_t floats = partial_floats(step.head_dim);
  const size_t task_floats = static_cast<size_t>(tile_tokens(step)) * group * floats;  // rows of one tile, one block
  const auto place = [&](int task, int block) {
    return partials_.data() + (static_cast<size_t>(task) * blocks + block) * task_floats;
  };
  for (int item; (item = counters_[index].next.fetch_add(1, std::memory_order_relaxed)) < total * blocks;) {
    const int task = item / blocks, block = item % blocks;
    kernels_.attend_block(tile_args(step, task, thread), block, place(task, block));
  }
  if (barrier(index, thread, Phase::kWork)) return true;
  const Range mine = share(total, thread, pool_.num_threads());
  for (int task = mine.first; task < mine.last; task++) {
    const AttendArgs args = tile_args(step, task, thread);
    for (int r = 0; r < args.num_tokens * group; r++) {
      float* out = args.out + r / group * args.token_stride + static_cast<size_t>(r % group) * args.head_dim;
      kernels_.merge_blocks(place(task, 0) + r * floats, task_floats, blocks, args.head_dim, out);
    }
  }
  return false;
}

bool Executor::run_step(const AttentionStep& step, size_t index, int thread) {
  append_tokens(step, thread);
  if (barrier(index, thread, Phase::kPrepare)) return true;
  if (should_split(step)) return attend_split(step, index, thread);
  attend_tiles(step, index, thread);
  return false;
}

}  // namespace isotherm
