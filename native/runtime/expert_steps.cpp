// Steps of mixtures of experts. Rows that choose the same expert are gathered, so that its weights are read once for
// all. Every thread finds out for itself who chose what: from the same numbers, so that all agree, and without a
// barrier.
#include <cstring>

#include "panels.h"

namespace isotherm {
bool Executor::run_step(const RouteStep& step, size_t index, int thread) {
  const Range rows = share(rows_of(index), thread, pool_.num_threads());
  for (int i = rows.first; i < rows.last; i++)
    kernels_.route(buffers_[step.logits].row(i), step.num_experts, step.num_used, buffers_[step.out].row(i));
  return false;
}

void Executor::group_rows(const ExpertInput& input, int num_rows, ExpertGroups& found) {
  const auto each_member = [&](const auto& visit) {
    for (int row = 0; row < num_rows; row++)
      for (int rank = 0; rank < input.num_used; rank++) visit(row * input.num_used + rank, expert_of(input, row, rank));
  };
  int32_t* next = found.by_expert;  // first how many rows, then where the next one goes
  std::fill(next, next + input.num_experts, 0);
  each_member([&](int, int expert) { next[expert]++; });
  found.count = 0;
  for (int expert = 0, place = 0; expert < input.num_experts; expert++) {
    const int count = next[expert];
    if (count == 0) continue;
    const int bundle = bundle_rows(kernels_, count);
    const bool is_same = num_rows == 1 && !input.has_ranks;
    found.groups[found.count++] = {expert, place, count, is_same ? 0 : place, bundle};
    next[expert] = place;
    place += (count + bundle - 1) / bundle * bundle;
  }
  each_member([&](int member, int expert) {
    const int place = next[expert]++;
    found.places[member] = place;
    found.members[place] = member;
  });
  for (int i = 0; i < found.count; i++) found.by_expert[found.groups[i].expert] = i;
}

bool Executor::gather(const ExpertInput& input, const Matrix& w, size_t index, int thread, QuantRows& rows) {
  const int num_rows = rows_of(index);
  Worker& worker = workers_[thread];
  const ExpertGroups& found = worker.groups;
  group_rows(input, num_rows, worker.groups);
  InputNeeds needs;
  needs.add(w);
  const bool redundant = num_rows == 1;
  rows = needs.part_of(redundant ? worker.rows : shared_, w.columns);
  const auto quantise = [&](const float* values, int row, int rank) {
    const ExpertGroup& group = found.groups[found.by_expert[expert_of(input, row, rank)]];
    const int place = found.places[row * input.num_used + rank];
    kernels_.quantise(values, rows_from(rows, group.input_first, group.bundle_rows), place - group.first);
  };
  const int num_items = input.has_ranks ? num_rows * input.num_used : num_rows;
  const Range mine = redundant ? Range{0, num_items} : share(num_items, thread, pool_.num_threads());
  for (int i = mine.first; i < mine.last; i++) {
    if (!input.has_ranks) {
      const float* values = normed(input.x, input.norm, i, w.columns, thread);
      for (int rank = 0; rank < (redundant ? 1 : input.num_used); rank++) quantise(values, i, rank);
      continue;
    }
    const int row = i / input.num_used, rank = i % input.num_used;
    const float* values = buffers_[input.x].row(row) + rank * w.columns;
    if (rows.columns > w.columns) {  // what follows is the next rank's
      std::memcpy(worker.normed, values, sizeof(float) * static_cast<size_t>(w.columns));
      std::fill(worker.normed + w.columns, worker.normed + rows.columns, 0.0f);
      values = worker.normed;
    }
    quantise(values, row, rank);
  }
  if (!redundant) return barrier(index, thread, Phase::kPrepare);
  if (log_) log_->mark(thread, index, Phase::kPrepare);
  return false;
}

// Panel `panel` of the group's expert times its rows.
void Executor::multiply_group(const Matrix& w, int num_experts, const ExpertGroup& group, int panel,
                              const QuantRows& rows, float* totals) {
  const size_t at = static_cast<size_t>(w.num_panels() / num_experts) * group.expert + panel;
  const QuantRows x = rows_from(rows, group.input_first, group.bundle_rows);
  kernels_.multiply_panel({w.data + at * w.panel_bytes, w.type_a, w.type_b, &x, group.count, totals});
}

bool Executor::run_step(const ExpertGluStep& step, size_t index, int thread) {
  const Matrix& w = step.weight;
  QuantRows rows;
  if (gather(step.input, w, index, thread, rows)) return true;
  const int num_used = step.input.num_used, ffn_size = w.rows / step.input.num_experts;
  each_expert_panel(step.input, w, rows, index, thread, [&](int member, int panel, const float* totals) {
    kernels_.finish_glu(totals, step.activation, of_member(step.out, member, num_used, ffn_size) + panel * kTileRows);
  });
  return false;
}

// A thread takes 32 outputs of all experts at a time, so that it can add up what they say.
bool Executor::run_step(const ExpertDownStep& step, size_t index, int thread) {
  const Matrix& w = step.weight;
  QuantRows rows;
  if (gather(step.input, w, index, thread, rows)) return true;
  if (has_few(step, rows, index, thread)) {
    down_of_experts(step, rows, index, thread);
    return false;
  }
  const ExpertGroups& found = workers_[thread].groups;
  float* totals = workers_[thread].totals;
  each_panel(w.num_panels() / step.input.num_experts, rows_of(index), index, thread, [&](int panel) {
    for (int i = 0; i < found.count; i++)
      multiply_group(w, step.input.num_experts, found.groups[i], panel, rows,
                     totals + static_cast<size_t>(found.groups[i].first) * kPanelRows);
    mix(step, totals, kPanelRows, panel * kPanelRows, index, thread);
  });
  return false;
}

// 32 outputs of every row, of what each place has at `totals`.
void Executor::mix(const ExpertDownStep& step, const float* totals, size_t stride, int column, size_t index,
                   int thread) {
  const int num_used = step.input.num_used;
  for (int r = 0; r < rows_of(index); r++)
    kernels_.mix({totals, stride, workers_[thread].groups.places + r * num_used,
                  buffers_[step.input.routes].row(r) + num_used, num_used,
                  step.residual < 0 ? nullptr : buffers_[step.residual].row(r) + column,
                  buffers_[step.out].row(r) + column});
}

}  // namespace isotherm
