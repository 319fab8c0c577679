// What the executor does where steps are the GPU's: one thread enqueues, the others wait at the barrier behind.
#include "executor.h"

namespace isotherm {
namespace {

constexpr int kFreeRows = 8;      // up to so many rows nobody waits for the GPU but who reads what it made
constexpr size_t kSyncSteps = 8;  // with more rows so many steps are under way: Ctrl-C is asked for between them

}  // namespace

// Steps [first, end) are the GPU's, one after the other.
size_t Executor::end_on_device(size_t first, size_t last) const {
  size_t end = first;
  while (end < last && std::holds_alternative<DeviceStep>(program_.steps[end])) end++;
  return end;
}

void Executor::run_on_device(size_t first, size_t end, Interrupts& interrupts) try {
  GpuProgram& gpu = *program_.gpu;
  const int num_rows = first < select_ ? batch_.num_tokens : head_count_;
  const auto buffer_of = [&](const GpuRows& rows) -> const Buffer& {
    return buffers_[static_cast<size_t>(rows.buffer)];
  };
  for (size_t i = first; i < end; i++) {
    const int index = std::get<DeviceStep>(program_.steps[i]).index;
    const GpuStep& step = gpu.step(index);
    for (const GpuRows& r : step.uploads) gpu.upload(r, buffer_of(r).data, buffer_of(r).stride, num_rows);
    gpu.launch(index, num_rows);
    const auto is_kept = [&](const GpuRows& r) { return keeps_logits_ && r.buffer + 1 == std::ssize(buffers_); };
    for (const GpuRows& r : step.downloads)
      if (!is_kept(r)) gpu.download(r, buffer_of(r).data, buffer_of(r).stride, num_rows);
    if (log_) {
      gpu.device().finish();
      if (i + 1 < end) log_->mark(0, i, Phase::kWork);
    } else if (num_rows > kFreeRows && ((i - first) % kSyncSteps == kSyncSteps - 1 || i + 1 == end)) {
      gpu.device().finish();
      if (interrupts.stops()) {
        stop_.store(true, std::memory_order_relaxed);
        return;
      }
    }
  }
  gpu.device().flush();
} catch (...) {
  device_failure_ = std::current_exception();
  stop_.store(true, std::memory_order_relaxed);
}

// What a look at a buffer needs, where the GPU wrote it.
void Executor::fetch(const Stop& stop) {
  const auto* on_device = std::get_if<DeviceStep>(&program_.steps[stop.step]);
  if (!on_device) return;
  const Buffer& buffer = buffers_[static_cast<size_t>(stop.buffer)];
  for (const GpuRows& rows : program_.gpu->step(on_device->index).outputs)
    if (rows.buffer == stop.buffer)
      program_.gpu->download(rows, buffer.data, buffer.stride, stop.step < select_ ? batch_.num_tokens : head_count_);
}

}  // namespace isotherm
