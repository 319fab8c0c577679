// Collects a NativeProgram for Python. Checks what comes in; the runtime behind it asserts nothing.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>

#include "../runtime/executor.h"

namespace nb = nanobind;
using namespace isotherm;

// Of what Python holds as a GpuProgram.
std::shared_ptr<GpuProgram> gpu_program(nb::handle bound);

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

WeightType weight_type(const std::string& name) {
  // clang-format off: in the order of WeightType
  static const char* const kNames[kNumWeightTypes] = {
      "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K",
      "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0",
      "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
  };
  // clang-format on
  for (int i = 0; i < kNumWeightTypes; i++)
    if (name == kNames[i]) return static_cast<WeightType>(i);
  throw std::invalid_argument("weight type " + name);
}

Activation activation_named(const std::string& name) {
  static const char* const kNames[] = {"", "silu", "gelu_tanh", "relu", "relu_squared", "drelu"};
  for (int i = 0; i < static_cast<int>(std::size(kNames)); i++)
    if (name == kNames[i]) return static_cast<Activation>(i);
  throw std::invalid_argument("activation " + name);
}

using Form = std::tuple<bool, bool, bool, bool, int>;  // as NeuronForm has it

// A norm by index of its vector, or none.
struct NormRef {
  int vector = -1;
  float eps = 0;
  int bias = -1;
};

struct AttentionSpec {
  int q, k, v, out;
  NormRef q_norm, k_norm;
  int rope_table;
  int num_heads, num_kv_heads, head_dim;
  float scale;
  int window, state, slot;
};

// Collects a NativeProgram. Buffers, vectors, matrices, tables and pools are named by the index that adding them gives.
class ProgramBuilder {
 public:
  ProgramBuilder(int max_tokens, int max_head_rows) {
    require(max_tokens > 0 && max_head_rows > 0, "batch limits must be positive");
    program_.max_tokens = max_tokens;
    program_.max_head_rows = max_head_rows;
  }

  int buffer(int width) {
    require(width > 0, "width");
    program_.widths.push_back(width);
    return static_cast<int>(program_.widths.size()) - 1;
  }

  int vector(const Floats& values) {
    vectors_.emplace_back((values.size() + 63) / 64 * 64, 0.0f);
    std::memcpy(vectors_.back().data(), values.data(), values.size() * sizeof(float));
    return static_cast<int>(vectors_.size()) - 1;
  }

  int matrix(Bytes data, const std::vector<std::string>& types, int rows, int columns) {
    require(types.size() == 1 || types.size() == 2, "one type, or two of a pair");
    const bool is_pair = types.size() == 2;
    Matrix m{data.data(), weight_type(types[0]), weight_type(types.back()), rows, columns, is_pair, 0};
    require(rows > 0 && columns > 0 && data.size() % static_cast<size_t>(m.num_panels()) == 0, "matrix size");
    m.panel_bytes = data.size() / static_cast<size_t>(m.num_panels());
    matrices_.push_back(m);
    arrays_.push_back(nb::cast(data));
    return static_cast<int>(matrices_.size()) - 1;
  }

  int rope_table(FloatRows table) {
    tables_.push_back({table.data(), static_cast<int>(table.shape(0)), static_cast<int>(table.shape(1))});
    arrays_.push_back(nb::cast(table));
    return static_cast<int>(tables_.size()) - 1;
  }

  // num_layers: of those whose attention the CPU computes, which have the first slots.
  int pool(bool is_q8_0, int num_layers, int num_pages, int num_kv_heads, int head_dim, int window) {
    KvPool pool{nullptr, is_q8_0 ? KvType::Q8_0 : KvType::F16, num_layers, num_pages, num_kv_heads, head_dim, window};
    pools_.push_back(
        std::make_shared<Arena>(pool.page_bytes() * static_cast<size_t>(num_pages) * static_cast<size_t>(num_layers)));
    pool.data = pools_.back()->as<uint8_t>();
    program_.pools.push_back(pool);
    return static_cast<int>(program_.pools.size()) - 1;
  }

  // bound: a GpuProgram, for `device_step`; its steps take token ids and positions below these.
  void gpu(nb::object bound, int num_embeddings, int num_positions) {
    program_.gpu = gpu_program(bound);
    gpu_limits_ = {num_embeddings, num_positions};
    arrays_.push_back(std::move(bound));
  }

  void device_step(int index, bool is_select) {
    require(program_.gpu != nullptr && index >= 0 && index < program_.gpu->num_steps(), "device_step");
    program_.steps.push_back(DeviceStep{index, is_select});
  }

