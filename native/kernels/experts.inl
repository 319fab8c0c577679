// Mixtures of experts: which experts compute a row, and the sum of what they say. ARCHITECTURE.md has the arithmetic.
namespace {

using namespace isotherm;

void route(const float* logits, int num_experts, int num_used, float* out) {
  float best[kMaxExpertsUsed], unsound = 0.0f;
  int ids[kMaxExpertsUsed], count = 0;
  for (int e = 0; e < num_experts; e++) {
    const float logit = logits[e];
    unsound = unsound + (logit - logit);  // stays zero as long as every logit is finite
    if (count == num_used && !(logit > best[count - 1])) continue;
    int rank = count < num_used ? count++ : num_used - 1;
    for (; rank > 0 && logit > best[rank - 1]; rank--) {  // of equal ones the first stays first
      best[rank] = best[rank - 1];
      ids[rank] = ids[rank - 1];
    }
    best[rank] = logit;
    ids[rank] = e;
  }
  if (unsound != 0.0f) {
    for (int rank = 0; rank < num_used; rank++) {
      out[rank] = static_cast<float>(rank);
      out[num_used + rank] = unsound;
    }
    return;
  }
  float shares[kMaxExpertsUsed] = {};
  for (int rank = 0; rank < num_used; rank++) shares[rank] = best[rank];
  for (int rank = 0; rank < num_used; rank += kTileRows)
    store(shares + rank, exp(load(shares + rank) - splat(best[0])));
  float total = 0.0f;
  for (int rank = 0; rank < num_used; rank++) total = total + shares[rank];
  for (int rank = 0; rank < num_used; rank++) {
    out[rank] = static_cast<float>(ids[rank]);
    out[num_used + rank] = shares[rank] / total;
  }
}

void mix(const MixArgs& args) {
  for (int i = 0; i < kPanelRows; i += kTileRows) {
    F y = splat(0.0f);
    for (int rank = 0; rank < args.num_used; rank++)
      y = fma(load(args.totals + static_cast<size_t>(args.places[rank]) * args.stride + i), splat(args.weights[rank]),
              y);
    if (args.residual) y = load(args.residual + i) + y;
    store(args.out + i, y);
  }
}

}  // namespace
