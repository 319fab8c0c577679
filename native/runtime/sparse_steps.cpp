// Steps that compute the neurons that fire. Every thread finds out for itself which those are: from the same numbers,
// so that all agree.
#include <cstring>

#include "firing.h"
#include "panels.h"

namespace isotherm {

// A thread's share of the `count` neurons that are needed, 32 at a time: finish(row, ids, how many, totals) writes
// them. Zeros between them.
template <class Finish>
void Executor::rows_of_neurons(const RowMatrix& matrix, const Buffer& out, const QuantRows& x, int count, int num_rows,
                               int thread, const Finish& finish) {
  const int32_t* ids = workers_[thread].ids;
  float* totals = workers_[thread].totals;
  const Range mine = share(count, thread, pool_.num_threads());
  const auto place = [&](int i) { return i < count ? ids[i] : out.width; };
  const int begin = thread == 0 ? 0 : place(mine.first);
  const int end = thread + 1 == pool_.num_threads() ? out.width : place(mine.last);
  for (int r = 0; r < num_rows; r++) std::fill(out.row(r) + begin, out.row(r) + end, 0.0f);
  for (int first = mine.first; first < mine.last; first += kPanelRows) {
    const int valid = std::min(kPanelRows, mine.last - first);
    const int num_next = std::min(kPanelRows, mine.last - first - valid);
    kernels_.multiply_rows({matrix.rows, matrix.row_bytes, matrix.type, ids + first, valid, ids + first + valid,
                            num_next, &x, num_rows, totals});
    for (int r = 0; r < num_rows; r++) finish(r, ids + first, valid, totals + r * kPanelRows);
  }
}

bool Executor::run_step(const PredictedStep& step, size_t index, int thread) {
  const int num_rows = rows_of(index);
  const Projection& p = step.linear.projections[0];
  const Buffer& out = buffers_[p.out];
  const int count = is_sparse(num_rows) ? find_predicted(step, index, thread) : 0;
  InputNeeds needs;
  needs.add(p.weight);
  QuantRows x;
  if (quantise(step.linear.x, step.linear.norm, p.weight.columns, needs, index, thread, x)) return true;
  if (!is_sparse(num_rows) || count > most_active(index, num_rows)) {
    multiply_predicted(step, x, index, thread);
    return false;
  }
  rows_of_neurons(step.rows, out, x, count, num_rows, thread,
                  [&](int r, const int32_t* some, int valid, float* totals) {
                    const float* scores = scores_of(step, index, r);
                    float bias[kPanelRows] = {}, y[kPanelRows];
                    if (p.bias)
                      for (int i = 0; i < valid; i++) bias[i] = p.bias[some[i]];
                    kernels_.finish_linear(totals, p.bias ? bias : nullptr, step.linear.activation, nullptr, y);
                    for (int i = 0; i < valid; i++)
                      if (!scores || !(scores[some[i]] < step.threshold)) out.row(r)[some[i]] = y[i];
                  });
  return false;
}

// Neurons that are predicted in any row, into the thread's ids; all, where a row may leave none out.
int Executor::find_predicted(const PredictedStep& step, size_t index, int thread) {
  const int width = buffers_[step.scores].width;
  uint8_t* fires = workers_[thread].fires;
  std::fill(fires, fires + width, uint8_t{0});
  for (int r = 0; r < rows_of(index); r++) {
    const float* scores = scores_of(step, index, r);
    if (!scores) std::fill(fires, fires + width, uint8_t{1});
    if (scores)
      for (int i = 0; i < width; i++) fires[i] |= !(scores[i] < step.threshold);
  }
  return list_neurons(fires, width, 0, workers_[thread].ids);
}

// Of all neurons, those that are not predicted among them, which become 0.
void Executor::multiply_predicted(const PredictedStep& step, const QuantRows& x, size_t index, int thread) {
  const int num_rows = rows_of(index);
  const Projection& p = step.linear.projections[0];
  const Matrix& w = p.weight;
  const Buffer& out = buffers_[p.out];
  float* totals = workers_[thread].totals;
  each_panel(w.num_panels(), num_rows, index, thread, [&](int i) {
    kernels_.multiply_panel(
        {w.data + static_cast<size_t>(i) * w.panel_bytes, w.type_a, w.type_b, &x, num_rows, totals});
    const int first = i * kPanelRows, end = std::min(first + kPanelRows, out.width);
    for (int r = 0; r < num_rows; r++) {
      store_linear(step.linear, p, r, first, totals + r * kPanelRows);
      if (const float* scores = scores_of(step, index, r)) {
        float* y = out.row(r);
        for (int j = first; j < end; j++) y[j] = scores[j] < step.threshold ? 0.0f : y[j];
      }
    }
  });
}

bool Executor::run_step(const UpStep& step, size_t index, int thread) {
  const int num_rows = rows_of(index);
  const Buffer &gate = buffers_[step.gate], &out = buffers_[step.out];
  const int count = is_sparse(num_rows) ? find_firing(step, num_rows, thread) : 0;
  const Matrix& w = step.weight;
  InputNeeds needs;
  needs.add(w);
  QuantRows x;
  if (quantise(step.x, step.norm, w.columns, needs, index, thread, x)) return true;
  if (is_sparse(num_rows) && count <= most_active(index, num_rows)) {
    rows_of_neurons(step.rows, out, x, count, num_rows, thread,
                    [&](int r, const int32_t* some, int valid, float* rows) {
                      finish_firing(some, 0, valid, rows, step.activation, gate.row(r), out.row(r));
                    });
    return false;
  }
  float* totals = workers_[thread].totals;
  each_panel(w.num_panels(), num_rows, index, thread, [&](int i) {
    kernels_.multiply_panel(
        {w.data + static_cast<size_t>(i) * w.panel_bytes, w.type_a, w.type_b, &x, num_rows, totals});
    const int column = i * kPanelRows, count = std::min(kPanelRows, out.width - column);
    for (int r = 0; r < num_rows; r++)
      finish_up(count, totals + r * kPanelRows, step.activation, gate.row(r) + column, out.row(r) + column);
  });
  return false;
}

// Hidden values of some neurons, whose ids count from that of the first, by what their rows of up gave.
void Executor::finish_firing(const int32_t* ids, int first_id, int count, const float* totals, Activation activation,
                             const float* gate, float* out) {
  float gates[kPanelRows], y[kPanelRows];
  for (int i = 0; i < count; i++) gates[i] = gate[ids[i] - first_id];
  finish_up(count, totals, activation, gates, y);
  for (int i = 0; i < count; i++) out[ids[i] - first_id] = y[i];
}

// At most a panel of hidden values.
void Executor::finish_up(int count, const float* totals, Activation activation, const float* gate, float* out) {
  for (int tile = 0; tile < count; tile += kTileRows) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(std::min(kTileRows, count - tile));
    float pair[kPanelRows] = {}, y[kTileRows];
    std::memcpy(pair, gate + tile, bytes);
    std::memcpy(pair + kTileRows, totals + tile, bytes);
    kernels_.finish_glu(pair, activation, y);
    std::memcpy(out + tile, y, bytes);
  }
}