  void embed(int matrix, float scale, int out) {
    require(matrices_.at(matrix).type_a == matrices_.at(matrix).type_b && width(out) == matrices_[matrix].columns,
            "embed");
    program_.steps.push_back(EmbedStep{matrices_[matrix], scale, out});
  }

  void embed_positions(int x, int matrix, int first_row, int out) {
    const Matrix& m = matrices_.at(matrix);
    require(m.type_a == m.type_b && width(x) == m.columns && width(out) == m.columns, "embed_positions: shapes");
    require(first_row >= 0 && first_row < m.rows, "embed_positions: first_row");
    program_.steps.push_back(EmbedPositionsStep{m, first_row, x, out});
  }

  void linear(int x, NormRef norm_ref, const std::vector<std::tuple<int, int, int>>& projections, int residual,
              const std::string& activation) {
    program_.steps.push_back(linear_step(x, norm_ref, projections, residual, activation));
  }

  void glu(int x, NormRef norm_ref, int matrix, const std::string& activation, int out) {
    program_.steps.push_back(glu_step(x, norm_ref, matrix, activation, out));
  }

  // activation(gate) * up, of neurons that fire; rows: of the matrix, each in one piece; none: all are computed.
  void up(int x, NormRef norm_ref, int gate, int matrix, Bytes rows, const std::string& activation, int out) {
    const Matrix& m = matrices_.at(matrix);
    require(!m.is_pair && m.columns == width(x) && m.rows == width(out) && width(gate) == m.rows, "up: shapes");
    const Activation named = activation_named(activation);
    program_.steps.push_back(
        UpStep{x, norm(norm_ref, width(x)), gate, m, row_matrix(m, rows), named, fires_below_zero(named), out});
    arrays_.push_back(nb::cast(rows));
  }

  // A projection of the neurons whose score is not below the threshold; rows: as of `up`.
  void predicted(int x, NormRef norm_ref, const std::tuple<int, int, int>& projection, Bytes rows,
                 const std::string& activation, int scores, float threshold) {
    LinearStep linear = linear_step(x, norm_ref, {projection}, -1, activation);
    const Matrix& m = linear.projections[0].weight;
    require(width(scores) == m.rows, "predicted: scores");
    const RowMatrix matrix = row_matrix(m, rows);
    program_.steps.push_back(PredictedStep{std::move(linear), matrix, scores, threshold});
    arrays_.push_back(nb::cast(rows));
  }

  // thresholds: a vector by column, or -1: each row's own, by its mean and deviations.
  void trim(int x, const std::string& activation, int thresholds, float deviations, int out) {
    require(width(x) == width(out), "trim: shapes");
    require(thresholds < 0 || vectors_.at(thresholds).size() >= static_cast<size_t>(width(x)), "trim: thresholds");
    program_.steps.push_back(TrimStep{x, out, activation_named(activation),
                                      thresholds < 0 ? nullptr : vectors_[thresholds].data(), deviations});
  }

  // neurons: codes of each column, then scales, then minima; form: as NeuronForm.
  void down(int x, const std::tuple<int, int, int>& projection, int residual, Bytes neurons, const Form& form) {
    LinearStep linear = linear_step(x, {}, {projection}, residual, "");
    const Matrix& m = linear.projections[0].weight;
    const NeuronMatrix matrix = neuron_matrix(m.rows, m.columns, 1, neurons, form);
    program_.steps.push_back(DownStep{std::move(linear), matrix});
    arrays_.push_back(nb::cast(neurons));
  }

  void route(int logits, int num_experts, int num_used, int out) {
    require(num_used > 0 && num_used <= num_experts && num_used <= kMaxExpertsUsed, "route: experts");
    require(width(logits) == num_experts && width(out) == 2 * num_used, "route: widths");
    program_.steps.push_back(RouteStep{logits, out, num_experts, num_used});
  }

  void expert_glu(int x, NormRef norm_ref, int routes, int matrix, const std::string& activation, int out) {
    const Matrix& m = matrices_.at(matrix);
    const ExpertInput input = expert_input(x, false, norm_ref, routes, m);
    const int ffn_size = m.rows / input.num_experts;
    require(m.is_pair && m.columns == width(x) && width(out) == input.num_used * ffn_size, "expert_glu: shapes");
    require(ffn_size % kTileRows == 0, "expert_glu: whole panels");
    program_.steps.push_back(ExpertGluStep{input, m, activation_named(activation), out});
  }

  void expert_gate(int x, NormRef norm_ref, int routes, int matrix, int out) {
    const Matrix& m = matrices_.at(matrix);
    const ExpertInput input = expert_input(x, false, norm_ref, routes, m);
    require_panels(input, m, x, out);
    program_.steps.push_back(ExpertGateStep{input, m, out});
  }

