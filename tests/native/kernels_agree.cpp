// Runs every kernel of every table that this processor has on the same random inputs, and compares what they give with
// the plain C++ kernels, bit for bit. Where both are not a number, that is equal; its payload is no part of the
// contract.
//
//   kernels_agree [NAME...]   prints a hash of the plain kernels' outputs, which is the same on any processor; fails if
//                             a table differs from them, or if the tables found are not those named
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../native/runtime/isa.h"

using namespace isotherm;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();
constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGeluTanh, Activation::kRelu,
                                       Activation::kReluSquared, Activation::kDrelu};

class Random {  // SplitMix64: the same on any machine
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint64_t>(n)); }
  float number() {  // in [-1, 1), and of any of 16 magnitudes
    const float x = static_cast<float>(static_cast<int>(bits() >> 40) - (1 << 23)) * 0x1p-23f;
    return std::ldexp(x, -below(16));
  }
  std::vector<float> numbers(size_t n, float scale = 1.0f) {
    std::vector<float> out(n);
    for (float& x : out) x = number() * scale;
    return out;
  }

 private:
  uint64_t state_;
};

struct Output {
  std::string name;
  std::vector<uint32_t> bits;
};

// What one table gave, in the order of the cases.
class Outputs {
 public:
  void add(const std::string& name, const float* values, size_t n) {
    Output out{name, std::vector<uint32_t>(n)};
    for (size_t i = 0; i < n; i++) {
      std::memcpy(&out.bits[i], values + i, 4);
      if (std::isnan(values[i])) out.bits[i] = 0x7FC00000;
    }
    all_.push_back(std::move(out));
  }
  void add(const std::string& name, const std::vector<float>& values) { add(name, values.data(), values.size()); }
  template <class T>
  void add_integers(const std::string& name, const std::vector<T>& values) {
    all_.push_back({name, {}});
    for (const T v : values) all_.back().bits.push_back(static_cast<uint32_t>(v));
  }
  const std::vector<Output>& all() const { return all_; }

 private:
  std::vector<Output> all_;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  const auto append = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      out += std::to_string(part);
    } else {
      out += part;
    }
    out += ' ';
  };
  (append(parts), ...);
  return out;
}

// --- quantised rows and panels ---

struct Rows {  // owns what a QuantRows points to
  QuantRows view{};
  std::vector<int8_t> codes;
  std::vector<float> scales, sums, half_sums, values;
  std::vector<int32_t> starts[kNumStarts];

  Rows(const KernelTable& table, int num_rows, int columns) {
    view.columns = columns;
    view.bundle_rows = bundle_rows(table, num_rows);
    const size_t elements = static_cast<size_t>(num_rows + view.bundle_rows) * columns;
    codes.resize(elements);
    scales.resize(elements / kBlockColumns);
    sums.resize(elements / kBlockColumns);
    half_sums.resize(elements / 16);
    values.resize(elements);
    view.codes = codes.data();
    view.scales = scales.data();
    view.sums = sums.data();
    view.half_sums = half_sums.data();
    view.values = values.data();
    for (int i = 0; i < kNumStarts; i++) {
      starts[i].resize(elements / 16);
      view.starts[i] = starts[i].data();
    }
  }
};

// Element `i` of row `row` in an array of bundles whose rows have `length` elements, `unit` of them together.
size_t place(const QuantRows& x, int row, int length, int unit, int i) {
  const int lane = row % x.bundle_rows;
  return static_cast<size_t>(row - lane) * length +
         static_cast<size_t>((i / unit * x.bundle_rows + lane) * unit + i % unit);
}

template <class T>
std::vector<T> of_row(const QuantRows& x, const T* data, int row, int length, int unit) {
  std::vector<T> out;
  for (int i = 0; i < length; i++) out.push_back(data[place(x, row, length, unit, i)]);
  return out;
}

// Rows whose blocks are ordinary, all zero, tiny, huge, or full of ties.
std::vector<float> activations(Random& random, int columns) {
  std::vector<float> x = random.numbers(static_cast<size_t>(columns));
  for (int block = 0; block < columns / kBlockColumns; block++) {
    float* p = x.data() + block * kBlockColumns;
    const int kind = random.below(8);
    for (int i = 0; i < kBlockColumns; i++) {
      if (kind == 0) p[i] = 0.0f;
      if (kind == 1) p[i] *= 0x1p-120f;
      if (kind == 2) p[i] *= 0x1p+100f;
      if (kind == 3) p[i] = i ? static_cast<float>(random.below(253) - 126) + 0.5f : 127.0f;
    }
  }
  return x;
}

