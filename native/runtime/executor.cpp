#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "system.h"

namespace isotherm {
namespace {

// Rounding to nearest, no flushing of denormals: what the contract's arithmetic asks, whoever calls.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatMode() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~FloatMode() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace

Arena::Arena(size_t bytes) : bytes_(std::max<size_t>(bytes, 1)) { data_ = reserve_zeroed(bytes_); }

Arena::Arena(Arena&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }

Arena::~Arena() {
  if (data_) release(data_, bytes_);
}

Executor::Executor(NativeProgram program, const KernelTable& kernels, int num_threads)
    : program_(std::move(program)),
      kernels_(kernels),
      pool_(num_threads),
      workers_(static_cast<size_t>(num_threads)),
      counters_(program_.steps.size()) {
  while (select_ < program_.steps.size() && !selects_rows(program_.steps[select_])) select_++;
  measure();
  for (const Step& step : program_.steps) most_active_.emplace_back().fill(has_neurons(step) ? 0 : -1);
}

template <class T>
T* Executor::allocate(size_t count) {
  arenas_.emplace_back(count * sizeof(T));
  return arenas_.back().as<T>();
}

QuantRows Executor::make_rows(size_t elements, const InputNeeds& needs) {
  QuantRows rows{};
  rows.codes = allocate<int8_t>(elements);
  rows.scales = allocate<float>(elements / kBlockColumns);
  rows.sums = allocate<float>(elements / kBlockColumns);
  for (int i = 0; i < kNumStarts; i++)
    if (needs.starts[i]) rows.starts[i] = allocate<int32_t>(elements / static_cast<size_t>(kStarts[i].columns));
  if (needs.half_sums) rows.half_sums = allocate<float>(elements / 16);
  if (needs.values) rows.values = allocate<float>(elements);
  return rows;
}

// Sizes of scratch follow from the steps: the widest input, the widest head, whether a weight is stored as floats.
void Executor::measure() {
  int columns = 64, head_dim = 16, tile_rows = 1, neurons = 1;
  size_t members = 0, places = 0, experts = 0, few_elements = 0, many_elements = 0, listed = 0, sums = 1;
  const size_t rows = static_cast<size_t>(std::max(program_.max_tokens, program_.max_head_rows));
  const size_t few_rows = static_cast<size_t>(kernels_.few_rows);
  InputNeeds needs;
  const auto look = [&](const Matrix& m) {
    columns = std::max(columns, m.padded_columns());
    needs.add(m);
  };
  for (const Step& step : program_.steps) {
    if (const auto* linear = std::get_if<LinearStep>(&step))
      for (const Projection& p : linear->projections) look(p.weight);
    if (const auto* glu = std::get_if<GluStep>(&step)) look(glu->weight);
    if (const auto* predicted = std::get_if<PredictedStep>(&step)) {
      look(predicted->linear.projections[0].weight);
      neurons = std::max(neurons, predicted->linear.projections[0].weight.rows);
    }
    if (const auto* up = std::get_if<UpStep>(&step)) {
      look(up->weight);
      neurons = std::max(neurons, up->weight.rows);
    }
    if (const auto* down = std::get_if<DownStep>(&step)) {
      look(down->linear.projections[0].weight);
      sums = std::max(sums, few_rows * static_cast<size_t>(down->neurons.outputs));
    }
    const auto look_at_experts = [&](const ExpertInput& input, const Matrix& m) {
      look(m);
      experts = std::max(experts, static_cast<size_t>(input.num_experts));
      members = std::max(members, rows * input.num_used);
      places = std::max(places, members + std::min(members, experts) * (kernels_.many_rows - 1));
      few_elements = std::max(few_elements, static_cast<size_t>(input.num_used) * m.padded_columns());
      many_elements = std::max(many_elements, places * m.padded_columns());
    };
    if (const auto* glu = std::get_if<ExpertGluStep>(&step)) look_at_experts(glu->input, glu->weight);
    if (const auto* gate = std::get_if<ExpertGateStep>(&step)) look_at_experts(gate->input, gate->weight);
    if (const auto* up = std::get_if<ExpertUpStep>(&step)) {
      look_at_experts(up->input, up->weight);
      neurons = std::max(neurons, up->ffn_size());
      listed = std::max(listed, std::min(experts, few_rows * up->input.num_used) * static_cast<size_t>(up->ffn_size()));
    }
    if (const auto* down = std::get_if<ExpertDownStep>(&step)) {
      look_at_experts(down->input, down->weight);
      sums = std::max(sums, few_rows * static_cast<size_t>(down->input.num_used * down->neurons.outputs));
    }
    if (const auto* attention = std::get_if<AttentionStep>(&step)) {
      head_dim = std::max(head_dim, attention->head_dim);
      tile_rows = std::max(tile_rows, tile_tokens(*attention) * (attention->num_heads / attention->num_kv_heads));
    }
  }
  const size_t num_buffers = program_.widths.size();
  arenas_.reserve(num_buffers + 24 * (workers_.size() + 1));
  for (size_t i = 0; i < num_buffers; i++) {
    const size_t stride = static_cast<size_t>(program_.widths[i] + 63) / 64 * 64;
    const bool is_logits = i + 1 == num_buffers;  // the caller's array stands in for it
    buffers_.push_back({is_logits ? nullptr : allocate<float>(stride * rows), stride, program_.widths[i]});
  }
  many_elements = std::max(many_elements, (rows + kernels_.many_rows - 1) * columns);  // the last bundle may be short
  shared_ = make_rows(many_elements, needs);
  for (Worker& worker : workers_) {
    worker.rows = make_rows(std::max(few_elements, static_cast<size_t>(kRedundantRows) * columns), needs);
    worker.normed = allocate<float>(static_cast<size_t>(columns));
    worker.totals = allocate<float>(std::max(rows, places) * kPanelRows);
    worker.attend = allocate<float>(attend_scratch_floats(tile_rows, head_dim));
    worker.fires = allocate<uint8_t>(static_cast<size_t>(neurons));
    worker.ids = allocate<int32_t>(std::max(listed, static_cast<size_t>(neurons)) + 1);
    worker.sums = allocate<float>(sums);
    worker.groups = {allocate<ExpertGroup>(std::min(members, experts)), 0, allocate<int32_t>(members),
                     allocate<int32_t>(places), allocate<int32_t>(experts)};
  }
}

bool Executor::walk(size_t first, size_t last, const std::function<bool()>& poll) {
  const auto started = std::chrono::steady_clock::now();
  stop_.store(false, std::memory_order_relaxed);
  for (Counter& counter : counters_) counter.next.store(0, std::memory_order_relaxed);
  if (log_) log_->mark(0, first, Phase::kStart, started);
  pool_.run([&](int thread) {
    const FloatMode mode;
    if (log_ && thread > 0) log_->mark(thread, first, Phase::kStart);
    Interrupts interrupts(poll);
    for (size_t i = first; i < last; i++) {
      if (std::holds_alternative<DeviceStep>(program_.steps[i])) {
        const size_t end = end_on_device(i, last);
        if (thread == 0) run_on_device(i, end, interrupts);
        i = end - 1;
      } else if (std::visit([&](const auto& step) { return run_step(step, i, thread); }, program_.steps[i])) {
        break;
      }
      if (thread == 0 && interrupts.stops()) stop_.store(true, std::memory_order_relaxed);
      if (barrier(i, thread, Phase::kWork)) break;
    }
  });
  const auto ended = std::chrono::steady_clock::now();
  if (log_) log_->mark(0, last - 1, Phase::kWait, ended);
  busy_s_ += std::chrono::duration<double>(ended - started).count();
  if (device_failure_) std::rethrow_exception(std::exchange(device_failure_, nullptr));
  return !stop_.load(std::memory_order_relaxed);
}

void Executor::begin(const BatchView& batch) {
  batch_ = batch;
  positions_.clear();
  trimmed_.clear();
  for (const SequenceView& s : batch_.sequences)
    for (int i = 0; i < s.num_new; i++) {
      positions_.push_back(s.num_cached + i);
      trimmed_.push_back(s.is_trimmed);
    }
  size_t partials = 0;
  for (const Step& step : program_.steps)
    if (const auto* attention = std::get_if<AttentionStep>(&step); attention && should_split(*attention)) {
      const int blocks = *std::max_element(positions_.begin(), positions_.end()) / kAttentionBlock + 1;
      const size_t rows = static_cast<size_t>(num_tiles(*attention)) * tile_tokens(*attention) * attention->num_heads;
      partials = std::max(partials, rows * blocks * partial_floats(attention->head_dim));
    }
  if (partials_.size() < partials) partials_.resize(partials);
  if (program_.gpu) program_.gpu->begin(batch_, positions_);
}

void Executor::begin_head(int first, int count, const int32_t* kept) {
  head_first_ = first;
  head_count_ = count;
  if (program_.gpu) program_.gpu->begin_head(batch_.logit_rows + first, count, kept);
}

bool Executor::run(const BatchView& batch, const std::function<bool()>& poll) {
  begin(batch);
  return walk(0, select_, poll);
}

bool Executor::observe(const BatchView& batch, const std::vector<Stop>& stops, const Look& look,
                       const std::function<bool()>& poll) {
  begin(batch);
  const auto walk_part = [&](size_t first, size_t end, size_t i, int rows) {
    for (; i < stops.size() && stops[i].step < end; first = stops[i++].step + 1) {
      if (first <= stops[i].step && !walk(first, stops[i].step + 1, poll)) return false;
      fetch(stops[i]);
      const Buffer& buffer = buffers_[static_cast<size_t>(stops[i].buffer)];
      look(i, buffer.data, buffer.stride, rows);
    }
    return end > select_ || first >= end || walk(first, end, poll);
  };
  if (!walk_part(0, select_, 0, batch.num_tokens)) return false;
  size_t late = 0;
  while (late < stops.size() && stops[late].step < select_) late++;
  for (int first = 0; late < stops.size() && first < batch.num_logit_rows; first += head_count_) {
    begin_head(first, std::min(program_.max_head_rows, batch.num_logit_rows - first));
    if (!walk_part(select_, program_.steps.size(), late, head_count_)) return false;
  }
  return true;
}

bool Executor::shortlist(int first, int count, const int32_t* kept, uint32_t* out, const std::function<bool()>& poll) {
  begin_head(first, count, kept);
  keeps_logits_ = true;
  struct End {
    bool& keeps;
    ~End() { keeps = false; }  // whatever the walk throws
  } const end{keeps_logits_};
  if (!walk(select_, program_.steps.size(), poll)) return false;
  const auto started = std::chrono::steady_clock::now();
  program_.gpu->choose(count, out);
  busy_s_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return true;
}

bool Executor::head(int first, int count, float* logits, const std::function<bool()>& poll) {
  begin_head(first, count);
  Buffer& out = buffers_.back();
  out.data = logits;
  out.stride = static_cast<size_t>(out.width);
  return walk(select_, program_.steps.size(), poll);
}

}  // namespace isotherm
