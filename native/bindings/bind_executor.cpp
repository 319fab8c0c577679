// ProgramBuilder and Executor for Python. Checks what comes in; the runtime behind it asserts nothing.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>

#include "../runtime/executor.h"
#include "../runtime/isa.h"

namespace nb = nanobind;
using namespace isotherm;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Marks = nb::ndarray<nb::numpy, int64_t, nb::ndim<2>>;
using PageBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

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

const KernelTable& table(const std::string& isa) {
  if (const KernelTable* found = find_table(isa)) return *found;
  throw std::invalid_argument("instruction set " + isa);
}

// A norm by index of its vector, or none.
struct NormRef {
  int vector = -1;
  float eps = 0;
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

  int pool(bool is_q8_0, int num_layers, int num_pages, int num_kv_heads, int head_dim) {
    KvPool pool{nullptr, is_q8_0 ? KvType::Q8_0 : KvType::F16, num_layers, num_pages, num_kv_heads, head_dim};
    pools_.push_back(
        std::make_shared<Arena>(pool.page_bytes() * static_cast<size_t>(num_pages) * static_cast<size_t>(num_layers)));
    pool.data = pools_.back()->as<uint8_t>();
    program_.pools.push_back(pool);
    return static_cast<int>(program_.pools.size()) - 1;
  }

  void embed(int matrix, float scale, int out) {
    require(matrices_.at(matrix).type_a == matrices_.at(matrix).type_b && width(out) == matrices_[matrix].columns,
            "embed");
    program_.steps.push_back(EmbedStep{matrices_[matrix], scale, out});
  }

  void linear(int x, NormRef norm_ref, const std::vector<std::tuple<int, int, int>>& projections, int residual) {
    LinearStep step{x, norm(norm_ref, width(x)), {}, residual};
    for (const auto& [matrix, bias, out] : projections) {
      const Matrix& m = matrices_.at(matrix);
      require(!m.is_pair && m.columns == width(x) && m.rows == width(out), "linear: shapes");
      require(residual < 0 || width(residual) == m.rows, "linear: residual");
      require(bias < 0 || vectors_.at(bias).size() >= static_cast<size_t>(m.rows), "linear: bias");
      step.projections.push_back({m, bias < 0 ? nullptr : vectors_[bias].data(), out});
    }
    program_.steps.push_back(std::move(step));
  }

  void glu(int x, NormRef norm_ref, int matrix, bool gelu, int out) {
    const Matrix& m = matrices_.at(matrix);
    require(m.is_pair && m.columns == width(x) && m.rows == width(out), "glu: shapes");
    const Activation activation = gelu ? Activation::kGeluTanh : Activation::kSilu;
    program_.steps.push_back(GluStep{x, norm(norm_ref, width(x)), m, activation, out});
  }