void run_quantise(const KernelTable& table, Random& random, Outputs& out) {
  for (const int num_rows : {1, 2, 3, 7}) {
    const int columns = 64 * (1 + random.below(9));
    Rows rows(table, num_rows, columns);
    for (int r = 0; r < num_rows; r++) table.quantise(activations(random, columns).data(), rows.view, r);
    for (int r = 0; r < num_rows; r++) {
      const std::string name = text("quantise", num_rows, columns, r);
      const QuantRows& x = rows.view;
      out.add_integers(name + "codes", of_row(x, x.codes, r, columns, 4));
      out.add(name + "scales", of_row(x, x.scales, r, columns / kBlockColumns, 1));
      out.add(name + "sums", of_row(x, x.sums, r, columns / kBlockColumns, 1));
      out.add(name + "half_sums", of_row(x, x.half_sums, r, columns / 16, 1));
      for (int i = 0; i < kNumStarts; i++)
        out.add_integers(name + "starts", of_row(x, x.starts[i], r, columns / kStarts[i].columns, 1));
      out.add(name + "values", x.values + static_cast<size_t>(r) * columns, static_cast<size_t>(columns));
    }
  }
  for (const float fault : {kInfinity, -kInfinity, kNotANumber}) {
    Rows rows(table, 1, 128);
    std::vector<float> x = random.numbers(128);
    x[static_cast<size_t>(random.below(128))] = fault;
    table.quantise(x.data(), rows.view, 0);
    out.add("quantise what is not finite: scales", rows.view.scales, 4);
  }
}

// Any bytes, which no weight type's layout forbids. `sound`: no float16, bfloat16 or float32 among them is 2 or more,
// so that sums stay finite, whatever lies where.
std::vector<uint8_t> panel_bytes(Random& random, int columns, bool sound) {
  std::vector<uint8_t> bytes(static_cast<size_t>(columns + 2 * kChunkColumns) * kPanelRows * 4);
  for (size_t i = 0; i < bytes.size(); i += 8) {
    const uint64_t word = random.bits() & (sound ? 0xBFFFBFFFBFFFBFFF : ~uint64_t{0});
    std::memcpy(bytes.data() + i, &word, 8);
  }
  return bytes;
}

void run_multiply(const KernelTable& table, Random& random, Outputs& out) {
  const auto multiply = [&](int a, int b, int num_rows, int columns, bool sound) {
    const std::vector<uint8_t> panel = panel_bytes(random, columns, sound);
    Rows rows(table, num_rows, columns);
    for (int r = 0; r < num_rows; r++) table.quantise(activations(random, columns).data(), rows.view, r);
    std::vector<float> totals(static_cast<size_t>(num_rows) * kPanelRows);
    table.multiply_panel(
        {panel.data(), static_cast<WeightType>(a), static_cast<WeightType>(b), &rows.view, num_rows, totals.data()});
    out.add(text("multiply_panel, types", a, b, "rows", num_rows, "columns", columns), totals);
  };
  for (int type = 0; type < kNumWeightTypes; type++) {
    for (int num_rows = 1; num_rows <= 9; num_rows++) multiply(type, type, num_rows, 64 * (1 + random.below(9)), true);
    multiply(type, type, 13, 512, true);
    multiply(type, type, 2, 64, false);
    for (int other = 0; other < kNumWeightTypes; other++)
      if (other != type && random.below(4) == 0) multiply(type, other, 1 + random.below(5), 320, true);
  }
}

// --- neurons that fire ---

