// Chooses the next token from a row of logits. Same bits on every machine: plain IEEE operations in a fixed order,
// own exp and log, random numbers that depend on (seed, sequence, position) alone.
#pragma once
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace isotherm {

// The rules of SamplingParams in types.py, checked there.
struct SamplingRules {
  double temperature;
  int top_k;
  double top_p;
  double min_p;
  double repeat_penalty;
  double presence_penalty;
  double frequency_penalty;
  int penalty_tokens;
  std::vector<std::pair<int32_t, double>> logit_bias;
  uint64_t seed;
  int num_logprobs;
};

struct Candidate {
  float value;
  int32_t id;
};

struct SampledToken {
  int32_t id;
  double logprob;                                    // of the unmodified distribution, as are the next
  std::vector<std::pair<int32_t, double>> logprobs;  // the likeliest, by value, then by id
};

// What a sampler that keeps the largest logits only needs of a row: those, by rising id, and of the whole row the
// largest one and the sum of the weights exp(logit - peak).
struct Shortlist {
  const int32_t* ids;
  const float* logits;
  size_t count;
  float peak;
  double total;
};

// A NaN, an infinity, or a row without a finite value: the engine is broken, whoever asked.
struct BadLogits : std::exception {
  const char* what() const noexcept override { return "logits must be finite or -inf, and one of them finite"; }
};

// First word of Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011)
// with counter (position, sequence, 0, 0) and key (seed, 0).
uint64_t random_word(uint64_t seed, uint64_t sequence, uint64_t position);

class Sampler {
 public:
  Sampler(SamplingRules rules, int vocab_size);

  int vocab_size() const { return vocab_size_; }
  // Wall time inside `sample` so far.
  double busy_s() const { return busy_s_; }

  // logits [vocab_size]; history [num_history], ids within the vocabulary; allowed [ceil(vocab_size / 32)], bit i % 32
  // of word i / 32 for token i, or null for all. Nothing: every token is banned.
  std::optional<SampledToken> sample(const float* logits, const int32_t* history, size_t num_history, uint64_t position,
                                     uint64_t sequence, const uint32_t* allowed);

  // How many of the largest logits choose the token and its log-probability, whatever the others are; 0: it takes all.
  int num_needed() const;
  // As `sample` of a row of which `list` has the num_needed() largest logits.
  SampledToken sample_short(const Shortlist& list, uint64_t position, uint64_t sequence);

 private:
  std::optional<SampledToken> choose(const float* logits, const int32_t* history, size_t num_history, uint64_t position,
                                     uint64_t sequence, const uint32_t* allowed);
  void apply_bias();
  void apply_penalties(const int32_t* history, size_t num_history);
  Candidate nucleus_end(float best);
  void keep_to(Candidate last);
  int32_t draw(float best, uint64_t random);
  int32_t draw_kept(float best, uint64_t random);

  const SamplingRules rules_;
  const int vocab_size_;
  std::mutex busy_;  // guards what stands below
  double busy_s_ = 0;
  std::vector<int32_t> counts_;   // all zero between calls
  std::vector<int32_t> touched_;  // ids with a count
  std::vector<float> weights_;
  // Candidates: first the whole vocabulary, then, in the same order, what the rules leave of it.
  std::vector<float> values_;
  std::vector<int32_t> ids_;
  size_t num_kept_ = 0;
};

}  // namespace isotherm
