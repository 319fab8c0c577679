// ProgramBuilder and Executor for Python. Checks what comes in; the runtime behind it asserts nothing.
#include <algorithm>
#include <cstring>

#include "../runtime/isa.h"
#include "program_builder.h"

namespace {

using Marks = nb::ndarray<nb::numpy, int64_t, nb::ndim<2>>;
using PageBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using LogitRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const KernelTable& table(const std::string& isa) {
  if (const KernelTable* found = find_table(isa)) return *found;
  throw std::invalid_argument("instruction set " + isa);
}

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

  using Sequences = std::vector<std::tuple<int, int, std::vector<Ints>, bool>>;  // see Sequence in batch.py

  bool run(Ints token_ids, const Sequences& sequences, Ints logit_rows) {
    const BatchView batch = view(token_ids, sequences, logit_rows);
    return finish([&](const auto& poll) { return executor_.run(batch, poll); });
  }

  // stops: (step, buffer), rising. look(index of the stop, float32 [rows][width]) gets a copy.
  bool observe(Ints token_ids, const Sequences& sequences, Ints logit_rows,
               const std::vector<std::tuple<int, int>>& stops, const nb::callable& look) {
    const BatchView batch = view(token_ids, sequences, logit_rows);
    std::vector<Executor::Stop> checked;
    for (const auto& [step, buffer] : stops) {
      require(step >= 0 && step < limits_.num_steps, "step");
      require(checked.empty() || static_cast<int>(checked.back().step) <= step, "stops rise");
      require(buffer >= 0 && buffer + 1 < static_cast<int>(limits_.widths.size()), "buffer");
      checked.push_back({static_cast<size_t>(step), buffer});
    }
    const auto copy = [&](size_t stop, const float* rows, size_t stride, int count) {
      const nb::gil_scoped_acquire gil;
      const auto width = static_cast<size_t>(limits_.widths[static_cast<size_t>(checked[stop].buffer)]);
      auto* copied = new float[static_cast<size_t>(count) * width];
      const nb::capsule owner(copied, [](void* p) noexcept { delete[] static_cast<float*>(p); });
      for (int i = 0; i < count; i++)
        std::memcpy(copied + static_cast<size_t>(i) * width, rows + static_cast<size_t>(i) * stride,
                    width * sizeof(float));
      look(stop, nb::ndarray<nb::numpy, float, nb::ndim<2>>(copied, {static_cast<size_t>(count), width}, owner));
    };
    return finish([&](const auto& poll) { return executor_.observe(batch, checked, copy, poll); });
  }

  bool head(int first, LogitRows logits) {
    const int count = static_cast<int>(logits.shape(0));
    check_head_rows(first, count);
    require(static_cast<int>(logits.shape(1)) == vocab_, "head columns");
    float* data = logits.data();
    return finish([&](const auto& poll) { return executor_.head(first, count, data, poll); });
  }

  // out: uint32 [rows][shortlist_words]; kept: of each row's logits.
  bool shortlist(int first, Ints kept, Words out) {
    const int count = static_cast<int>(kept.size()), words = limits_.gpu ? limits_.gpu->shortlist_words() : 0;
    check_head_rows(first, count);
    require(words > 0 && out.shape(0) == kept.size() && static_cast<int>(out.shape(1)) == words, "shortlists");
    require_range(kept, 1, limits_.gpu->most_kept() + 1, "kept logits");
    return finish([&](const auto& poll) { return executor_.shortlist(first, count, kept.data(), out.data(), poll); });
  }

  // A page of a state group, all layers: [layer slot][kv head], each as table.h has it; those of a GPU come last.
  void read_page(int group, int page, PageBytes out) {
    const KvPool& pool = pool_of(group, page, out.size());
    uint8_t* to = out.data();
    const nb::gil_scoped_release nogil;
    const size_t bytes = pool.page_bytes(), own = bytes * static_cast<size_t>(pool.num_layers);
    for (int slot = 0; slot < pool.num_layers; slot++) std::memcpy(to + slot * bytes, pool.page(slot, page), bytes);
    if (limits_.gpu) limits_.gpu->read_page(group, page, bytes, to + own);
  }