void run_rows(const KernelTable& table, Random& random, Outputs& out) {
  constexpr int kNumRows = 40;
  for (int type = 0; type < kNumWeightTypes; type++)
    for (const int count : {1, 16, 17, 32}) {
      const int columns = 256 * (1 + random.below(3));
      const size_t row_bytes = sizeof(float) * static_cast<size_t>(columns);  // at least as many as any type has
      const std::vector<uint8_t> data = panel_bytes(random, 2 * columns, true);
      std::vector<int32_t> ids;
      for (int i = 0; i < count; i++) ids.push_back(random.below(kNumRows));
      Rows rows(table, 1, columns);
      table.quantise(activations(random, columns).data(), rows.view, 0);
      std::vector<float> totals(kPanelRows);
      table.multiply_rows({data.data(), row_bytes, static_cast<WeightType>(type), ids.data(), count, ids.data(), 1,
                           &rows.view, 1, totals.data()});
      totals.resize(static_cast<size_t>(count));
      out.add(text("multiply_rows, type", type, "rows", count, "columns", columns), totals);
    }
}

void run_neurons(const KernelTable& table, Random& random, Outputs& out) {
  constexpr int kOutputs = 384, kNeurons = 64;
  for (int i = 0; i < 96; i++) {
    const bool is_halved = i % 3 == 2;
    const NeuronForm form{(i & 1) != 0, !is_halved && (i & 2) != 0, (i & 4) != 0, is_halved, 1 << random.below(8)};
    const size_t row_bytes = form.is_nibble ? kOutputs / 2 : kOutputs;
    const std::vector<uint8_t> codes = panel_bytes(random, kChunkColumns, false),
                               planes = panel_bytes(random, kChunkColumns, true);
    std::vector<int32_t> ids;
    std::vector<int8_t> activations;
    for (int n = 0; n < 4 * (1 + random.below(8)); n++) {
      ids.push_back(random.below(kNeurons));
      activations.push_back(static_cast<int8_t>(random.below(255) - 127));
    }
    std::vector<float> y = random.numbers(kOutputs);
    const int end = static_cast<int>(ids.size() / 4), middle = is_halved ? random.below(end + 1) : end;
    const auto sum = [&] { return static_cast<float>(random.below(8000) - 4000); };
    table.add_neurons({form,
                       codes.data(),
                       row_bytes,
                       ids.data(),
                       activations.data(),
                       {middle, end},
                       ids.data(),
                       4,
                       planes.data(),
                       planes.data() + 4096,
                       2048,
                       0,
                       {sum(), sum()},
                       random.number(),
                       128,
                       kOutputs,
                       y.data()});
    out.add(text("add_neurons", form.is_nibble, form.is_half, form.has_minimum, form.is_halved), y);
  }
}

// --- experts ---

void run_experts(const KernelTable& table, Random& random, Outputs& out) {
  for (const int num_experts : {2, 7, 16, 40, 300})
    for (const int num_used : {1, 2, 16, 17, 64}) {
      if (num_used > num_experts) continue;
      for (const int kind : {0, 1, 2, 3}) {
        auto logits = random.numbers(static_cast<size_t>(num_experts), kind == 1 ? 200.0f : 4.0f);
        if (kind == 2)
          for (float& x : logits) x = std::nearbyint(x);  // many are equal
        constexpr float kOdd[] = {kInfinity, -kInfinity, kNotANumber};
        if (kind == 3) logits[static_cast<size_t>(random.below(num_experts))] = kOdd[random.below(3)];
        std::vector<float> routes(2 * static_cast<size_t>(num_used));
        table.route(logits.data(), num_experts, num_used, routes.data());
        out.add(text("route", num_experts, num_used, "kind", kind), routes);
      }
      const auto totals = random.numbers(50 * kPanelRows, 3.0f), residual = random.numbers(kPanelRows),
                 weights = random.numbers(static_cast<size_t>(num_used));
      std::vector<int32_t> places;
      for (int i = 0; i < num_used; i++) places.push_back(random.below(50));
      for (const float* r : {residual.data(), static_cast<const float*>(nullptr)}) {
        std::vector<float> y(kPanelRows);
        table.mix({totals.data(), kPanelRows, places.data(), weights.data(), num_used, r, y.data()});
        out.add(text("mix", num_used, r != nullptr), y);
      }
    }
}

void run_embed(const KernelTable& table, Random& random, Outputs& out) {
  for (int type = 0; type < kNumWeightTypes; type++)
    for (const int columns : {64, 320}) {
      const std::vector<uint8_t> panel = panel_bytes(random, columns, true);
      std::vector<float> row(static_cast<size_t>(columns));
      const int lane = random.below(kPanelRows);
      table.embed_row(panel.data(), static_cast<WeightType>(type), lane, columns, random.number(), row.data());
      out.add(text("embed_row, type", type, "lane", lane, "columns", columns), row);
    }
}

