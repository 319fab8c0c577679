// Walks a program's steps on a thread pool. One batch at a time; no allocation and no look-up on the way.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "program.h"
#include "step_log.h"
#include "thread_pool.h"

namespace isotherm {

// A zeroed, 64-byte aligned array that asks for huge pages where it is large.
class Arena {
 public:
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  size_t bytes_;
};

// Up to so many rows each thread quantises the input for itself: cheaper than a barrier and other caches' dirty lines.
constexpr int kRedundantRows = 2;

// The rows that one expert computes. Their places, in the order of all groups, are where totals stand, and what is read
// of the input, which is gathered so; but a single row that all experts read stands there once.
struct ExpertGroup {
  int expert, first, count;  // places
  int input_first, bundle_rows;
};

// How the rows of a batch are shared out among experts. A member is a row and a rank: row * num_used + rank.
struct ExpertGroups {
  ExpertGroup* groups;  // experts rising
  int count;
  int32_t* places;     // by member
  int32_t* members;    // by place
  int32_t* by_expert;  // its group
};

struct Range {
  int first, last;
};

// Asks `poll` whether to stop, at most every 20 ms.
class Interrupts {
 public:
  explicit Interrupts(const std::function<bool()>& poll) : poll_(poll) {}
  bool stops() {
    const auto now = std::chrono::steady_clock::now();
    if (!poll_ || now - asked_ < std::chrono::milliseconds(20)) return false;
    asked_ = now;
    return poll_();
  }

 private:
  const std::function<bool()>& poll_;
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

class Executor {
 public:
  Executor(NativeProgram program, const KernelTable& kernels, int num_threads);

  // Computes a batch up to the hidden rows that the head reads, and fills its KV pages. `poll` is called on this
  // thread between steps, at most every 20 ms; true stops. False: stopped, and what the pages got is not to be used.
  bool run(const BatchView& batch, const std::function<bool()>& poll);

  // Logits [count][vocab] of the batch's logit rows [first, first + count), count <= max_head_rows.
  bool head(int first, int count, float* logits, const std::function<bool()>& poll);

  // `head`, of which a GPU reads the logits: of row i the kept[i] largest, as GpuProgram has them.
  bool shortlist(int first, int count, const int32_t* kept, uint32_t* out, const std::function<bool()>& poll);

  // `run` and `head` of all logit rows, stopping after each of the rising `stops` to call look(i, rows, stride, count)
  // with what stops[i].buffer then holds; nothing behind the last stop is computed. Behind the selection of rows it is
  // called for each block of max_head_rows. False: stopped.
  struct Stop {
    size_t step;
    int buffer;
  };
  using Look = std::function<void(size_t stop, const float* rows, size_t stride, int count)>;
  bool observe(const BatchView& batch, const std::vector<Stop>& stops, const Look& look,
               const std::function<bool()>& poll);

  // How many neurons of an UpStep, PredictedStep or DownStep, or of as many experts as a row uses, may fire, in any of
  // so many rows, that those are computed alone; at first 0. Nothing is set where there are no weights by neuron.
  void set_most_active(size_t step, int num_rows, int most_active);

  // Seconds of such a step in which `num_active` neurons fire, and are computed alone or with all others.
  double time_neurons(size_t step, int num_rows, int num_active, bool is_alone);

  // Reads every weight that a token needs, each thread a contiguous share of each matrix, and computes nothing.
  // Seconds.
  double read_weights();

  // Seconds spent computing, in all: what is left of a caller's step is the caller's own.
  double busy_s() const { return busy_s_; }

  int num_threads() const { return pool_.num_threads(); }
  // Of which neurons may be computed alone.
  int few_rows() const { return std::min(kernels_.few_rows, program_.max_tokens); }

  // From here on threads write down what they do, at most `capacity` marks each.
  void start_log(size_t capacity) { log_ = std::make_unique<StepLog>(num_threads(), capacity); }
  std::unique_ptr<StepLog> stop_log() { return std::move(log_); }

