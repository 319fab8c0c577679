// Steps that compute the neurons that fire. Every thread finds out for itself which those are: from the same numbers,
// so that all agree.
#include <cstring>

#include "panels.h"

namespace isotherm {
namespace {

constexpr int kOutputUnit = 128;  // of down that a thread takes
constexpr int kQuadBytes = 4;

}  // namespace

bool Executor::run_step(const UpStep& step, size_t index, int thread) {
  const int num_rows = rows_of(index);
  const Buffer &gate = buffers_[step.gate], &out = buffers_[step.out];
  int32_t* ids = workers_[thread].ids;
  int count = 0;
  if (is_sparse(num_rows))
    for (int i = 0; i < gate.width; i++) {  // what is not a number fires, so that it is seen
      bool fires = false;
      for (int r = 0; r < num_rows; r++) fires |= !(gate.row(r)[i] <= 0.0f);
      ids[count] = i;
      count += fires;
    }
  const Matrix& w = step.weight;
  InputNeeds needs;
  needs.add(w);
  QuantRows x;
  if (quantise(step.x, step.norm, w.columns, needs, index, thread, x)) return true;
  if (is_sparse(num_rows) && count <= step.most_active) {
    up_of(step, x, count, num_rows, thread);
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

// A thread's share of the `count` neurons that fire, and of the zeros between them.
void Executor::up_of(const UpStep& step, const QuantRows& x, int count, int num_rows, int thread) {
  const Buffer &gate = buffers_[step.gate], &out = buffers_[step.out];
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
    kernels_.multiply_rows({step.rows.rows, step.rows.row_bytes, step.rows.type, ids + first, valid,
                            ids + first + valid, num_next, &x, num_rows, totals});
    for (int r = 0; r < num_rows; r++)
      for (int tile = 0; tile < valid; tile += kTileRows) {
        const int some = std::min(kTileRows, valid - tile);
        float pair[kPanelRows] = {}, y[kTileRows];
        for (int i = 0; i < some; i++) pair[i] = gate.row(r)[ids[first + tile + i]];
        std::memcpy(pair + kTileRows, totals + r * kPanelRows + tile, sizeof(float) * static_cast<size_t>(some));
        kernels_.finish_glu(pair, step.activation, y);
        for (int i = 0; i < some; i++) out.row(r)[ids[first + tile + i]] = y[i];
      }
  }
}

bool Executor::run_step(const DownStep& step, size_t index, int thread) {
  const int num_rows = rows_of(index);
  if (!is_sparse(num_rows)) return run_step(step.linear, index, thread);
  const Projection& p = step.linear.projections[0];
  InputNeeds needs;
  needs.add(p.weight);
  QuantRows x;
  if (quantise(step.linear.x, step.linear.norm, p.weight.columns, needs, index, thread, x)) return true;
  int count = 0;
  for (int i = 0; i < p.weight.columns * num_rows; i++) count += x.codes[i] != 0;
  bool is_sound = true;  // what is not a number must reach every output
  for (int i = 0; i < x.columns / kBlockColumns * num_rows; i++) is_sound &= x.scales[i] - x.scales[i] == 0.0f;
  if (count > step.most_active * num_rows || !is_sound) {
    multiply_linear(step.linear, x, index, thread);
    return false;
  }
  for (int r = 0; r < num_rows; r++) down_of(step, x, r, num_rows, thread);
  return false;
}

// A thread's share of the outputs of one row, block after block.
void Executor::down_of(const DownStep& step, const QuantRows& x, int row, int num_rows, int thread) {
  const NeuronMatrix& n = step.neurons;
  Worker& worker = workers_[thread];
  const Range units = share(n.outputs / kOutputUnit, thread, pool_.num_threads());
  const int begin = units.first * kOutputUnit, end = units.last * kOutputUnit;
  if (begin == end) return;
  std::fill(worker.sums + begin, worker.sums + end, 0.0f);
  constexpr int kBlockQuads = kBlockColumns / kQuadBytes;
  const int num_blocks = x.columns / kBlockColumns;
  // Quads of the blocks that have any, of each the neurons whose code is not zero, moved together.
  int32_t* ids = worker.ids;
  int8_t* codes = worker.activations;
  const auto collect = [&](int block, int32_t* to, int8_t* code_to) {
    int count = 0;
    for (int q = 0; q < kBlockQuads; q++) {
      const int8_t* quad = x.codes + static_cast<size_t>((block * kBlockQuads + q) * num_rows + row) * kQuadBytes;
      int32_t all;
      std::memcpy(&all, quad, sizeof all);
      if (all == 0) continue;
      for (int i = 0; i < kQuadBytes; i++)
        if (quad[i] != 0) {
          to[count] = (block * kBlockQuads + q) * kQuadBytes + i;
          code_to[count++] = quad[i];
        }
    }
    const int found = count;
    for (; count % kQuadBytes; count++) {
      to[count] = to[found - 1];
      code_to[count] = 0;
    }
    return count;
  };
  int block = 0, count = 0;
  const auto next_live = [&](int from, int32_t* to, int8_t* code_to) {
    for (count = 0; from < num_blocks && (count = collect(from, to, code_to)) == 0; from++) {
    }
    return from;
  };
  block = next_live(0, ids, codes);
  while (block < num_blocks) {
    const int num_quads = count / kQuadBytes, this_block = block;
    int32_t* next_ids = ids == worker.ids ? worker.ids + kBlockColumns : worker.ids;
    int8_t* next_codes = codes == worker.activations ? worker.activations + kBlockColumns : worker.activations;
    block = next_live(block + 1, next_ids, next_codes);
    const size_t at = static_cast<size_t>(this_block * num_rows + row), plane = static_cast<size_t>(this_block);
    kernels_.add_neurons({n.form, n.codes, n.row_bytes, ids, codes, num_quads, next_ids, count,
                          n.scales + plane * n.block_bytes, n.minima + plane * n.block_bytes, x.sums[at], x.scales[at],
                          begin, end, worker.sums});
    ids = next_ids;
    codes = next_codes;
  }
  const Projection& p = step.linear.projections[0];
  for (int column = begin; column < std::min(end, buffers_[p.out].width); column += kPanelRows)
    store_linear(step.linear, p, row, column, worker.sums + column);
}

}  // namespace isotherm