// --- everything between the matmuls ---

void run_elementwise(const KernelTable& table, Random& random, Outputs& out) {
  for (const size_t n : {64, 192, 1088}) {
    const auto a = random.numbers(n, 3.0f), b = random.numbers(n, 3.0f), weight = random.numbers(n, 2.0f);
    std::vector<float> y(n);
    const int length = static_cast<int>(n);
    table.rms_norm(a.data(), weight.data(), length, 1e-5f, y.data());
    out.add(text("rms_norm", length), y);
    table.layer_norm(a.data(), weight.data(), b.data(), length, 1e-5f, y.data());
    out.add(text("layer_norm", length), y);
    table.add_norm(a.data(), b.data(), weight.data(), length, 1e-6f, y.data());
    out.add(text("add_norm", length), y);
    table.add(a.data(), b.data(), length, y.data());
    out.add(text("add", length), y);
  }
  for (int i = 0; i < 64; i++) {
    auto totals = random.numbers(kPanelRows, 200.0f);
    const auto bias = random.numbers(kPanelRows), residual = random.numbers(kPanelRows);
    std::vector<float> y(kPanelRows), gated(kTileRows);
    for (const Activation activation : kActivations) {
      table.finish_linear(totals.data(), i & 1 ? bias.data() : nullptr, activation, i & 2 ? residual.data() : nullptr,
                          y.data());
      out.add(text("finish_linear", static_cast<int>(activation)), y);
    }
    constexpr float kOdd[] = {0.0f,  -0.0f,  87.0f,     -87.0f,    88.0f,      -88.0f,
                              1e30f, -1e30f, 0x1p-140f, kInfinity, -kInfinity, kNotANumber};
    if (i % 4 == 0) std::copy(std::begin(kOdd), std::end(kOdd), totals.begin());
    for (const Activation activation : kActivations) {
      table.finish_glu(totals.data(), activation, gated.data());
      out.add(text("finish_glu", static_cast<int>(activation)), gated);
      const float* thresholds = i % 3 ? residual.data() : nullptr;
      table.trim({totals.data(), 30, activation, thresholds, random.number(), 16, 32, y.data()});
      out.add(text("trim", static_cast<int>(activation), i % 3), y);
    }
  }
  for (const int head_dim : {32, 64, 80, 128})
    for (const int dims : {head_dim, head_dim / 2, 20})
      for (const bool normed : {false, true}) {
        auto head = random.numbers(static_cast<size_t>(head_dim));
        const auto turns = random.numbers(static_cast<size_t>(dims)),
                   norm = random.numbers(static_cast<size_t>(head_dim));
        table.rope({turns.data(), dims, head_dim, normed ? norm.data() : nullptr, 1e-6f}, head.data());
        out.add(text("rope", head_dim, dims, normed), head);
      }
}

// --- attention ---