  void write_page(int group, int page, Bytes data) {
    const KvPool& pool = pool_of(group, page, data.size());
    const uint8_t* from = data.data();
    const nb::gil_scoped_release nogil;
    const size_t bytes = pool.page_bytes(), own = bytes * static_cast<size_t>(pool.num_layers);
    for (int slot = 0; slot < pool.num_layers; slot++) std::memcpy(pool.page(slot, page), from + slot * bytes, bytes);
    if (limits_.gpu) limits_.gpu->write_page(group, page, bytes, from + own);
  }

  double read_weights() {
    nb::gil_scoped_release nogil;
    return executor_.read_weights();
  }

  int few_rows() const { return executor_.few_rows(); }

  void set_most_active(int step, int num_rows, int most_active) {
    check_neurons(step, num_rows, most_active);
    executor_.set_most_active(static_cast<size_t>(step), num_rows, most_active);
  }

  double time_neurons(int step, int num_rows, int num_active, bool is_alone) {
    check_neurons(step, num_rows, num_active);
    nb::gil_scoped_release nogil;
    return executor_.time_neurons(static_cast<size_t>(step), num_rows, num_active, is_alone);
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
  void check_head_rows(int first, int count) const {
    require(count > 0 && count <= limits_.max_head_rows && first >= 0 &&
                first + count <= static_cast<int>(logit_rows_.size()),
            "head rows");
  }

  void check_neurons(int step, int num_rows, int num_neurons) const {
    require(step >= 0 && step < limits_.num_steps && limits_.has_neurons[static_cast<size_t>(step)], "step of neurons");
    require(num_rows > 0 && num_rows <= few_rows(), "rows");
    require(num_neurons >= 0, "neurons");
  }

  // What a batch is checked against.
  struct Limits {
    explicit Limits(const ProgramBuilder& builder)
        : max_tokens(builder.program_.max_tokens),
          max_head_rows(builder.program_.max_head_rows),
          num_steps(static_cast<int>(builder.program_.steps.size())),
          widths(builder.program_.widths),
          pools(builder.program_.pools),
          gpu(builder.program_.gpu),
          num_embeddings(builder.gpu_limits_.num_embeddings),
          num_positions(builder.gpu_limits_.num_positions) {
      for (const Step& step : builder.program_.steps) {
        has_neurons.push_back(isotherm::has_neurons(step));
        if (const auto* embed = std::get_if<EmbedStep>(&step)) num_embeddings = embed->weight.rows;
        if (const auto* embed = std::get_if<EmbedPositionsStep>(&step))
          num_positions = std::min(num_positions, embed->weight.rows - embed->first_row);
        if (const auto* attention = std::get_if<AttentionStep>(&step))
          num_positions = std::min(num_positions, attention->num_positions);
      }
    }
    int max_tokens, max_head_rows, num_steps;
    std::vector<bool> has_neurons;  // by step
    std::vector<int> widths;        // of the buffers; the last one is the logits
    std::vector<KvPool> pools;
    std::shared_ptr<GpuProgram> gpu;  // or null
    int num_embeddings, num_positions;
  };

  BatchView view(const Ints& token_ids, const Sequences& sequences, const Ints& logit_rows) {
    const int num_tokens = static_cast<int>(token_ids.size());
    require(num_tokens > 0 && num_tokens <= limits_.max_tokens, "tokens of a batch");
    require_range(token_ids, 0, limits_.num_embeddings, "token ids");
    require_range(logit_rows, 0, num_tokens, "logit rows");
    BatchView batch{token_ids.data(), num_tokens, {}, nullptr, static_cast<int>(logit_rows.size())};
    int start = 0;
    for (const auto& [num_new, num_cached, tables, is_trimmed] : sequences) {
      require(num_new > 0 && num_cached >= 0 && num_cached <= limits_.num_positions - num_new, "length of a sequence");
      require(tables.size() == limits_.pools.size(), "a page table per state group");
      SequenceView view{start, num_new, num_cached, {}, is_trimmed};
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
    return batch;
  }

  static void require_range(const Ints& values, int low, int high, const char* what) {
    for (size_t i = 0; i < values.size(); i++) require(values.data()[i] >= low && values.data()[i] < high, what);
  }

  const KvPool& pool_of(int group, int page, size_t num_bytes) const {
    require(group >= 0 && group < static_cast<int>(limits_.pools.size()), "state group");
    const KvPool& pool = limits_.pools[static_cast<size_t>(group)];
    require(page >= 0 && page < pool.num_pages, "page");
    const int num_layers = pool.num_layers + (limits_.gpu ? limits_.gpu->num_layers(group) : 0);
    require(num_bytes == pool.page_bytes() * static_cast<size_t>(num_layers), "bytes of a page");
    return pool;
  }

  // Every position that the new tokens see, their own included, has a page of the pool.
  static void check_pages(const Ints& pages, const KvPool& pool, int num_cached, int end) {
    const int oldest = pool.window && num_cached + 1 > pool.window ? num_cached + 1 - pool.window : 0;
    require(static_cast<int>(pages.size()) >= (end + kPageTokens - 1) / kPageTokens, "page table is too short");
    for (int i = oldest / kPageTokens; i <= (end - 1) / kPageTokens; i++)
      require(pages.data()[i] >= 0 && pages.data()[i] < pool.num_pages, "page of a visible position");
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
  nb::class_<NormRef>(m, "NormRef")
      .def(nb::init<int, float, int>(), nb::arg("vector"), nb::arg("eps"), nb::arg("bias") = -1);
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
      .def("gpu", &ProgramBuilder::gpu)
      .def("device_step", &ProgramBuilder::device_step)
      .def("embed", &ProgramBuilder::embed)
      .def("embed_positions", &ProgramBuilder::embed_positions)
      .def("linear", &ProgramBuilder::linear)
      .def("glu", &ProgramBuilder::glu)
      .def("predicted", &ProgramBuilder::predicted)
      .def("up", &ProgramBuilder::up)
      .def("trim", &ProgramBuilder::trim)
      .def("down", &ProgramBuilder::down)
      .def("route", &ProgramBuilder::route)
      .def("expert_glu", &ProgramBuilder::expert_glu)
      .def("expert_gate", &ProgramBuilder::expert_gate)
      .def("expert_up", &ProgramBuilder::expert_up)
      .def("expert_down", &ProgramBuilder::expert_down)
      .def("attention", &ProgramBuilder::attention)
      .def("add_norm", &ProgramBuilder::add_norm)
      .def("select", &ProgramBuilder::select);
  nb::class_<BoundExecutor>(m, "Executor")
      .def(nb::init<ProgramBuilder&, const std::string&, int>(), nb::arg("builder"), nb::arg("isa"),
           nb::arg("num_threads"))
      .def("run", &BoundExecutor::run)
      .def("head", &BoundExecutor::head)
      .def("shortlist", &BoundExecutor::shortlist)
      .def("observe", &BoundExecutor::observe)
      .def("read_page", &BoundExecutor::read_page)
      .def("write_page", &BoundExecutor::write_page)
      .def_prop_ro("few_rows", &BoundExecutor::few_rows)
      .def("set_most_active", &BoundExecutor::set_most_active)
      .def("time_neurons", &BoundExecutor::time_neurons)
      .def("read_weights", &BoundExecutor::read_weights)
      .def_prop_ro("busy_s", &BoundExecutor::busy_s)
      .def("start_log", &BoundExecutor::start_log, nb::arg("capacity"))
      .def("stop_log", &BoundExecutor::stop_log);
}