 private:
  struct Buffer {
    float* data;
    size_t stride;
    int width;
    float* row(int i) const { return data + i * stride; }
  };
  struct Worker {  // one thread's scratch
    QuantRows rows{};
    float* normed = nullptr;
    float* totals = nullptr;
    float* attend = nullptr;
    uint8_t* fires = nullptr;  // by neuron
    int32_t* ids = nullptr;    // of neurons that fire
    float* sums = nullptr;     // of down, row by row, or of experts place by place
    ExpertGroups groups{};
  };
  struct alignas(64) Counter {
    std::atomic<int> next{0};
  };

  QuantRows make_rows(size_t elements, const InputNeeds& needs);
  template <class T>
  T* allocate(size_t count);
  void measure();
  void begin(const BatchView& batch);
  void begin_head(int first, int count, const int32_t* kept = nullptr);
  bool walk(size_t first, size_t last, const std::function<bool()>& poll);
  // Whether a row of a step belongs to a sequence that is trimmed.
  bool is_trimmed(size_t step, int row) const {
    return trimmed_[static_cast<size_t>(step > select_ ? batch_.logit_rows[head_first_ + row] : row)] != 0;
  }
  int rows_of(size_t step) const { return step > select_ ? head_count_ : batch_.num_tokens; }
  // `done`: what the thread did up to here.
  bool barrier(size_t step, int thread, Phase done) {
    if (!log_) [[likely]]
      return pool_.barrier().arrive_and_wait(thread, stop_);
    log_->mark(thread, step, done);
    const bool stopped = pool_.barrier().arrive_and_wait(thread, stop_);
    log_->mark(thread, step, Phase::kWait);
    return stopped;
  }

