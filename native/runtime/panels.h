// How the threads share out rows, and panels of weights.
#pragma once
#include <algorithm>

#include "executor.h"

namespace isotherm {

// Share `thread` of `count` items, contiguous: one stream of weights a thread.
inline Range share(int count, int thread, int num_threads) {
  const auto cut = [&](int i) { return static_cast<int>(static_cast<int64_t>(count) * i / num_threads); };
  return {cut(thread), cut(thread + 1)};
}

// Outputs of down that a thread takes at once.
constexpr int kOutputUnit = 128;

inline Range share_outputs(const NeuronMatrix& n, int thread, int num_threads) {
  const Range units = share(n.outputs / kOutputUnit, thread, num_threads);
  return {units.first * kOutputUnit, units.last * kOutputUnit};
}

// The rows from place `first` on, as an input of their own.
inline QuantRows rows_from(QuantRows rows, int first, int bundle_rows) {
  const size_t at = static_cast<size_t>(first) * rows.columns;
  rows.bundle_rows = bundle_rows;
  rows.codes += at;
  rows.scales += at / kBlockColumns;
  rows.sums += at / kBlockColumns;
  if (rows.half_sums) rows.half_sums += at / 16;
  for (int i = 0; i < kNumStarts; i++)
    if (rows.starts[i]) rows.starts[i] += at / static_cast<size_t>(kStarts[i].columns);
  if (rows.values) rows.values += at;
  return rows;
}

// From so many rows on a panel is long work.
constexpr int kDynamicRows = 16;

// Of few rows' panels, one in so many belongs to the tail.
constexpr int kTailShare = 4;

// Runs of panels that a thread takes from the tail.
constexpr int kFewRuns = 4, kManyRuns = 32;

// Few rows: a contiguous share of the panels, one stream of weights, and a tail that is taken in small runs by who is
// free: a slow core, or one that a neighbour holds, does less. Many: all panels are such a tail. Within a run each
// panel brings in the first weights of the next.
template <class Panel>
void Executor::each_panel(int count, int num_rows, size_t index, int thread, const Panel& panel) {
  const int num_threads = pool_.num_threads();
  const bool is_many = num_rows >= kDynamicRows;
  const int tail = num_threads == 1 ? 0 : is_many ? count : count / kTailShare;
  const Range mine = share(count - tail, thread, num_threads);
  for (int i = mine.first; i < mine.last; i++) panel(i);
  const int run = std::max(1, tail / (num_threads * (is_many ? kManyRuns : kFewRuns)));
  for (int i; (i = count - tail + counters_[index].next.fetch_add(run, std::memory_order_relaxed)) < count;)
    for (int j = i; j < std::min(count, i + run); j++) panel(j);
}

// The panels of all experts that were chosen, times their rows: finish(member, panel, totals) for each row.
template <class Finish>
void Executor::each_expert_panel(const ExpertInput& input, const Matrix& w, const QuantRows& rows, size_t index,
                                 int thread, const Finish& finish) {
  const ExpertGroups& found = workers_[thread].groups;
  const int num_panels = w.num_panels() / input.num_experts;
  float* totals = workers_[thread].totals;
  each_panel(found.count * num_panels, rows_of(index), index, thread, [&](int i) {
    const ExpertGroup& group = found.groups[i / num_panels];
    const int panel = i % num_panels;
    multiply_group(w, input.num_experts, group, panel, rows, totals);
    for (int r = 0; r < group.count; r++) finish(found.members[group.first + r], panel, totals + r * kPanelRows);
  });
}

}  // namespace isotherm
