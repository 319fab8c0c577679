// Byte-level BPE: a word starts as the tokens of its bytes; the neighbours of the lowest rank merge, the leftmost of
// equals, until no neighbours have a rank.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace isotherm {

// Texts one after another in one allocation.
class TextList {
 public:
  void add(std::string_view text) {
    bytes_ += text;
    ends_.push_back(bytes_.size());
  }
  size_t size() const { return ends_.size(); }
  std::string_view operator[](size_t i) const {
    const size_t start = i == 0 ? 0 : ends_[i - 1];
    return {bytes_.data() + start, ends_[i] - start};
  }

 private:
  std::string bytes_;
  std::vector<size_t> ends_;
};

// Ids of tokens by text; they count from 0 in the order of the list.
class TokenIndex {
 public:
  explicit TokenIndex(TextList texts);

  int32_t num_tokens() const { return static_cast<int32_t>(texts_.size()); }
  // Tokens whose text an earlier one has, so that `find` does not know them.
  int32_t num_repeats() const { return num_repeats_; }
  // -1: there is no such token. A good guess spares the look-up.
  int32_t find(std::string_view text, int32_t guess = -1) const;

 private:
  struct Slot {
    uint32_t tag = 0;  // bits of the hash, so that few texts are compared in vain
    int32_t id = -1;
  };
  size_t slot_of(std::string_view text, uint64_t hash) const;

  const TextList texts_;
  const uint64_t seed_;
  std::vector<Slot> slots_;  // a power of two, at most half of them taken; linear probing
  int32_t num_repeats_ = 0;
};

// The first merge that cannot be, and why.
struct BadMerge {
  size_t index;
  const char* reason;
};

class MergeTable {
 public:
  // merges: "left right" by rank; the first of two equal ones counts. byte_texts: how the tokens spell each byte.
  // takes_words: a word that is a token is not merged. `tokens` must outlive the table. Throws BadMerge.
  MergeTable(const TokenIndex& tokens, const TextList& merges, std::array<std::string, 256> byte_texts,
             bool takes_words);

  // Appends the ids of `word`: any bytes. One that is no token parts its neighbours and has no id. O(n log n).
  void encode(std::string_view word, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t left, right, whole;
  };
  static constexpr uint32_t kNoRank = UINT32_MAX;

  int32_t piece_id(std::string_view text) const;
  size_t slot_of(int32_t left, int32_t right) const;
  // kNoRank: the two do not merge.
  uint32_t rank_of(int32_t left, int32_t right) const { return slots_[slot_of(left, right)]; }
  int32_t find_word(std::string_view word) const;
  void merge_short(std::string_view word, std::vector<int32_t>& ids) const;
  void merge_long(std::string_view word, std::vector<int32_t>& ids) const;
  void append(int32_t id, std::vector<int32_t>& ids) const {
    if (id < tokens_.num_tokens()) ids.push_back(id);
  }

  const TokenIndex& tokens_;
  const std::array<std::string, 256> byte_texts_;
  std::array<int32_t, 256> byte_ids_;  // past the vocabulary for a byte that is no token
  const bool takes_words_;
  const uint64_t seed_;
  std::vector<Merge> merges_;    // by rank
  std::vector<uint32_t> slots_;  // ranks; a power of two, at most half of them taken; linear probing
};

}  // namespace isotherm