// Neurons that fire in any row, into the thread's ids.
int Executor::find_firing(const UpStep& step, int num_rows, int thread) {
  const Buffer& gate = buffers_[step.gate];
  uint8_t* fires = workers_[thread].fires;
  std::fill(fires, fires + gate.width, uint8_t{0});
  for (int r = 0; r < num_rows; r++) mark_firing(gate.row(r), gate.width, step.fires_below_zero, fires);
  return list_neurons(fires, gate.width, 0, workers_[thread].ids);
}

bool Executor::run_step(const TrimStep& step, size_t index, int thread) {
  const Buffer &x = buffers_[step.x], &out = buffers_[step.out];
  const int num_rows = rows_of(index), units = static_cast<int>(x.stride / 64);
  // Of few rows threads share the columns, so that those of one row do not wait for each other.
  const bool is_few = num_rows < pool_.num_threads();
  const Range rows = is_few ? Range{0, num_rows} : share(num_rows, thread, pool_.num_threads());
  const Range mine = is_few ? share(units, thread, pool_.num_threads()) : Range{0, units};
  for (int r = rows.first; r < rows.last; r++) {
    if (is_trimmed(index, r)) {
      kernels_.trim({x.row(r), x.width, step.activation, step.thresholds, step.deviations, 64 * mine.first,
                     64 * mine.last, out.row(r)});
    } else {
      std::copy(x.row(r) + 64 * mine.first, x.row(r) + 64 * mine.last, out.row(r) + 64 * mine.first);
    }
  }
  return false;
}

