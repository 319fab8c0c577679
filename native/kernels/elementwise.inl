// Norm, quantise, activations, rope: everything that is not a matmul or attention. ARCHITECTURE.md has the arithmetic.
namespace {

using namespace isotherm;

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

VEC F activate(F x, Activation activation) {
  const F one = splat(1.0f);
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

void add_norm(const float* a, const float* b, const float* weight, int n, float eps, float* out) {
  const F factor = splat(norm_factor(b, n, eps));
  for (int i = 0; i < n; i += 16) store(out + i, load(a + i) + (load(b + i) * factor) * load(weight + i));
}

void add(const float* a, const float* b, int n, float* out) {
  for (int i = 0; i < n; i += 16) store(out + i, load(a + i) + load(b + i));
}

void quantise(const float* x, int, const QuantRows& out, int row) {
  int8_t* codes = out.codes + static_cast<size_t>(row) * out.columns;
  int32_t* negated32 = out.negated32 + static_cast<size_t>(row) * (out.columns / 32);
  int32_t* negated16 = out.negated16 + static_cast<size_t>(row) * (out.columns / 16);
  float* sums32 = out.sums32 + static_cast<size_t>(row) * (out.columns / 32);
  float* scales = out.scales + static_cast<size_t>(row) * out.num_scales();
  constexpr float kTiny = 0x1p-100f;  // a block whose largest magnitude is below is all zero
  for (int start = 0; start < out.columns; start += out.quant_columns) {
    const int end = start + out.quant_columns < out.columns ? start + out.quant_columns : out.columns;
    F best = splat(0.0f);
    for (int i = start; i < end; i += 16) best = max(abs(load(x + i)), best);
    const float top = largest(best);
    const bool live = top >= kTiny;
    *scales++ = live ? top / 127.0f : 0.0f;
    const F inverse = splat(live ? 127.0f / top : 0.0f);
    for (int i = start; i < end; i += 32) {
      const I first = to_int(rint(load(x + i) * inverse)), second = to_int(rint(load(x + i + 16) * inverse));
      store_i8(codes + i, first);
      store_i8(codes + i + 16, second);
      const int32_t a = sum(first), b = sum(second);
      negated16[i / 16] = -a;
      negated16[i / 16 + 1] = -b;
      negated32[i / 32] = -(a + b);
      sums32[i / 32] = static_cast<float>(a + b);
    }
  }
  if (out.values)
    for (int i = 0; i < out.columns; i += 16) store(out.values + static_cast<size_t>(row) * out.columns + i, load(x + i));
}

void finish_linear(const float* totals, const float* bias, const float* residual, float* out) {
  for (int i = 0; i < kPanelRows; i += 16) {
    F y = load(totals + i);
    if (bias) y = y + load(bias + i);
    if (residual) y = load(residual + i) + y;
    store(out + i, y);
  }
}

void finish_glu(const float* totals, Activation activation, float* out) {
  store(out, activate(load(totals), activation) * load(totals + kTileRows));
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

}  // namespace