  void attention(const AttentionSpec& s) {
    const KvPool& pool = program_.pools.at(s.state);
    const auto& [rope_table, num_positions, rope_dims] = tables_.at(s.rope_table);
    require(s.head_dim % 16 == 0 && rope_dims % 2 == 0 && rope_dims <= s.head_dim, "attention: head_dim");
    require(s.num_kv_heads > 0 && s.num_heads % s.num_kv_heads == 0, "attention: heads");
    require(pool.num_kv_heads == s.num_kv_heads && pool.head_dim == s.head_dim, "attention: pool");
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

  int width(int buffer) const { return program_.widths.at(buffer); }

  Norm norm(NormRef ref, int width) const {
    if (ref.vector < 0) return {nullptr, 0};
    require(vectors_.at(ref.vector).size() >= static_cast<size_t>(width), "norm width");
    return {vectors_[ref.vector].data(), ref.eps};
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
  std::vector<nb::object> arrays_;  // what the raw pointers point into
};

class BoundExecutor {
 public:
  // Takes the builder's parts: it cannot be used again.
  BoundExecutor(ProgramBuilder& builder, const std::string& isa, int num_threads)
      : vectors_(std::move(builder.vectors_)),
        pools_(std::move(builder.pools_)),
        arrays_(std::move(builder.arrays_)),
        vocab_(builder.program_.widths.back()),
        limits_(builder),
        executor_(std::move(builder.program_), table(isa), num_threads) {}

  // sequences: (num_new, num_cached, page tables by state group)
  bool run(Ints token_ids, const std::vector<std::tuple<int, int, std::vector<Ints>>>& sequences, Ints logit_rows) {
    const int num_tokens = static_cast<int>(token_ids.size());
    require(num_tokens > 0 && num_tokens <= limits_.max_tokens, "tokens of a batch");
    require_range(token_ids, 0, limits_.num_embeddings, "token ids");
    require_range(logit_rows, 0, num_tokens, "logit rows");
    BatchView batch{token_ids.data(), num_tokens, {}, nullptr, static_cast<int>(logit_rows.size())};
    int start = 0;
    for (const auto& [num_new, num_cached, tables] : sequences) {
      require(num_new > 0 && num_cached >= 0 && num_cached <= limits_.num_positions - num_new, "length of a sequence");
      require(tables.size() == limits_.pools.size(), "a page table per state group");
      SequenceView view{start, num_new, num_cached, {}};
      for (size_t i = 0; i < tables.size(); i++) {
        check_pages(tables[i], limits_.pools[i], num_cached, num_cached + num_new);
        view.page_tables.push_back(tables[i].data());
      }
      start += num_new;
      batch.sequences.push_back(std::move(view));
    }
    require(start == num_tokens, "sequences cover the batch");
    logit_rows_.assign(logit_rows.data(), logit_rows.data() + logit_rows.size());
    batch.logit_rows = logit_rows_.data();
    return finish([&](const auto& poll) { return executor_.run(batch, poll); });
  }

  bool head(int first, LogitRows logits) {
    const int count = static_cast<int>(logits.shape(0));
    require(count > 0 && count <= limits_.max_head_rows && first >= 0 &&
                first + count <= static_cast<int>(logit_rows_.size()),
            "head rows");
    require(static_cast<int>(logits.shape(1)) == vocab_, "head columns");
    float* data = logits.data();
    return finish([&](const auto& poll) { return executor_.head(first, count, data, poll); });
  }

  // A page of a state group, all layers: [layer slot][kv head], each as table.h has it.
  void read_page(int group, int page, PageBytes out) {
    const KvPool& pool = pool_of(group, page, out.size());
    uint8_t* to = out.data();
    const nb::gil_scoped_release nogil;
    const size_t bytes = pool.page_bytes();
    for (int slot = 0; slot < pool.num_layers; slot++) std::memcpy(to + slot * bytes, pool.page(slot, page), bytes);
  }

  void write_page(int group, int page, Bytes data) {
    const KvPool& pool = pool_of(group, page, data.size());
    const uint8_t* from = data.data();
    const nb::gil_scoped_release nogil;
    const size_t bytes = pool.page_bytes();
    for (int slot = 0; slot < pool.num_layers; slot++) std::memcpy(pool.page(slot, page), from + slot * bytes, bytes);
  }

  double read_weights() {
    nb::gil_scoped_release nogil;
    return executor_.read_weights();
  }

  double busy_s() const { return executor_.busy_s(); }

  void start_log(int64_t capacity) {
    require(capacity > 0, "capacity of a log");
    executor_.start_log(static_cast<size_t>(capacity));
  }

  // By thread: int64 [marks][2], the second with step in its low half and phase in its high one.
  std::vector<Marks> stop_log() {
    const std::shared_ptr<StepLog> log = executor_.stop_log();
    require(log != nullptr, "no log was started");
    std::vector<Marks> lanes;
    for (int thread = 0; thread < executor_.num_threads(); thread++) {
      const std::vector<Mark>& marks = log->marks(thread);
      static_assert(sizeof(Mark) == 2 * sizeof(int64_t));
      const nb::capsule owner(new std::shared_ptr(log),
                              [](void* p) noexcept { delete static_cast<std::shared_ptr<StepLog>*>(p); });
      lanes.emplace_back(const_cast<Mark*>(marks.data()), std::initializer_list<size_t>{marks.size(), 2}, owner);
    }
    return lanes;
  }

 private:
  struct Pool {
    KvPool kv;
    int window;
  };

  // What a batch is checked against.
  struct Limits {
    explicit Limits(const ProgramBuilder& builder)
        : max_tokens(builder.program_.max_tokens), max_head_rows(builder.program_.max_head_rows) {
      for (const KvPool& pool : builder.program_.pools) pools.push_back({pool, 0});
      for (const Step& step : builder.program_.steps) {
        if (const auto* embed = std::get_if<EmbedStep>(&step)) num_embeddings = embed->weight.rows;
        if (const auto* attention = std::get_if<AttentionStep>(&step)) {
          pools[static_cast<size_t>(attention->state)].window = attention->window;
          num_positions = std::min(num_positions, attention->num_positions);
        }
      }
    }
    int max_tokens, max_head_rows;
    int num_embeddings = 0, num_positions = INT32_MAX;
    std::vector<Pool> pools;
  };

  static void require_range(const Ints& values, int low, int high, const char* what) {
    for (size_t i = 0; i < values.size(); i++) require(values.data()[i] >= low && values.data()[i] < high, what);
  }

  const KvPool& pool_of(int group, int page, size_t num_bytes) const {
    require(group >= 0 && group < static_cast<int>(limits_.pools.size()), "state group");
    const KvPool& pool = limits_.pools[static_cast<size_t>(group)].kv;
    require(page >= 0 && page < pool.num_pages, "page");
    require(num_bytes == pool.page_bytes() * static_cast<size_t>(pool.num_layers), "bytes of a page");
    return pool;
  }

  // Every position that the new tokens see, their own included, has a page of the pool.
  static void check_pages(const Ints& pages, const Pool& pool, int num_cached, int end) {
    const int oldest = pool.window && num_cached + 1 > pool.window ? num_cached + 1 - pool.window : 0;
    require(static_cast<int>(pages.size()) >= (end + kPageTokens - 1) / kPageTokens, "page table is too short");
    for (int i = oldest / kPageTokens; i <= (end - 1) / kPageTokens; i++)
      require(pages.data()[i] >= 0 && pages.data()[i] < pool.kv.num_pages, "page of a visible position");
  }

  // Releases the GIL for the run; takes it back now and then to let Python's signal handlers speak.
  template <class Run>
  static bool finish(Run run) {
    bool finished;
    {
      nb::gil_scoped_release nogil;
      finished = run([] {
        nb::gil_scoped_acquire gil;
        return PyErr_CheckSignals() != 0;
      });
    }
    if (PyErr_Occurred()) throw nb::python_error();
    return finished;
  }

  std::deque<std::vector<float>> vectors_;
  std::vector<std::shared_ptr<Arena>> pools_;
  std::vector<nb::object> arrays_;
  int vocab_;
  Limits limits_;
  Executor executor_;
  std::vector<int32_t> logit_rows_;
};

}  // namespace

void bind_executor(nb::module_& m) {
  nb::class_<NormRef>(m, "NormRef").def(nb::init<int, float>(), nb::arg("vector"), nb::arg("eps"));
  nb::class_<AttentionSpec>(m, "AttentionSpec")
      .def(nb::init<>())
      .def_rw("q", &AttentionSpec::q)
      .def_rw("k", &AttentionSpec::k)
      .def_rw("v", &AttentionSpec::v)
      .def_rw("out", &AttentionSpec::out)
      .def_rw("q_norm", &AttentionSpec::q_norm)
      .def_rw("k_norm", &AttentionSpec::k_norm)
      .def_rw("rope_table", &AttentionSpec::rope_table)
      .def_rw("num_heads", &AttentionSpec::num_heads)
      .def_rw("num_kv_heads", &AttentionSpec::num_kv_heads)
      .def_rw("head_dim", &AttentionSpec::head_dim)
      .def_rw("scale", &AttentionSpec::scale)
      .def_rw("window", &AttentionSpec::window)
      .def_rw("state", &AttentionSpec::state)
      .def_rw("slot", &AttentionSpec::slot);
  nb::class_<ProgramBuilder>(m, "ProgramBuilder")
      .def(nb::init<int, int>(), nb::arg("max_tokens"), nb::arg("max_head_rows"))
      .def("buffer", &ProgramBuilder::buffer)
      .def("vector", &ProgramBuilder::vector)
      .def("matrix", &ProgramBuilder::matrix)
      .def("rope_table", &ProgramBuilder::rope_table)
      .def("pool", &ProgramBuilder::pool)
      .def("embed", &ProgramBuilder::embed)
      .def("linear", &ProgramBuilder::linear)
      .def("glu", &ProgramBuilder::glu)
      .def("attention", &ProgramBuilder::attention)
      .def("add_norm", &ProgramBuilder::add_norm)
      .def("select", &ProgramBuilder::select);
  nb::class_<BoundExecutor>(m, "Executor")
      .def(nb::init<ProgramBuilder&, const std::string&, int>(), nb::arg("builder"), nb::arg("isa"),
           nb::arg("num_threads"))
      .def("run", &BoundExecutor::run)
      .def("head", &BoundExecutor::head)
      .def("read_page", &BoundExecutor::read_page)
      .def("write_page", &BoundExecutor::write_page)
      .def("read_weights", &BoundExecutor::read_weights)
      .def_prop_ro("busy_s", &BoundExecutor::busy_s)
      .def("start_log", &BoundExecutor::start_log, nb::arg("capacity"))
      .def("stop_log", &BoundExecutor::stop_log);
}
