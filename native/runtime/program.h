// A lowered program as flat steps over plain data: what the executor walks. Built once, then only read.
#pragma once
#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "../kernels/table.h"
#include "batch.h"
#include "gpu_program.h"

namespace isotherm {

// A packed matrix, or a pair of matrices whose rows alternate tile by tile (gate, up).
struct Matrix {
  const uint8_t* data;
  WeightType type_a, type_b;
  int rows;     // outputs: of one of the two, where it is a pair
  int columns;  // inputs, not padded
  bool is_pair;
  size_t panel_bytes;

  int rows_per_panel() const { return is_pair ? kTileRows : kPanelRows; }
  int num_panels() const { return (rows + rows_per_panel() - 1) / rows_per_panel(); }
  int padded_columns() const { return (columns + 63) / 64 * 64; }
};

// Which of QuantRows::starts, half_sums and values some weights read.
struct InputNeeds {
  bool starts[kNumStarts] = {};
  bool half_sums = false, values = false;

  void add(const Matrix& m) {
    for (const WeightType type : {m.type_a, m.type_b}) {
      const StartIndex start = kStartOf[static_cast<int>(type)];
      if (start != kNoStart) starts[start] = true;
      half_sums |= type == WeightType::Q2_K;
      values |= type == WeightType::F32 || type == WeightType::F16 || type == WeightType::BF16;
    }
  }

  // `rows` as an input of so many columns, without what no weight reads.
  QuantRows part_of(QuantRows rows, int columns) const {
    rows.columns = (columns + 63) / 64 * 64;
    for (int i = 0; i < kNumStarts; i++)
      if (!starts[i]) rows.starts[i] = nullptr;
    if (!half_sums) rows.half_sums = nullptr;
    if (!values) rows.values = nullptr;
    return rows;
  }
};

struct Norm {
  const float* weight;  // padded to 64 with zeros; null: no norm
  float eps;
  const float* bias;  // alike, of a layer norm; null: RMS norm
};

struct EmbedStep {
  Matrix weight;
  float scale;
  int out;
};

struct EmbedPositionsStep {
  Matrix weight;
  int first_row, x, out;
};

struct Projection {
  Matrix weight;
  const float* bias;  // padded to 64; null: none
  int out;
};

struct LinearStep {
  int x;
  Norm norm;
  std::vector<Projection> projections;
  int residual;  // buffer, or -1
  Activation activation;
};

struct GluStep {
  int x;
  Norm norm;
  Matrix weight;
  Activation activation;
  int out;
};

// Rows of a matrix, each in one piece, for those that fire; row_bytes 0: there are none.
struct RowMatrix {
  const uint8_t* rows;
  size_t row_bytes;
  WeightType type;
};

// Columns of a matrix, each in one piece, and scales of 32 columns by output.
struct NeuronMatrix {
  NeuronForm form;
  const uint8_t *codes, *scales, *minima;
  size_t row_bytes, block_bytes;  // of a column's codes; of a block's scales, or minima, both halves
  int outputs;                    // a multiple of 128
};

// Hidden values, activation(gate) * up: of those neurons whose gate fires, where few do; else of all.
struct UpStep {
  int x;
  Norm norm;
  int gate;  // before its activation
  Matrix weight;
  RowMatrix rows;
  Activation activation;
  bool fires_below_zero;
  int out;
};

// A projection of those neurons whose score is not below the threshold, 0 of the others; all of them, in rows of
// sequences that are not trimmed.
struct PredictedStep {
  LinearStep linear;  // of one projection, without a residual
  RowMatrix rows;
  int scores;
  float threshold;
};

// What is below a threshold becomes 0, in the rows of sequences that are trimmed.
struct TrimStep {
  int x, out;
  Activation activation;    // what is compared is activation(x)
  const float* thresholds;  // by column, padded to 64; null: each row's own
  float deviations;
};

// Down of those neurons whose code is not zero, where few are so; else of all.
struct DownStep {
  LinearStep linear;  // of one projection
  NeuronMatrix neurons;
};

// Which experts compute a row: their ids by rank, then their weights.
struct RouteStep {
  int logits, out;
  int num_experts, num_used;
};

// Rows that experts read: those of an expert stand together.
struct ExpertInput {
  int x;
  bool has_ranks;  // whether x has a row for each rank, side by side
  Norm norm;       // of x
  int routes;      // what a RouteStep wrote
  int num_experts, num_used;