void run_attention(const KernelTable& table, Random& random, Outputs& out, KvType type, int head_dim, int group,
                   int num_tokens, int first_position, int window) {
  const int length = first_position + num_tokens, num_pages = (length + kPageTokens - 1) / kPageTokens;
  const size_t page_stride = 2 * kv_half_bytes(type, head_dim);
  const std::string name = text(type == KvType::F16 ? "float16" : "q8_0", "head_dim", head_dim, "group", group,
                                "tokens", num_tokens, "from", first_position, "window", window);
  std::vector<int32_t> pages(static_cast<size_t>(num_pages));
  for (int i = 0; i < num_pages; i++) pages[static_cast<size_t>(i)] = num_pages - 1 - i;
  std::vector<uint8_t> kv(static_cast<size_t>(num_pages) * page_stride);
  for (int position = 0; position < length; position++) {
    auto k = random.numbers(static_cast<size_t>(head_dim), 2.0f), v = random.numbers(static_cast<size_t>(head_dim));
    if (position % 50 == 7)
      k[0] = kNotANumber, k[1] = 1e9f, k[2] = -kInfinity, v[3] = 0x1p-24f, v[4] = 0x1.8p-25f, v[5] = 65520.0f;
    const auto page = static_cast<size_t>(pages[static_cast<size_t>(position / kPageTokens)]);
    table.append(type, k.data(), v.data(), head_dim, position % kPageTokens, kv.data() + page * page_stride);
  }
  out.add_integers(name + "append", kv);

  const size_t token_stride = static_cast<size_t>(group * head_dim), rows = static_cast<size_t>(num_tokens * group);
  const auto q = random.numbers(num_tokens * token_stride);
  std::vector<float> y(num_tokens * token_stride), merged(y.size());
  std::vector<float> scratch(attend_scratch_floats(static_cast<int>(rows), head_dim));
  const AttendArgs args{q.data(), y.data(), token_stride, num_tokens, group,     head_dim,    first_position,
                        window,   0.125f,   pages.data(), type,       kv.data(), page_stride, scratch.data()};
  table.attend(args);
  out.add(name + "attend", y);

  const int num_blocks = (length - 1) / kAttentionBlock + 1;
  const size_t row_floats = partial_floats(head_dim), block_floats = rows * row_floats;
  std::vector<float> partials(static_cast<size_t>(num_blocks) * block_floats);
  for (int b = 0; b < num_blocks; b++)
    table.attend_block(args, b, partials.data() + static_cast<size_t>(b) * block_floats);
  out.add(name + "attend_block", partials);
  for (size_t r = 0; r < rows; r++)
    table.merge_blocks(partials.data() + r * row_floats, block_floats, num_blocks, head_dim,
                       merged.data() + r * static_cast<size_t>(head_dim));
  out.add(name + "merge_blocks", merged);
}

Outputs run(const KernelTable& table) {
  Random random(20);
  Outputs out;
  run_quantise(table, random, out);
  run_multiply(table, random, out);
  run_rows(table, random, out);
  run_neurons(table, random, out);
  run_embed(table, random, out);
  run_elementwise(table, random, out);
  run_experts(table, random, out);
  for (const KvType type : {KvType::F16, KvType::Q8_0}) {
    run_attention(table, random, out, type, 64, 3, 1, 0, 0);
    run_attention(table, random, out, type, 64, 1, 1, 1100, 0);
    run_attention(table, random, out, type, 128, 4, 3, 509, 0);
    run_attention(table, random, out, type, 80, 2, 7, 600, 100);
    run_attention(table, random, out, type, 256, 4, 2, 30, 16);
  }
  return out;
}

uint64_t hash_of(const Outputs& outputs) {  // FNV-1a
  uint64_t hash = 0xCBF29CE484222325;
  for (const Output& out : outputs.all())
    for (const uint32_t word : out.bits)
      for (int byte = 0; byte < 4; byte++) hash = (hash ^ (word >> 8 * byte & 255)) * 0x100000001B3;
  return hash;
}

// The number of outputs that differ, the first few of which are shown.
int compare(const KernelTable& table, const Outputs& expected, const Outputs& got) {
  int different = 0;
  for (size_t i = 0; i < expected.all().size(); i++) {
    const Output &want = expected.all()[i], &have = got.all()[i];
    if (want.bits == have.bits) continue;
    const auto at = std::mismatch(want.bits.begin(), want.bits.end(), have.bits.begin());
    if (++different <= 5)
      std::printf("%s: %s: element %td is %08x, not %08x\n", table.name, want.name.c_str(),
                  at.first - want.bits.begin(), *at.second, *at.first);
  }
  return different;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<const KernelTable*> tables = available_tables();
  std::string found, wanted;
  for (const KernelTable* table : tables) found += std::string(" ") + table->name;
  for (int i = 1; i < argc; i++) wanted += std::string(" ") + argv[i];
  bool sound = argc == 1 || found == wanted;
  if (!sound) std::printf("this processor has%s; expected were%s\n", found.c_str(), wanted.c_str());
  const Outputs plain = run(kScalarTable);
  for (const KernelTable* table : tables) {
    const int different = compare(*table, plain, run(*table));
    std::printf("%s: %d of %zu outputs differ\n", table->name, different, plain.all().size());
    sound = sound && different == 0;
  }
  std::printf("hash %016llx\n", static_cast<unsigned long long>(hash_of(plain)));
  return sound ? EXIT_SUCCESS : EXIT_FAILURE;
}