  // As `up`, of the experts of each row.
  void expert_up(const std::tuple<int, NormRef, int>& from, int gate, int matrix, Bytes rows,
                 const std::string& activation, int out) {
    const auto& [x, norm_ref, routes] = from;
    const Matrix& m = matrices_.at(matrix);
    const ExpertInput input = expert_input(x, false, norm_ref, routes, m);
    require_panels(input, m, x, out);
    require(width(gate) == width(out), "expert_up: gate");
    const RowMatrix matrix_rows = row_matrix(m, rows);
    require(matrix_rows.row_bytes > 0, "expert_up: rows");
    program_.steps.push_back(ExpertUpStep{input, gate, m, matrix_rows, activation_named(activation),
                                          fires_below_zero(activation_named(activation)), out});
    arrays_.push_back(nb::cast(rows));
  }

  // neurons and form: as of `down`, expert after expert; none: every neuron is computed.
  void expert_down(int x, int routes, int matrix, int residual, Bytes neurons, const Form& form, int out) {
    const Matrix& m = matrices_.at(matrix);
    const ExpertInput input = expert_input(x, true, {}, routes, m);
    require(!m.is_pair && width(x) == input.num_used * m.columns && m.rows / input.num_experts == width(out),
            "expert_down: shapes");
    require(width(out) % kPanelRows == 0, "expert_down: whole panels");
    require(residual < 0 || width(residual) == width(out), "expert_down: residual");
    NeuronMatrix first{};
    const size_t num_experts = static_cast<size_t>(input.num_experts);
    if (neurons.size()) first = neuron_matrix(width(out), m.columns, num_experts, neurons, form);
    require(!first.outputs || first.outputs == width(out), "expert_down: whole lines");
    program_.steps.push_back(ExpertDownStep{input, m, first, neurons.size() / num_experts, residual, out});
    arrays_.push_back(nb::cast(neurons));
  }

  void attention(const AttentionSpec& s) {
    const KvPool& pool = program_.pools.at(s.state);
    const auto [rope_table, num_positions, rope_dims] =
        s.rope_table < 0 ? RopeTable{nullptr, INT32_MAX, 0} : tables_.at(s.rope_table);
    require(s.head_dim % 16 == 0 && rope_dims % 2 == 0 && rope_dims <= s.head_dim, "attention: head_dim");
    require(s.num_kv_heads > 0 && s.num_heads % s.num_kv_heads == 0, "attention: heads");
    require(pool.num_kv_heads == s.num_kv_heads && pool.head_dim == s.head_dim && pool.window == s.window,
            "attention: pool");
    require(s.slot >= 0 && s.slot < pool.num_layers, "attention: slot");
    require(width(s.q) == s.num_heads * s.head_dim && width(s.out) == width(s.q), "attention: q");
    require(width(s.k) == s.num_kv_heads * s.head_dim && width(s.v) == width(s.k), "attention: k and v");
    program_.steps.push_back(AttentionStep{s.q, s.k, s.v, s.out, norm(s.q_norm, s.head_dim), norm(s.k_norm, s.head_dim),
                                           rope_table, num_positions, rope_dims, s.num_heads, s.num_kv_heads,
                                           s.head_dim, s.scale, s.window, s.state, s.slot});
  }

  void add_norm(int a, int b, NormRef norm_ref, int out) {
    require(width(a) == width(b) && width(a) == width(out), "add_norm");
    program_.steps.push_back(AddNormStep{a, b, out, norm(norm_ref, width(b))});
  }

  void select(int x, int out) {
    require(width(x) == width(out), "select");
    program_.steps.push_back(SelectStep{x, out});
  }

 private:
  friend class BoundExecutor;

  LinearStep linear_step(int x, NormRef norm_ref, const std::vector<std::tuple<int, int, int>>& projections,
                         int residual, const std::string& activation) const {
    LinearStep step{x, norm(norm_ref, width(x)), {}, residual, activation_named(activation)};
    require(residual < 0 || step.activation == Activation::kNone, "linear: an activation and a residual");
    for (const auto& [matrix, bias, out] : projections) {
      const Matrix& m = matrices_.at(matrix);
      require(!m.is_pair && m.columns == width(x) && m.rows == width(out), "linear: shapes");
      require(residual < 0 || width(residual) == m.rows, "linear: residual");
      require(bias < 0 || vectors_.at(bias).size() >= static_cast<size_t>(m.rows), "linear: bias");
      step.projections.push_back({m, bias < 0 ? nullptr : vectors_[bias].data(), out});
    }
    return step;
  }

