// Norm, quantise, activations, rope: everything that is not a matmul or attention. ARCHITECTURE.md has the arithmetic.
namespace {

using namespace isotherm;

// The bits of 1.5 * 2^23. An integer sum that starts here is, read as a float, kMagicFloat + the sum, exactly, as long
// as the sum stays below 2^22: the conversion to float costs nothing.
constexpr int32_t kMagic = 0x4B400000;
constexpr float kMagicFloat = 12582912.0f;

VEC F exp(F x) {
  x = min(max(x, splat(-87.0f)), splat(88.0f));
  const F n = rint(x * splat(1.44269504f));
  F r = fma(n, splat(-0.693145752f), x);
  r = fma(n, splat(-1.42860677e-6f), r);
  F p = splat(0.00139411189f);
  p = fma(p, r, splat(0.00837513477f));
  p = fma(p, r, splat(0.0416663528f));
  p = fma(p, r, splat(0.166664154f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return p * power_of_two(to_int(n));
}

VEC F positive(F x) { return max(splat(0.0f), x); }  // the order of the two keeps what is not a number

VEC F activate(F x, Activation activation) {
  const F one = splat(1.0f);
  if (activation == Activation::kNone) return x;
  if (activation == Activation::kRelu || activation == Activation::kDrelu) return positive(x);
  if (activation == Activation::kReluSquared) return positive(x) * positive(x);
  if (activation == Activation::kSilu) return x / (one + exp(splat(0.0f) - x));
  const F bend = fma(x * x, splat(0.044715f), one);
  return x - x / (exp((x * splat(1.5957691216f)) * bend) + one);
}

// Vectors run past n into zeros: buffers are padded to 64 columns.
VEC float norm_factor(const float* x, int n, float eps) {
  F acc = splat(0.0f);
  for (int i = 0; i < n; i += 16) {
    const F v = load(x + i);
    acc = fma(v, v, acc);
  }
  const float mean = sum(acc) / static_cast<float>(n);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  const F factor = splat(norm_factor(x, n, eps));
  for (int i = 0; i < n; i += 16) store(out + i, (load(x + i) * factor) * load(weight + i));
}

void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  F acc = splat(0.0f);
  for (int i = 0; i < n; i += 16) acc = acc + load(x + i);
  const F mean = splat(sum(acc) / static_cast<float>(n));
  for (int i = 0; i < n; i += 16) store(out + i, load(x + i) - mean);
  for (int i = n; i % 16; i++) out[i] = 0.0f;
  const F factor = splat(norm_factor(out, n, eps));
  for (int i = 0; i < n; i += 16) store(out + i, (load(out + i) * factor) * load(weight + i) + load(bias + i));
}

void add_norm(const float* a, const float* b, const float* weight, int n, float eps, float* out) {
  const F factor = splat(norm_factor(b, n, eps));
  for (int i = 0; i < n; i += 16) store(out + i, load(a + i) + (load(b + i) * factor) * load(weight + i));
}

void add(const float* a, const float* b, int n, float* out) {
  for (int i = 0; i < n; i += 16) store(out + i, load(a + i) + load(b + i));
}

// Where integer sums start, for the weights that read this input.
struct Starts {
  int32_t* out;
  int zero_point;
};

void quantise(const float* x, const QuantRows& out, int row) {
  const int bundle = out.bundle_rows, lane = row % bundle;
  const size_t first_column = static_cast<size_t>(row - lane) * out.columns;  // of the bundle, all its rows counted
  Starts whole[kNumStarts], halves[kNumStarts];
  int num_whole = 0, num_halves = 0;
  for (int i = 0; i < kNumStarts; i++)
    if (out.starts[i])
      (kStarts[i].columns == 16 ? halves[num_halves++] : whole[num_whole++]) = {out.starts[i], kStarts[i].zero_point};
  constexpr float kTiny = 0x1p-100f;  // a block whose largest magnitude is below is all zero
  F unsound = splat(0.0f);            // stays zero as long as every element is finite
  for (int block = 0; block < out.columns / kBlockColumns; block++) {
    const F a = load(x + block * kBlockColumns), b = load(x + block * kBlockColumns + 16);
    unsound = unsound + (a - a) + (b - b);
    const float top = largest(max(abs(a), abs(b)));
    const bool live = top >= kTiny;
    const F inverse = splat(live ? 127.0f / top : 0.0f);
    const I code_a = to_int(rint(a * inverse)), code_b = to_int(rint(b * inverse));
    int8_t codes[kBlockColumns];
    store_i8(codes, code_a);
    store_i8(codes + 16, code_b);
    for (int q = 0; q < kBlockColumns / 4; q++)
      __builtin_memcpy(out.codes + first_column + ((block * 8 + q) * bundle + lane) * 4, codes + 4 * q, 4);
    const size_t at = first_column / kBlockColumns + static_cast<size_t>(block * bundle + lane);
    const int32_t total = sum(code_a + code_b);
    out.scales[at] = live ? top / 127.0f : 0.0f;
    out.sums[at] = static_cast<float>(total);
    for (int i = 0; i < num_whole; i++) whole[i].out[at] = kMagic - whole[i].zero_point * total;
    if (!out.half_sums && num_halves == 0) continue;
    const int32_t first = sum(code_a);
    const size_t half = first_column / 16 + static_cast<size_t>(2 * block * bundle + lane), next = half + bundle;
    for (int i = 0; i < num_halves; i++) {
      halves[i].out[half] = kMagic - halves[i].zero_point * first;
      halves[i].out[next] = kMagic - halves[i].zero_point * (total - first);
    }
    if (!out.half_sums) continue;
    out.half_sums[half] = static_cast<float>(first);
    out.half_sums[next] = static_cast<float>(total - first);
  }
  if (const float not_a_number = sum(unsound); not_a_number != 0.0f)
    for (int block = 0; block < out.columns / kBlockColumns; block++)
      out.scales[first_column / kBlockColumns + static_cast<size_t>(block * bundle + lane)] = not_a_number;
  float* values = out.values + static_cast<size_t>(row) * out.columns;
  if (out.values)
    for (int i = 0; i < out.columns; i += 16) store(values + i, load(x + i));
}

void finish_linear(const float* totals, const float* bias, Activation activation, const float* residual, float* out) {
  for (int i = 0; i < kPanelRows; i += 16) {
    F y = load(totals + i);
    if (bias) y = y + load(bias + i);
    if (activation != Activation::kNone) y = activate(y, activation);
    if (residual) y = load(residual + i) + y;
    store(out + i, y);
  }
}

void finish_glu(const float* totals, Activation activation, float* out) {
  const F gate = activate(load(totals), activation), up = load(totals + kTileRows);
  // a neuron that does not fire is 0, whatever its up is
  store(out, zero_where_zero(gate, gate * (activation == Activation::kDrelu ? positive(up) : up)));
}

// The threshold of a row by its own magnitudes.
VEC float own_threshold(const TrimArgs& args) {
  F sums = splat(0.0f), squares = splat(0.0f);
  for (int i = 0; i < args.columns; i += 16) {
    const F magnitude = abs(activate(load(args.x + i), args.activation));
    sums = sums + magnitude;
    squares = fma(magnitude, magnitude, squares);
  }
  const auto n = static_cast<float>(args.columns);
  const float mean = sum(sums) / n, variance = sum(squares) / n - mean * mean;
  return __builtin_fmaf(__builtin_sqrtf(variance < 0.0f ? 0.0f : variance), args.deviations, mean);
}

void trim(const TrimArgs& args) {
  const float own = args.thresholds ? 0.0f : own_threshold(args);
  for (int i = args.first; i < args.last; i += 16) {
    const F x = load(args.x + i), magnitude = abs(activate(x, args.activation));
    store(args.out + i, zero_where_less(magnitude, args.thresholds ? load(args.thresholds + i) : splat(own), x));
  }
}

void rope(const RopeArgs& args, float* head) {
  if (args.norm) rms_norm(head, args.norm, args.head_dim, args.norm_eps, head);
  const int half = args.dims / 2;
  int i = 0;
  for (; i + 16 <= half; i += 16) {
    const F c = load(args.table + i), s = load(args.table + half + i);
    const F first = load(head + i), second = load(head + half + i);
    store(head + i, fma(first, c, splat(0.0f) - second * s));
    store(head + half + i, fma(second, c, first * s));
  }
  for (; i < half; i++) {  // halves that are no multiple of 16
    const float c = args.table[i], s = args.table[half + i], first = head[i], second = head[half + i];
    head[i] = __builtin_fmaf(first, c, -(second * s));
    head[half + i] = __builtin_fmaf(second, c, first * s);
  }
}

// Tells the compiler that `x` is used, so that what made it stays.
template <class T>
VEC void use(const T& x) {
  __asm__ volatile("" : : "m"(x));
}

void read_lines(const uint8_t* data, size_t bytes) {
  using Line = uint64_t __attribute__((vector_size(64)));
  Line sums[4] = {};
  const auto add = [&](size_t i, Line& sum) {
    Line line;
    __builtin_memcpy(&line, data + i, 64);
    sum += line;
  };
  size_t i = 0;
  for (; i + 256 <= bytes; i += 256)
#pragma GCC unroll 4
    for (size_t n = 0; n < 4; n++) add(i + 64 * n, sums[n]);
  for (; i + 64 <= bytes; i += 64) add(i, sums[0]);
  use(sums);
}

}  // namespace
