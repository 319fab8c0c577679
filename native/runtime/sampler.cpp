#include "sampler.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

// A clone for wider vectors gives the same bits: each operation is rounded alone, and the lanes of a sum are fixed.
#if defined(__x86_64__) && defined(__GLIBC__)  // whose loader chooses among clones
#define WIDE_CLONE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE_CLONE
#endif

namespace isotherm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int kLanes = 32;      // partial results of a scan: fixed, so that no vector width changes a sum
constexpr int kSumLanes = 256;  // of a sum: a GPU has a lane of its own for each
constexpr int kBlock = 64;      // values of which top() knows the largest

// e to the x for x <= 0, within 2e-7; 0 below -87. Taylor on |r| <= ln 2 / 2. Without a branch: loops over it
// vectorise.
inline float exp_below(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in 9 bits
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) - 0x4B400000 + 127) << 23;
  const uint32_t in_range = -static_cast<uint32_t>(x >= -87.0f);  // all ones, or none: what the rest gave is noise then
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p * std::bit_cast<float>(power)) & in_range);
}

// Natural logarithm of a positive normal number: 2 artanh((m - 1) / (m + 1)) of the mantissa, by its series.
double log_of(double x) {
  int exponent;
  double m = std::frexp(x, &exponent);  // exact
  if (m < 0.7071067811865476) m *= 2, exponent--;
  const double s = (m - 1) / (m + 1), square = s * s;
  double sum = 0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return exponent * 0.6931471805599453 + 2 * s * sum;
}

// weights[i] = exp((values[i] - best) * scale); returns their sum.
WIDE_CLONE double weigh(const float* values, size_t n, float best, float scale, float* __restrict weights) {
  double lanes[kSumLanes] = {};
  size_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (size_t j = 0; j < kSumLanes; j++) {
      weights[i + j] = exp_below((values[i + j] - best) * scale);
      lanes[j] += weights[i + j];
    }
  for (; i < n; i++) lanes[i % kSumLanes] += weights[i] = exp_below((values[i] - best) * scale);
  for (size_t half = kSumLanes / 2; half > 0; half /= 2)
    for (size_t j = 0; j < half; j++) lanes[j] += lanes[j + half];
  return lanes[0];
}

WIDE_CLONE float largest(const float* values, size_t n) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -kInfinity);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (size_t j = 0; j < kLanes; j++) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  for (; i < n; i++) lanes[0] = std::max(lanes[0], values[i]);
  return *std::max_element(lanes, lanes + kLanes);
}

// Whether each value is finite or -inf; copies them in the same pass.
WIDE_CLONE bool copy_checked(const float* values, size_t n, float* __restrict copy) {
  int unsound = 0;
  for (size_t i = 0; i < n; i++) {
    unsound |= !(values[i] <= kLargest);
    copy[i] = values[i];
  }
  return unsound == 0;
}

// -inf where the bit of a value is not set.
WIDE_CLONE void ban_others(const uint32_t* allowed, size_t n, float* values) {
  for (size_t first = 0; first < n; first += 32) {
    const uint32_t word = allowed[first / 32];
    for (size_t i = 0; i < std::min<size_t>(32, n - first); i++)
      values[first + i] = word >> i & 1 ? values[first + i] : -kInfinity;
  }
}

bool before(Candidate a, Candidate b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// The k first candidates in order, without those of -inf. The k-th largest of the blocks' maxima is a bound below
// which none of them stands, so that few values are ever sorted.
std::vector<Candidate> top(const float* values, int n, int k) {
  float bound = -kLargest;
  std::vector<float> maxima;
  for (int i = 0; i < n; i += kBlock) maxima.push_back(largest(values + i, std::min(kBlock, n - i)));
  if (k <= static_cast<int>(maxima.size())) {
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<>());
    bound = std::max(bound, maxima[k - 1]);
  }
  std::vector<Candidate> found;
  for (int i = 0; i < n; i++)
    if (values[i] >= bound) found.push_back({values[i], i});
  const auto end = found.begin() + std::min<ptrdiff_t>(k, std::ssize(found));
  std::nth_element(found.begin(), end, found.end(), before);
  found.erase(end, found.end());
  std::sort(found.begin(), found.end(), before);
  return found;
}

// A finite value stays finite, however large the rules are.
float saturate(double value) {
  return static_cast<float>(std::clamp(value, -static_cast<double>(kLargest), static_cast<double>(kLargest)));
}

uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

}  // namespace

uint64_t random_word(uint64_t seed, uint64_t sequence, uint64_t position) {
  constexpr uint64_t kFactors[2] = {0xD2E7470EE14C6C93, 0xCA5A826395121157};
  constexpr uint64_t kWeyl[2] = {0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B};
  uint64_t c[4] = {position, sequence, 0, 0}, key[2] = {seed, 0};
  for (int round = 0; round < 10; round++) {
    const uint64_t high0 = multiply_high(kFactors[0], c[0]), low0 = kFactors[0] * c[0];
    const uint64_t high1 = multiply_high(kFactors[1], c[2]), low1 = kFactors[1] * c[2];
    c[0] = high1 ^ c[1] ^ key[0];
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key[1];
    c[3] = low0;
    key[0] += kWeyl[0];
    key[1] += kWeyl[1];
  }
  return c[0];
}

Sampler::Sampler(SamplingRules rules, int vocab_size)
    : rules_(std::move(rules)), vocab_size_(vocab_size), weights_(vocab_size), values_(vocab_size) {}

void Sampler::apply_bias() {
  for (const auto& [id, bias] : rules_.logit_bias) {
    float& value = values_[id];
    value = value == -kInfinity || bias == -kInfinity ? -kInfinity : saturate(value + bias);
  }
}

// As llama.cpp defines them: repetition divides a positive logit and multiplies another; frequency subtracts for each
// time a token occurred, presence once.
void Sampler::apply_penalties(const int32_t* history, size_t num_history) {
  const bool neutral = rules_.repeat_penalty == 1 && rules_.presence_penalty == 0 && rules_.frequency_penalty == 0;
  if (neutral) return;
  counts_.resize(values_.size());
  size_t first = 0;
  if (rules_.penalty_tokens >= 0) first = num_history - std::min<size_t>(num_history, rules_.penalty_tokens);
  for (size_t i = first; i < num_history; i++)
    if (counts_[history[i]]++ == 0) touched_.push_back(history[i]);
  for (const int32_t id : touched_) {
    double value = values_[id];
    value = value > 0 ? value / rules_.repeat_penalty : value * rules_.repeat_penalty;
    value = value - rules_.frequency_penalty * counts_[id] - rules_.presence_penalty;
    if (values_[id] != -kInfinity) values_[id] = saturate(value);
    counts_[id] = 0;
  }
  touched_.clear();
}

// The last of the shortest prefix whose weights reach top_p of their sum. The weights are added up by buckets of equal
// or near values, and only the bucket where the sum crosses is sorted.
Candidate Sampler::nucleus_end(float best) {
  constexpr int kBuckets = 4096;
  const auto bucket_of = [&](float value) { return static_cast<int>(std::min((best - value) * 64, kBuckets - 1.0f)); };
  const double target = rules_.top_p * weigh(values_.data(), num_kept_, best, 1, weights_.data());
  std::vector<double> sums(kBuckets);
  for (size_t i = 0; i < num_kept_; i++) sums[bucket_of(values_[i])] += weights_[i];
  double sum = 0;
  int bucket = 0;
  for (; bucket < kBuckets - 1 && sum + sums[bucket] < target; bucket++) sum += sums[bucket];

  struct Weighted {
    Candidate candidate;
    float weight;
  };
  std::vector<Weighted> crossing;
  for (size_t i = 0; i < num_kept_; i++)
    if (bucket_of(values_[i]) == bucket) crossing.push_back({{values_[i], ids_[i]}, weights_[i]});
  std::sort(crossing.begin(), crossing.end(), [](auto& a, auto& b) { return before(a.candidate, b.candidate); });
  Candidate last{-kLargest, vocab_size_};  // stays where rounding keeps the sum below the target
  for (size_t i = 0; i < crossing.size() && sum < target; i++) {
    sum += crossing[i].weight;
    last = crossing[i].candidate;
  }
  return last;
}

// Drops from values_ and ids_ what comes after `last`.
void Sampler::keep_to(Candidate last) {
  size_t n = 0;
  for (size_t i = 0; i < num_kept_; i++) {
    const float value = values_[i];
    const int32_t id = ids_[i];
    values_[n] = value;
    ids_[n] = id;
    n += (value > last.value) | ((value == last.value) & (id <= last.id));
  }
  num_kept_ = n;
}