  GluStep glu_step(int x, NormRef norm_ref, int matrix, const std::string& activation, int out) const {
    const Matrix& m = matrices_.at(matrix);
    require(m.is_pair && m.columns == width(x) && m.rows == width(out), "glu: shapes");
    return {x, norm(norm_ref, width(x)), m, activation_named(activation), out};
  }

  static bool fires_below_zero(Activation activation) {
    return activation == Activation::kSilu || activation == Activation::kGeluTanh;
  }

  void require_panels(const ExpertInput& input, const Matrix& m, int x, int out) const {
    const int ffn_size = m.rows / input.num_experts;
    require(!m.is_pair && m.columns == width(x) && width(out) == input.num_used * ffn_size, "experts: shapes");
    require(ffn_size % kPanelRows == 0, "experts: whole panels");
  }

  // The columns of the first of `count` matrices of one shape.
  static NeuronMatrix neuron_matrix(int rows, int columns, size_t count, const Bytes& neurons, const Form& form) {
    const auto [is_nibble, is_half, has_minimum, is_halved, zero_point] = form;
    require(!is_halved || !is_half, "down: scales of halves are float32");
    const int outputs = (rows + 127) / 128 * 128, blocks = (columns + kBlockColumns - 1) / kBlockColumns;
    const size_t row_bytes = static_cast<size_t>(is_nibble ? outputs / 2 : outputs),
                 block_bytes = static_cast<size_t>(outputs) * (is_half ? 2 : 4) * (is_halved ? 2 : 1),
                 code_bytes = row_bytes * static_cast<size_t>(columns),
                 plane_bytes = block_bytes * static_cast<size_t>(blocks);
    require(neurons.size() == count * (code_bytes + plane_bytes * (has_minimum ? 2 : 1)), "down: neurons");
    const uint8_t* scales = neurons.data() + code_bytes;
    return {{is_nibble, is_half, has_minimum, is_halved, zero_point},
            neurons.data(),
            scales,
            scales + plane_bytes,
            row_bytes,
            block_bytes,
            outputs};
  }

  // Every row of a matrix in one piece, or none.
  static RowMatrix row_matrix(const Matrix& m, const Bytes& rows) {
    require(rows.size() % static_cast<size_t>(m.rows) == 0, "rows of a matrix");
    return {rows.data(), rows.size() / static_cast<size_t>(m.rows), m.type_a};
  }

  // Ids are not checked while they run: `routes` must come from a route.
  ExpertInput expert_input(int x, bool has_ranks, NormRef norm_ref, int routes, const Matrix& m) const {
    const auto writes = [&](const Step& step) {
      return std::visit(
          [&](const auto& s) {
            if constexpr (requires { s.linear; })
              return s.linear.projections[0].out == routes;
            else if constexpr (requires { s.projections; })
              return std::any_of(s.projections.begin(), s.projections.end(),
                                 [&](const Projection& p) { return p.out == routes; });
            else if constexpr (std::is_same_v<std::decay_t<decltype(s)>, DeviceStep>)
              return program_.gpu->writes(s.index, routes);
            else
              return s.out == routes;
          },
          step);
    };
    const auto& steps = program_.steps;
    const auto last = std::find_if(steps.rbegin(), steps.rend(), writes);
    require(last != steps.rend() && std::holds_alternative<RouteStep>(*last), "experts: routes");
    const RouteStep& route = std::get<RouteStep>(*last);
    require(m.rows % route.num_experts == 0, "experts: rows");
    return {x, has_ranks, norm(norm_ref, width(x)), routes, route.num_experts, route.num_used};
  }

  int width(int buffer) const { return program_.widths.at(buffer); }

  Norm norm(NormRef ref, int width) const {
    if (ref.vector < 0) return {nullptr, 0, nullptr};
    require(vectors_.at(ref.vector).size() >= static_cast<size_t>(width), "norm width");
    require(ref.bias < 0 || vectors_.at(ref.bias).size() >= static_cast<size_t>(width), "norm bias");
    return {vectors_[ref.vector].data(), ref.eps, ref.bias < 0 ? nullptr : vectors_[ref.bias].data()};
  }

  NativeProgram program_;
  std::deque<std::vector<float>> vectors_;
  std::vector<Matrix> matrices_;
  struct RopeTable {
    const float* data;
    int num_positions, dims;
  };
  std::vector<RopeTable> tables_;
  std::vector<std::shared_ptr<Arena>> pools_;
  struct GpuLimits {
    int num_embeddings = 0, num_positions = INT32_MAX;
  };
  GpuLimits gpu_limits_;
  std::vector<nb::object> arrays_;  // what the raw pointers point into
};

}  // namespace
