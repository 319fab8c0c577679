// Steps that compute the neurons that fire within the experts of each row. A neuron's id counts through all experts.
// As everywhere, every thread finds out for itself who computes what.
#include <algorithm>

#include "firing.h"
#include "panels.h"

namespace isotherm {

bool Executor::run_step(const ExpertGateStep& step, size_t index, int thread) {
  const Matrix& w = step.weight;
  QuantRows rows;
  if (gather(step.input, w, index, thread, rows)) return true;
  const int num_used = step.input.num_used, ffn_size = w.rows / step.input.num_experts;
  each_expert_panel(step.input, w, rows, index, thread, [&](int member, int panel, const float* totals) {
    std::copy(totals, totals + kPanelRows, of_member(step.out, member, num_used, ffn_size) + panel * kPanelRows);
  });
  return false;
}

bool Executor::run_step(const ExpertUpStep& step, size_t index, int thread) {
  const Matrix& w = step.weight;
  const int num_rows = rows_of(index), num_used = step.input.num_used, ffn_size = step.ffn_size();
  QuantRows rows;
  if (gather(step.input, w, index, thread, rows)) return true;
  if (is_sparse(num_rows)) {
    const int count = find_firing(step, thread);
    if (is_few(count, index, num_used, thread)) {
      up_of_experts(step, rows, count, thread);
      return false;
    }
  }
  each_expert_panel(step.input, w, rows, index, thread, [&](int member, int panel, const float* totals) {
    const int column = panel * kPanelRows;
    finish_up(kPanelRows, totals, step.activation, of_member(step.gate, member, num_used, ffn_size) + column,
              of_member(step.out, member, num_used, ffn_size) + column);
  });
  return false;
}

// Neurons that fire in any row of their expert, into the thread's ids.
int Executor::find_firing(const ExpertUpStep& step, int thread) {
  const Worker& worker = workers_[thread];
  const int ffn_size = step.ffn_size();
  int count = 0;
  for (int i = 0; i < worker.groups.count; i++) {
    const ExpertGroup& group = worker.groups.groups[i];
    std::fill(worker.fires, worker.fires + ffn_size, uint8_t{0});
    for (int r = 0; r < group.count; r++)
      mark_firing(of_member(step.gate, worker.groups.members[group.first + r], step.input.num_used, ffn_size), ffn_size,
                  step.fires_below_zero, worker.fires);
    count += list_neurons(worker.fires, ffn_size, group.expert * ffn_size, worker.ids + count);
  }
  return count;
}

// A thread's share of the `count` neurons that are needed. Zeros between them.
void Executor::up_of_experts(const ExpertUpStep& step, const QuantRows& rows, int count, int thread) {
  const Worker& worker = workers_[thread];
  const ExpertGroups& found = worker.groups;
  const int num_used = step.input.num_used, ffn_size = step.ffn_size(), num_ids = step.weight.rows;
  const Range mine = share(count, thread, pool_.num_threads());
  const int begin = thread == 0 ? 0 : mine.first < count ? worker.ids[mine.first] : num_ids;
  const int end = thread + 1 == pool_.num_threads() || mine.last == count ? num_ids : worker.ids[mine.last];
  for (int i = 0; i < found.count; i++) {
    const ExpertGroup& group = found.groups[i];
    const int first_id = group.expert * ffn_size;
    const int low = std::clamp(begin - first_id, 0, ffn_size), high = std::clamp(end - first_id, 0, ffn_size);
    for (int r = 0; r < group.count; r++) {
      float* out = of_member(step.out, found.members[group.first + r], num_used, ffn_size);
      std::fill(out + low, out + std::max(low, high), 0.0f);
    }
  }
  for (int first = mine.first, valid; first < mine.last; first += valid) {
    const int32_t* ids = worker.ids + first;
    const ExpertGroup& group = found.groups[found.by_expert[ids[0] / ffn_size]];
    const int first_id = group.expert * ffn_size, most = std::min(kPanelRows, mine.last - first);
    valid = static_cast<int>(std::lower_bound(ids, ids + most, first_id + ffn_size) - ids);
    const QuantRows x = rows_from(rows, group.input_first, group.bundle_rows);
    kernels_.multiply_rows({step.rows.rows, step.rows.row_bytes, step.rows.type, ids, valid, ids + valid,
                            std::min(kPanelRows, mine.last - first - valid), &x, group.count, worker.totals});
    for (int r = 0; r < group.count; r++) {
      const int member = found.members[group.first + r];
      finish_firing(ids, first_id, valid, worker.totals + r * kPanelRows, step.activation,
                    of_member(step.gate, member, num_used, ffn_size), of_member(step.out, member, num_used, ffn_size));
    }
  }
}

// Whether the neurons whose code is not zero are computed alone.
bool Executor::has_few(const ExpertDownStep& step, const QuantRows& rows, size_t index, int thread) {
  const ExpertGroups& found = workers_[thread].groups;
  const int num_rows = rows_of(index);
  if (!is_sparse(num_rows) || !step.neurons.outputs || !is_sound(rows, num_rows * step.input.num_used)) return false;
  int count = 0;
  for (int i = 0; i < found.count; i++) {
    const ExpertGroup& group = found.groups[i];
    count += count_live(rows_from(rows, group.input_first, group.bundle_rows), group.count);
  }
  return is_few(count, index, step.input.num_used, thread);
}

// A thread's share of the outputs, expert by expert, and then what they say together.
void Executor::down_of_experts(const ExpertDownStep& step, const QuantRows& rows, size_t index, int thread) {
  const Worker& worker = workers_[thread];
  const NeuronMatrix& first = step.neurons;
  const Range outputs = share_outputs(first, thread, pool_.num_threads());
  for (int i = 0; i < worker.groups.count; i++) {
    const ExpertGroup& group = worker.groups.groups[i];
    const size_t at = static_cast<size_t>(group.expert) * step.expert_bytes;
    NeuronMatrix neurons = first;
    neurons.codes += at;
    neurons.scales += at;
    neurons.minima += at;
    add_blocks(neurons, rows_from(rows, group.input_first, group.bundle_rows), group.count, outputs,
               worker.sums + static_cast<size_t>(group.first) * first.outputs);
  }
  for (int column = outputs.first; column < outputs.last; column += kPanelRows)
    mix(step, worker.sums + column, static_cast<size_t>(first.outputs), column, index, thread);
}

}  // namespace isotherm
