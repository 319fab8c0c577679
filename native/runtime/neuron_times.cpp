// How long steps by neuron take, from which their bounds follow.
#include <algorithm>
#include <cmath>

#include "executor.h"

namespace isotherm {
namespace {

// What a step reads: its input, -1 where that is what says who fires; who fires, and from which value on; its experts.
struct Timed {
  int input, firing;
  float fired, silent;
  const ExpertInput* experts;
};

Timed timed(const Step& step) {
  if (const auto* up = std::get_if<UpStep>(&step)) return {up->x, up->gate, 1, 0, nullptr};
  if (const auto* up = std::get_if<ExpertUpStep>(&step)) return {up->input.x, up->gate, 1, 0, &up->input};
  if (const auto* down = std::get_if<DownStep>(&step)) return {-1, down->linear.x, 1, 0, nullptr};
  if (const auto* down = std::get_if<ExpertDownStep>(&step)) return {-1, down->input.x, 1, 0, &down->input};
  const auto& predicted = std::get<PredictedStep>(step);
  return {predicted.linear.x, predicted.scores, predicted.threshold, -INFINITY, nullptr};
}

}  // namespace

void Executor::set_most_active(size_t step, int num_rows, int most_active) {
  int& bound = most_active_[step][static_cast<size_t>(num_rows - 1)];
  if (bound >= 0) bound = most_active;
}

double Executor::time_neurons(size_t step, int num_rows, int num_active, bool is_alone) {
  const Timed what = timed(program_.steps[step]);
  const Buffer& firing = buffers_[static_cast<size_t>(what.firing)];
  for (int r = 0; r < num_rows; r++) {
    for (int i = 0; i < firing.width; i++) {
      // spread evenly, and without a pattern: the same for all rows
      const bool fires = static_cast<int64_t>(static_cast<uint32_t>(i) * 2654435761u) * firing.width >> 32 < num_active;
      firing.row(r)[i] = fires ? what.fired + static_cast<float>(i % 7) : what.silent;
    }
    if (what.input >= 0) {
      const Buffer& x = buffers_[static_cast<size_t>(what.input)];
      std::fill_n(x.row(r), x.width, 1.0f);
    }
    if (what.experts) {  // as many different ones as there are
      const int num_used = what.experts->num_used;
      float* routes = buffers_[static_cast<size_t>(what.experts->routes)].row(r);
      for (int rank = 0; rank < num_used; rank++) {
        routes[rank] = static_cast<float>((r * num_used + rank) % what.experts->num_experts);
        routes[num_used + rank] = 1.0f / static_cast<float>(num_used);
      }
    }
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

}  // namespace isotherm