bool Executor::run_step(const DownStep& step, size_t index, int thread) {
  const int num_rows = rows_of(index);
  if (!is_sparse(num_rows)) return run_step(step.linear, index, thread);
  const Projection& p = step.linear.projections[0];
  InputNeeds needs;
  needs.add(p.weight);
  QuantRows x;
  if (quantise(step.linear.x, step.linear.norm, p.weight.columns, needs, index, thread, x)) return true;
  if (!is_sound(x, num_rows) || count_live(x, num_rows) > most_active(index, num_rows)) {
    multiply_linear(step.linear, x, index, thread);
  } else {
    down_of(step, x, num_rows, thread);
  }
  return false;
}

// A thread's share of the outputs.
void Executor::down_of(const DownStep& step, const QuantRows& x, int num_rows, int thread) {
  const NeuronMatrix& n = step.neurons;
  float* sums = workers_[thread].sums;
  const Range outputs = share_outputs(n, thread, pool_.num_threads());
  add_blocks(n, x, num_rows, outputs, sums);
  const Projection& p = step.linear.projections[0];
  for (int r = 0; r < num_rows; r++)
    for (int column = outputs.first; column < std::min(outputs.last, buffers_[p.out].width); column += kPanelRows)
      store_linear(step.linear, p, r, column, sums + r * n.outputs + column);
}

// Block after block into sums [row][outputs]: what a block's neurons have is read once for all rows.
void Executor::add_blocks(const NeuronMatrix& n, const QuantRows& x, int num_rows, Range outputs, float* sums) {
  if (outputs.first == outputs.last) return;
  for (int r = 0; r < num_rows; r++)
    std::fill(sums + r * n.outputs + outputs.first, sums + r * n.outputs + outputs.last, 0.0f);
  const int num_blocks = x.columns / kBlockColumns;
  LiveBlock live[2][kMaxFewRows];
  const auto find = [&](int block, LiveBlock* to) {
    for (bool found = false; block < num_blocks; block++) {
      for (int r = 0; r < num_rows; r++) found |= to[r].collect(x, block, r, num_rows, n.form.is_halved);
      if (found) break;
    }
    return block;
  };
  int now = 0;
  for (int block = find(0, live[now]), next; block < num_blocks; block = next, now = 1 - now) {
    next = find(block + 1, live[1 - now]);
    const size_t planes = static_cast<size_t>(block) * n.block_bytes;
    for (int r = 0; r < num_rows; r++) {
      const LiveBlock &one = live[now][r], &soon = live[1 - now][r];
      if (one.ends[1] == 0) continue;
      kernels_.add_neurons({n.form,
                            n.codes,
                            n.row_bytes,
                            one.ids,
                            one.codes,
                            {one.ends[0], one.ends[1]},
                            soon.ids,
                            next < num_blocks ? kQuadBytes * soon.ends[1] : 0,
                            n.scales + planes,
                            n.minima + planes,
                            n.block_bytes / 2,
                            static_cast<size_t>(next - block) * n.block_bytes,
                            {one.sums[0], one.sums[1]},
                            x.scales[block * num_rows + r],
                            outputs.first,
                            outputs.last,
                            sums + r * n.outputs});
    }
  }
}

}  // namespace isotherm
