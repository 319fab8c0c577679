// How the threads share out rows, and panels of weights.
#pragma once
#include <algorithm>

#include "executor.h"

namespace isotherm {

struct Range {
  int first, last;
};

// Share `thread` of `count` items, contiguous: one stream of weights a thread.
inline Range share(int count, int thread, int num_threads) {
  const auto cut = [&](int i) { return static_cast<int>(static_cast<int64_t>(count) * i / num_threads); };
  return {cut(thread), cut(thread + 1)};
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

}  // namespace isotherm