  int panels_used(const Matrix& m) const { return m.num_panels() / num_experts * num_used; }  // by a row
};

// Hidden values of the experts of each row, side by side.
struct ExpertGluStep {
  ExpertInput input;
  Matrix weight;  // pairs of all experts, each of whole panels
  Activation activation;
  int out;
};

// Gates of the experts of each row, side by side, before their activation.
struct ExpertGateStep {
  ExpertInput input;
  Matrix weight;  // of all experts, each of whole panels
  int out;
};

// As an UpStep, of the experts of each row.
struct ExpertUpStep {
  ExpertInput input;
  int gate;
  Matrix weight;   // of all experts, each of whole panels
  RowMatrix rows;  // alike
  Activation activation;
  bool fires_below_zero;
  int out;

  int ffn_size() const { return weight.rows / input.num_experts; }
};

struct ExpertDownStep {
  ExpertInput input;     // x: hidden values
  Matrix weight;         // of all experts, each of whole panels
  NeuronMatrix neurons;  // of the first expert; without outputs: none
  size_t expert_bytes;   // from one expert's neurons to those of the next
  int residual;          // buffer, or -1
  int out;
};

struct AttentionStep {
  int q, k, v, out;
  Norm q_norm, k_norm;
  const float* rope_table;  // [num_positions][rope_dims]; null where rope_dims is 0
  int num_positions, rope_dims;
  int num_heads, num_kv_heads, head_dim;
  float scale;
  int window;  // 0: none
  int state, slot;
};

struct AddNormStep {
  int a, b, out;
  Norm norm;  // of b; weight null: a plain sum
};

struct SelectStep {
  int x, out;
};

// A step that the GPU takes.
struct DeviceStep {
  int index;       // in NativeProgram::gpu
  bool is_select;  // the rows that the head reads
};

using Step = std::variant<EmbedStep, EmbedPositionsStep, LinearStep, GluStep, PredictedStep, UpStep, TrimStep, DownStep,
                          RouteStep, ExpertGluStep, ExpertGateStep, ExpertUpStep, ExpertDownStep, AttentionStep,
                          AddNormStep, SelectStep, DeviceStep>;

// Whether it has weights by neuron.
inline bool has_neurons(const Step& step) {
  const auto* up = std::get_if<UpStep>(&step);
  const auto* predicted = std::get_if<PredictedStep>(&step);
  const auto* expert_down = std::get_if<ExpertDownStep>(&step);
  return (up && up->rows.row_bytes) || (predicted && predicted->rows.row_bytes) ||
         (expert_down && expert_down->neurons.outputs) || std::holds_alternative<DownStep>(step) ||
         std::holds_alternative<ExpertUpStep>(step);
}

inline bool selects_rows(const Step& step) {
  const auto* on_device = std::get_if<DeviceStep>(&step);
  return std::holds_alternative<SelectStep>(step) || (on_device && on_device->is_select);
}

// KV pages of one state group, of its layers that the CPU computes: [layer slot][page][kv head], each as table.h has
// it.
struct KvPool {
  uint8_t* data;
  KvType type;
  int num_layers, num_pages, num_kv_heads, head_dim;
  int window;  // of every layer's attention; 0: none

  size_t head_bytes() const { return 2 * kv_half_bytes(type, head_dim); }
  size_t page_bytes() const { return head_bytes() * num_kv_heads; }  // of one layer
  uint8_t* page(int slot, int page) const {
    return data + (static_cast<size_t>(slot) * num_pages + page) * page_bytes();
  }
  uint8_t* head(int slot, int head) const { return page(slot, 0) + head * head_bytes(); }
};

struct NativeProgram {
  int max_tokens;           // rows of a batch
  int max_head_rows;        // rows that the head takes at once
  std::vector<int> widths;  // of the buffers; the last buffer is the logits
  std::vector<Step> steps;  // those from the first selection of rows on run on logit rows
  std::vector<KvPool> pools;
  std::shared_ptr<GpuProgram> gpu;  // null: no step is a DeviceStep
};

}  // namespace isotherm
