#include "gpu_program.h"

#include <algorithm>
#include <cstring>

#include "../kernels/table.h"

namespace isotherm {

int GpuProgram::num_layers(int state) const {
  return static_cast<int>(
      std::count_if(pages_.begin(), pages_.end(), [=](const GpuPages& pages) { return pages.state == state; }));
}

bool GpuProgram::writes(int step, int buffer) const {
  const std::vector<GpuRows>& outputs = steps_[static_cast<size_t>(step)].outputs;
  return std::any_of(outputs.begin(), outputs.end(), [=](const GpuRows& rows) { return rows.buffer == buffer; });
}

void GpuProgram::begin(const BatchView& batch, const std::vector<int>& positions) {
  const size_t rows = positions.size(), states = static_cast<size_t>(num_states_);
  filled_.assign(1, static_cast<int32_t>(rows));
  filled_.insert(filled_.end(), batch.token_ids, batch.token_ids + rows);
  filled_.insert(filled_.end(), positions.begin(), positions.end());
  const size_t starts = filled_.size();
  filled_.resize(starts + states * rows);
  for (const RopeTable& rope : ropes_)
    for (const int position : positions) {
      const size_t at = filled_.size(), dims = static_cast<size_t>(rope.dims);
      filled_.resize(at + dims);
      std::memcpy(filled_.data() + at, rope.data + static_cast<size_t>(position) * dims, dims * sizeof(float));
    }
  for (const SequenceView& s : batch.sequences) {
    const int num_pages = (s.num_cached + s.num_new + kPageTokens - 1) / kPageTokens;
    for (size_t state = 0; state < states; state++) {
      const auto first = filled_.begin() + static_cast<std::ptrdiff_t>(starts + state * rows) + s.start;
      std::fill(first, first + s.num_new, static_cast<int32_t>(filled_.size()));
      filled_.insert(filled_.end(), s.page_tables[state], s.page_tables[state] + num_pages);
    }
  }
  device_->stage(batch_, filled_.data(), filled_.size() * sizeof(int32_t));
  num_blocks_ = *std::max_element(positions.begin(), positions.end()) / kAttentionBlock + 1;
}

void GpuProgram::begin_head(const int32_t* rows, int count, const int32_t* kept) {
  filled_.assign(1, count);
  filled_.insert(filled_.end(), rows, rows + count);
  if (kept) filled_.insert(filled_.end(), kept, kept + count);
  device_->stage(head_, filled_.data(), filled_.size() * sizeof(int32_t));
}

void GpuProgram::launch(int step, int num_rows) {
  for (const GpuLaunch& l : steps_[static_cast<size_t>(step)].launches) {
    const bool is_one = num_blocks_ == 1;
    if (num_rows < l.least_rows || num_rows > l.most_rows) continue;
    if (l.blocks != GpuBlocks::kAny && (l.blocks == GpuBlocks::kOne) != is_one) continue;
    const int row_groups = (num_rows + l.rows_per_group - 1) / l.rows_per_group;
    const int blocks = l.blocks == GpuBlocks::kSplit ? num_blocks_ : 1;
    device_->launch(l.kernel,
                    {static_cast<size_t>(l.panels), static_cast<size_t>(row_groups), static_cast<size_t>(blocks)},
                    static_cast<size_t>(l.lanes));
  }
}

void GpuProgram::choose(int num_rows, uint32_t* out) {
  device_->launch(choice_.kernel, {1, static_cast<size_t>(num_rows), 1}, static_cast<size_t>(choice_.lanes));
  device_->read(choice_.out, 0, out,
                static_cast<size_t>(num_rows) * static_cast<size_t>(choice_.row_words) * sizeof(uint32_t));
}

void GpuProgram::upload(const GpuRows& rows, const float* data, size_t stride, int num_rows) {
  device_->stage(rows.on_device, data, stride * sizeof(float) * static_cast<size_t>(num_rows));
}

void GpuProgram::download(const GpuRows& rows, float* data, size_t stride, int num_rows) {
  const size_t count = static_cast<size_t>(num_rows), from = static_cast<size_t>(rows.stride) * sizeof(float);
  if (rows.offset == 0 && static_cast<size_t>(rows.stride) == stride)
    return device_->read(rows.on_device, 0, data, count * from);
  for (size_t i = 0; i < count; i++)
    device_->read(rows.on_device, i * from + static_cast<size_t>(rows.offset) * sizeof(float), data + i * stride,
                  static_cast<size_t>(rows.width) * sizeof(float));
}

void GpuProgram::read_page(int state, int page, size_t page_bytes, uint8_t* to) {
  for (const GpuPages& pages : pages_)
    if (pages.state == state) {
      device_->read(pages.buffer, static_cast<size_t>(page) * page_bytes, to, page_bytes);
      to += page_bytes;
    }
}

void GpuProgram::write_page(int state, int page, size_t page_bytes, const uint8_t* from) {
  for (const GpuPages& pages : pages_)
    if (pages.state == state) {
      device_->write(pages.buffer, static_cast<size_t>(page) * page_bytes, from, page_bytes);
      from += page_bytes;
    }
}

}  // namespace isotherm
