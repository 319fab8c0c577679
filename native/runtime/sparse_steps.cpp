// Steps that compute the neurons that fire. Every thread finds out for itself which those are: from the same numbers,
// so that all agree.
#include <cmath>
#include <cstring>

#include "panels.h"

namespace isotherm {
namespace {

constexpr int kOutputUnit = 128;  // of down that a thread takes
constexpr int kQuadBytes = 4;

// The neurons of a block whose code is not zero, moved together into quads, each half of the block by itself where
// halves have scales of their own.
struct LiveBlock {
  int ends[2];    // of the quads of each half; of all
  float sums[2];  // of the codes
  int32_t ids[kBlockColumns];
  int8_t codes[kBlockColumns];

  // False: there are none.
  bool collect(const QuantRows& x, int block, int row, int num_rows, bool is_halved) {
    constexpr int kBlockQuads = kBlockColumns / kQuadBytes;
    const int num_parts = is_halved ? 2 : 1, part_quads = kBlockQuads / num_parts;
    int count = 0;
    for (int part = 0; part < 2; part++) {
      int sum = 0;
      for (int q = part * part_quads; q < std::min(kBlockQuads, (part + 1) * part_quads); q++) {
        const int first = block * kBlockQuads + q;
        const int8_t* quad = x.codes + static_cast<size_t>(first * num_rows + row) * kQuadBytes;
        int32_t all;
        std::memcpy(&all, quad, sizeof all);
        if (all == 0) continue;
        for (int i = 0; i < kQuadBytes; i++)
          if (quad[i] != 0) {
            ids[count] = first * kQuadBytes + i;
            codes[count++] = quad[i];
            sum += quad[i];
          }
      }
      for (; count % kQuadBytes; count++) {
        ids[count] = ids[count - 1];
        codes[count] = 0;
      }
      ends[part] = count / kQuadBytes;
      sums[part] = static_cast<float>(sum);
    }
    return count > 0;
  }
};

// Neurons whose code is not zero in any row.
int count_live(const QuantRows& x, int num_rows) {
  int count = 0;
  for (int quad = 0; quad < x.columns / kQuadBytes; quad++) {
    uint32_t any = 0, codes;
    for (int r = 0; r < num_rows; r++) {
      std::memcpy(&codes, x.codes + static_cast<size_t>(quad * num_rows + r) * kQuadBytes, sizeof codes);
      any |= codes;
    }
    for (; any; any >>= 8) count += (any & 255) != 0;
  }
  return count;
}

// Ids of the neurons that fire, rising; how many. There is room for one more than all.
int list_neurons(const uint8_t* fires, int width, int32_t* ids) {
  int count = 0;
  for (int i = 0; i < width; i++) {
    ids[count] = i;
    count += fires[i];
  }
  return count;
}

}  // namespace

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
  return list_neurons(fires, width, workers_[thread].ids);
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
                      for (int tile = 0; tile < valid; tile += kTileRows) {
                        const int num = std::min(kTileRows, valid - tile);
                        float pair[kPanelRows] = {}, y[kTileRows];
                        for (int i = 0; i < num; i++) pair[i] = gate.row(r)[some[tile + i]];
                        std::memcpy(pair + kTileRows, rows + tile, sizeof(float) * static_cast<size_t>(num));
                        kernels_.finish_glu(pair, step.activation, y);
                        for (int i = 0; i < num; i++) out.row(r)[some[tile + i]] = y[i];
                      }
                    });
    return false;
  }
  float* totals = workers_[thread].totals;
  each_panel(w.num_panels(), num_rows, index, thread, [&](int i) {
    kernels_.multiply_panel(
        {w.data + static_cast<size_t>(i) * w.panel_bytes, w.type_a, w.type_b, &x, num_rows, totals});
    for (int r = 0; r < num_rows; r++)
      for (int column = i * kPanelRows; column < std::min((i + 1) * kPanelRows, out.width); column += kTileRows) {
        const size_t bytes = sizeof(float) * static_cast<size_t>(std::min(kTileRows, out.width - column));
        float pair[kPanelRows] = {}, y[kTileRows];
        std::memcpy(pair, gate.row(r) + column, bytes);
        std::memcpy(pair + kTileRows, totals + r * kPanelRows + column % kPanelRows, bytes);
        kernels_.finish_glu(pair, step.activation, y);
        std::memcpy(out.row(r) + column, y, bytes);
      }
  });
  return false;
}