int32_t Sampler::draw(float best, uint64_t random) {
  num_kept_ = values_.size();
  ids_.resize(num_kept_);
  std::iota(ids_.begin(), ids_.end(), 0);
  if (rules_.top_k > 0 && rules_.top_k < vocab_size_) keep_to(top(values_.data(), vocab_size_, rules_.top_k).back());
  return draw_kept(best, random);
}

// One of the survivors of top_k, top_p and min_p by the weights exp(value / temperature), in the order of their ids.
int32_t Sampler::draw_kept(float best, uint64_t random) {
  if (rules_.top_p < 1) keep_to(nucleus_end(best));
  if (rules_.min_p > 0) {
    const double bound = best + log_of(rules_.min_p);
    const float value = saturate(bound);
    keep_to({value < bound ? std::nextafter(value, kInfinity) : value, vocab_size_});
  }

  const float scale = saturate(1 / rules_.temperature);
  const double total = weigh(values_.data(), num_kept_, best, scale, weights_.data());
  const double target = static_cast<double>(random >> 11) * 0x1p-53 * total;
  double sum = 0;
  int32_t chosen = -1;
  for (size_t i = 0; i < num_kept_ && sum <= target; i++) {
    if (weights_[i] == 0) continue;  // never drawn, also where the sum stays a rounding below the target
    sum += weights_[i];
    chosen = ids_[i];
  }
  return chosen;
}

int Sampler::num_needed() const {
  const bool neutral = rules_.repeat_penalty == 1 && rules_.presence_penalty == 0 && rules_.frequency_penalty == 0;
  if (!neutral || !rules_.logit_bias.empty() || rules_.num_logprobs > 0) return 0;
  if (rules_.temperature == 0) return 1;
  return rules_.top_k < vocab_size_ ? rules_.top_k : 0;
}

SampledToken Sampler::sample_short(const Shortlist& list, uint64_t position, uint64_t sequence) {
  const std::lock_guard lock(busy_);
  const auto started = std::chrono::steady_clock::now();
  const auto at_peak = std::find(list.logits, list.logits + list.count, list.peak) - list.logits;
  SampledToken token{};
  token.id = list.ids[at_peak];
  if (rules_.temperature > 0) {
    num_kept_ = list.count;
    std::copy_n(list.logits, list.count, values_.begin());
    ids_.assign(list.ids, list.ids + list.count);
    token.id = draw_kept(list.peak, random_word(rules_.seed, sequence, position));
  }
  const auto at = std::find(list.ids, list.ids + list.count, token.id) - list.ids;
  token.logprob = (static_cast<double>(list.logits[at]) - list.peak) - log_of(list.total);
  busy_s_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return token;
}

std::optional<SampledToken> Sampler::sample(const float* logits, const int32_t* history, size_t num_history,
                                            uint64_t position, uint64_t sequence, const uint32_t* allowed) {
  const std::lock_guard lock(busy_);
  const auto started = std::chrono::steady_clock::now();
  const auto token = choose(logits, history, num_history, position, sequence, allowed);
  busy_s_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return token;
}

std::optional<SampledToken> Sampler::choose(const float* logits, const int32_t* history, size_t num_history,
                                            uint64_t position, uint64_t sequence, const uint32_t* allowed) {
  const float peak = largest(logits, values_.size());
  if (peak == -kInfinity || !copy_checked(logits, values_.size(), values_.data())) throw BadLogits();

  if (allowed) ban_others(allowed, values_.size(), values_.data());
  apply_bias();
  apply_penalties(history, num_history);
  const float best = largest(values_.data(), values_.size());
  if (best == -kInfinity) return std::nullopt;

  SampledToken token{};
  token.id = rules_.temperature > 0
                 ? draw(best, random_word(rules_.seed, sequence, position))
                 : static_cast<int32_t>(std::find(values_.begin(), values_.end(), best) - values_.begin());
  const double log_total = log_of(weigh(logits, values_.size(), peak, 1, weights_.data()));
  const auto logprob = [&](float logit) { return (static_cast<double>(logit) - peak) - log_total; };
  token.logprob = logprob(logits[token.id]);
  if (rules_.num_logprobs > 0)
    for (const Candidate& c : top(logits, vocab_size_, std::min(rules_.num_logprobs, vocab_size_)))
      token.logprobs.emplace_back(c.id, logprob(c.value));
  return token;
}

}  // namespace isotherm
