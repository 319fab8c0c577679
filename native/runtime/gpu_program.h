// The steps of a program that a GPU takes: which kernels they launch for how many rows, and which rows cross its
// border.
#pragma once
#include <memory>
#include <vector>

#include "../gpu/gpu_device.h"
#include "batch.h"

namespace isotherm {

// For which batches a kernel is launched, by the blocks of 512 positions that their tokens see: any; one; more; more,
// with groups for each of them.
enum class GpuBlocks : int { kAny, kOne, kMerged, kSplit };

// A kernel for batches of [least_rows, most_rows] rows. Groups: `panels` x (rows / rows_per_group) x (blocks, or one).
struct GpuLaunch {
  int kernel;
  int panels, rows_per_group;
  GpuBlocks blocks;
  int lanes;
  int least_rows, most_rows;
};

// Where rows of one of the executor's buffers lie on the device, in floats.
struct GpuRows {
  int buffer;
  GpuBuffer on_device;
  int offset, stride, width;
};

struct GpuStep {
  std::vector<GpuLaunch> launches;
  std::vector<GpuRows> uploads;  // before it
  std::vector<GpuRows> outputs;
  std::vector<GpuRows> downloads;  // of those what the CPU reads
};

// Keys and values of one layer: pages as a KvPool has them.
struct GpuPages {
  int state;  // group
  GpuBuffer buffer;
};

// The kernel that makes shortlists of logits, and where it writes a row's.
struct GpuChoice {
  int kernel, lanes;
  GpuBuffer out;
  int row_words, most_kept;
};

class GpuProgram {
 public:
  // batch, head: what `begin` and `begin_head` fill: int32
  //   batch  rows, token ids [rows], positions [rows], for each state group where the row's page table begins [rows],
  //          for each rope table its row [rows][dims] as floats, page tables
  //   head   rows, which rows of the batch they are [rows], how many logits of each are kept [rows]
  GpuProgram(std::shared_ptr<GpuDevice> device, GpuBuffer batch, GpuBuffer head, int num_states)
      : device_(std::move(device)), batch_(batch), head_(head), num_states_(num_states) {}

  GpuDevice& device() { return *device_; }
  int add_step(GpuStep step) {
    steps_.push_back(std::move(step));
    return static_cast<int>(steps_.size()) - 1;
  }
  void add_rope(const float* table, int dims) { ropes_.push_back({table, dims}); }
  void add_pages(GpuPages pages) { pages_.push_back(pages); }

  int num_steps() const { return static_cast<int>(steps_.size()); }
  int num_layers(int state) const;  // of a state group that are here
  const GpuStep& step(int index) const { return steps_[static_cast<size_t>(index)]; }
  bool writes(int step, int buffer) const;
  void begin(const BatchView& batch, const std::vector<int>& positions);
  void begin_head(const int32_t* rows, int count, const int32_t* kept);  // kept: null where the logits are read
  void launch(int step, int num_rows);                                   // and returns while it runs

  void upload(const GpuRows& rows, const float* data, size_t stride, int num_rows);
  void download(const GpuRows& rows, float* data, size_t stride, int num_rows);

  void set_choice(GpuChoice choice) { choice_ = choice; }
  int shortlist_words() const { return choice_.row_words; }  // of a row; 0: there are none
  int most_kept() const { return choice_.most_kept; }
  void choose(int num_rows, uint32_t* out);  // waits

  // The layers of a state group that are here, slot after slot.
  void read_page(int state, int page, size_t page_bytes, uint8_t* to);
  void write_page(int state, int page, size_t page_bytes, const uint8_t* from);

 private:
  struct RopeTable {
    const float* data;
    int dims;
  };

  std::shared_ptr<GpuDevice> device_;
  GpuBuffer batch_, head_;
  int num_states_;
  std::vector<GpuStep> steps_;
  std::vector<RopeTable> ropes_;
  std::vector<GpuPages> pages_;
  GpuChoice choice_{};
  std::vector<int32_t> filled_;
  int num_blocks_ = 1;
};

}  // namespace isotherm
