// When each thread did what, for those who ask. Off, it is a null pointer at each barrier, and no clock is read.
#pragma once
#include <chrono>
#include <cstdint>
#include <vector>

namespace isotherm {

enum class Phase : int32_t {
  kStart,    // of a walk: nothing came before
  kPrepare,  // what a step does to its inputs: norm and quantise, or rope and append
  kWork,
  kWait,  // for the other threads
};

// From its mark before until `ns` (of the steady clock), a thread was in `phase` of `step`.
struct Mark {
  int64_t ns;
  int32_t step;
  Phase phase;
};

class StepLog {
 public:
  using Clock = std::chrono::steady_clock;

  // Room for `capacity` marks a thread, touched now; a full log takes no more.
  StepLog(int num_threads, size_t capacity) : capacity_(capacity), lanes_(static_cast<size_t>(num_threads)) {
    for (Lane& lane : lanes_) {
      lane.marks.resize(capacity);
      lane.marks.clear();
    }
  }

  void mark(int thread, size_t step, Phase phase, Clock::time_point now = Clock::now()) {
    std::vector<Mark>& marks = lanes_[static_cast<size_t>(thread)].marks;
    if (marks.size() == capacity_) return;
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now.time_since_epoch()).count();
    marks.push_back({ns, static_cast<int32_t>(step), phase});
  }

  const std::vector<Mark>& marks(int thread) const { return lanes_[static_cast<size_t>(thread)].marks; }

 private:
  struct alignas(64) Lane {
    std::vector<Mark> marks;
  };

  size_t capacity_;
  std::vector<Lane> lanes_;
};

}  // namespace isotherm