  void fetch(const Stop& stop);
  size_t end_on_device(size_t first, size_t last) const;
  void run_on_device(size_t first, size_t end, Interrupts& interrupts);
  // Each gives true when the run was stopped at a barrier inside.
  bool run_step(const EmbedStep& step, size_t index, int thread);
  bool run_step(const EmbedPositionsStep& step, size_t index, int thread);
  bool run_step(const LinearStep& step, size_t index, int thread);
  bool run_step(const GluStep& step, size_t index, int thread);
  bool run_step(const PredictedStep& step, size_t index, int thread);
  bool run_step(const UpStep& step, size_t index, int thread);
  bool run_step(const TrimStep& step, size_t index, int thread);
  bool run_step(const DownStep& step, size_t index, int thread);
  bool run_step(const RouteStep& step, size_t index, int thread);
  bool run_step(const ExpertGluStep& step, size_t index, int thread);
  bool run_step(const ExpertGateStep& step, size_t index, int thread);
  bool run_step(const ExpertUpStep& step, size_t index, int thread);
  bool run_step(const ExpertDownStep& step, size_t index, int thread);
  bool run_step(const AttentionStep& step, size_t index, int thread);
  bool run_step(const AddNormStep& step, size_t index, int thread);
  bool run_step(const SelectStep& step, size_t index, int thread);
  bool run_step(const DeviceStep&, size_t, int) { return false; }  // the walk takes runs of them
  bool quantise(int x, Norm norm, int columns, const InputNeeds& needs, size_t index, int thread, QuantRows& rows);
  const float* normed(int x, const Norm& norm, int row, int columns, int thread);
  // Rows that are no single bundle are computed whole: together they fire most neurons.
  bool is_sparse(int num_rows) const { return num_rows <= kernels_.few_rows; }
  void multiply_linear(const LinearStep& step, const QuantRows& x, size_t index, int thread);
  void store_linear(const LinearStep& step, const Projection& p, int row, int column, const float* totals);
  // Of a row's neurons; null where none may be left out.
  const float* scores_of(const PredictedStep& step, size_t index, int row) const {
    return is_trimmed(index, row) ? buffers_[step.scores].row(row) : nullptr;
  }
  int find_predicted(const PredictedStep& step, size_t index, int thread);
  void multiply_predicted(const PredictedStep& step, const QuantRows& x, size_t index, int thread);
  template <class Finish>
  void rows_of_neurons(const RowMatrix& matrix, const Buffer& out, const QuantRows& x, int count, int num_rows,
                       int thread, const Finish& finish);
  int most_active(size_t step, int num_rows) const { return most_active_[step][static_cast<size_t>(num_rows - 1)]; }
  int find_firing(const UpStep& step, int num_rows, int thread);
  void finish_firing(const int32_t* ids, int first_id, int count, const float* totals, Activation activation,
                     const float* gate, float* out);
  void finish_up(int count, const float* totals, Activation activation, const float* gate, float* out);
  void down_of(const DownStep& step, const QuantRows& x, int num_rows, int thread);
  void add_blocks(const NeuronMatrix& n, const QuantRows& x, int num_rows, Range outputs, float* sums);
  int expert_of(const ExpertInput& input, int row, int rank) const {
    return static_cast<int>(buffers_[input.routes].row(row)[rank]);
  }
  void group_rows(const ExpertInput& input, int num_rows, ExpertGroups& found);
  bool gather(const ExpertInput& input, const Matrix& w, size_t index, int thread, QuantRows& rows);
  void multiply_group(const Matrix& w, int num_experts, const ExpertGroup& group, int panel, const QuantRows& rows,
                      float* totals);
  template <class Finish>
  void each_expert_panel(const ExpertInput& input, const Matrix& w, const QuantRows& rows, size_t index, int thread,
                         const Finish& finish);
  float* of_member(int buffer, int member, int num_used, int width) const {
    return buffers_[buffer].row(member / num_used) + member % num_used * width;
  }
  int find_firing(const ExpertUpStep& step, int thread);
  void up_of_experts(const ExpertUpStep& step, const QuantRows& rows, int count, int thread);
  bool has_few(const ExpertDownStep& step, const QuantRows& rows, size_t index, int thread);
  void down_of_experts(const ExpertDownStep& step, const QuantRows& rows, size_t index, int thread);
  // The bound is that of the experts of one row; a batch may use more of them.
  bool is_few(int count, size_t index, int num_used, int thread) const {
    return static_cast<int64_t>(count) * num_used <=
           static_cast<int64_t>(most_active(index, rows_of(index))) * workers_[thread].groups.count;
  }
  void mix(const ExpertDownStep& step, const float* totals, size_t stride, int column, size_t index, int thread);
  template <class Panel>
  void each_panel(int count, int num_rows, size_t index, int thread, const Panel& panel);
  void append_tokens(const AttentionStep& step, int thread);
  bool attend_split(const AttentionStep& step, size_t index, int thread);
  void attend_tiles(const AttentionStep& step, size_t index, int thread);
  bool should_split(const AttentionStep& step) const;
  int tile_tokens(const AttentionStep& step) const;
  int num_tiles(const AttentionStep& step) const;
  AttendArgs tile_args(const AttentionStep& step, int task, int thread) const;

  const NativeProgram program_;
  const KernelTable& kernels_;
  ThreadPool pool_;
  std::atomic<bool> stop_{false};
  std::vector<Arena> arenas_;
  std::vector<Buffer> buffers_;
  std::vector<Worker> workers_;
  QuantRows shared_{};  // for batches of many rows
  std::vector<Counter> counters_;
  std::vector<float> partials_;
  BatchView batch_{};
  std::vector<int> positions_;
  std::vector<uint8_t> trimmed_;                           // whether each token's sequence is
  std::vector<std::array<int, kMaxFewRows>> most_active_;  // by step and number of rows
  size_t select_ = 0;                                      // index of the first SelectStep
  int head_first_ = 0, head_count_ = 0;
  double busy_s_ = 0;
  bool keeps_logits_ = false;          // on the device
  std::exception_ptr device_failure_;  // thrown by the walk, once all threads have left it
  std::unique_ptr<StepLog> log_;       // null: nobody asked
};

}  // namespace isotherm