// Neurons that fire in any row, into the thread's ids; what is not a number fires, so that it is seen.
int Executor::find_firing(const UpStep& step, int num_rows, int thread) {
  const Buffer& gate = buffers_[step.gate];
  uint8_t* fires = workers_[thread].fires;
  std::fill(fires, fires + gate.width, uint8_t{0});
  for (int r = 0; r < num_rows; r++) {
    const float* row = gate.row(r);
    if (step.fires_below_zero) {
      for (int i = 0; i < gate.width; i++) fires[i] |= row[i] != 0.0f;
    } else {
      for (int i = 0; i < gate.width; i++) fires[i] |= !(row[i] <= 0.0f);
    }
  }
  return list_neurons(fires, gate.width, workers_[thread].ids);
}

void Executor::set_most_active(size_t step, int num_rows, int most_active) {
  int& bound = most_active_[step][static_cast<size_t>(num_rows - 1)];
  if (bound >= 0) bound = most_active;
}

double Executor::time_neurons(size_t step, int num_rows, int num_active, bool is_alone) {
  const auto* up = std::get_if<UpStep>(&program_.steps[step]);
  const auto* predicted = std::get_if<PredictedStep>(&program_.steps[step]);
  const auto* down = std::get_if<DownStep>(&program_.steps[step]);
  const Buffer& firing = buffers_[up ? up->gate : predicted ? predicted->scores : down->linear.x];
  const float fired = predicted ? predicted->threshold : 1.0f, silent = predicted ? -INFINITY : 0.0f;
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < firing.width; i++) {
      // spread evenly, and without a pattern: the same for all rows
      const bool fires = static_cast<int64_t>(static_cast<uint32_t>(i) * 2654435761u) * firing.width >> 32 < num_active;
      firing.row(r)[i] = fires ? fired + static_cast<float>(i % 7) : silent;
    }
  if (up || predicted)
    for (int r = 0; r < num_rows; r++) {
      const Buffer& x = buffers_[up ? up->x : predicted->linear.x];
      std::fill_n(x.row(r), x.width, 1.0f);
    }
  static constexpr int32_t kRows[kMaxFewRows] = {0, 1, 2, 3, 4, 5, 6, 7};
  batch_.num_tokens = batch_.num_logit_rows = head_count_ = num_rows;
  batch_.logit_rows = kRows;
  head_first_ = 0;
  trimmed_.assign(static_cast<size_t>(num_rows), 1);
  const int bound = most_active(step, num_rows);
  set_most_active(step, num_rows, is_alone ? firing.width : -1);
  const double before_s = busy_s_;
  walk(step, step + 1, nullptr);
  most_active_[step][static_cast<size_t>(num_rows - 1)] = bound;
  return busy_s_ - before_s;
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
  bool is_sound = true;  // what is not a number must reach every output
  for (int i = 0; i < x.columns / kBlockColumns * num_rows; i++) is_sound &= x.scales[i] - x.scales[i] == 0.0f;
  if (!is_sound || count_live(x, num_rows) > most_active(index, num_rows)) {
    multiply_linear(step.linear, x, index, thread);
  } else {
    down_of(step, x, num_rows, thread);
  }
  return false;
}

// A thread's share of the outputs, block after block: what a block's neurons have is read once for all rows.
void Executor::down_of(const DownStep& step, const QuantRows& x, int num_rows, int thread) {
  const NeuronMatrix& n = step.neurons;
  float* sums = workers_[thread].sums;
  const Range units = share(n.outputs / kOutputUnit, thread, pool_.num_threads());
  const int begin = units.first * kOutputUnit, end = units.last * kOutputUnit;
  if (begin == end) return;
  for (int r = 0; r < num_rows; r++) std::fill(sums + r * n.outputs + begin, sums + r * n.outputs + end, 0.0f);
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
                            begin,
                            end,
                            sums + r * n.outputs});
    }
  }
  const Projection& p = step.linear.projections[0];
  for (int r = 0; r < num_rows; r++)
    for (int column = begin; column < std::min(end, buffers_[p.out].width); column += kPanelRows)
      store_linear(step.linear, p, r, column, sums + r * n.outputs + column);
}

}  // namespace isotherm
