#include "merges.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <queue>
#include <random>
#include <stdexcept>
#include <utility>

namespace isotherm {

namespace {

constexpr size_t kShortWord = 32;  // bytes; up to here, looking at all pairs beats keeping a heap
constexpr uint32_t kNowhere = UINT32_MAX;

// Hashes are seeded, so that no file can be made of texts or pairs that collide.
uint64_t random_seed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

uint64_t mix(uint64_t value) {
  const auto product = static_cast<unsigned __int128>(value) * 0x9e3779b97f4a7c15;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t hash_text(std::string_view text, uint64_t seed) {
  uint64_t state = mix(seed ^ text.size());
  for (; text.size() >= 8; text.remove_prefix(8)) {
    uint64_t word;
    std::memcpy(&word, text.data(), 8);
    state = mix(state ^ word);
  }
  uint64_t rest = 0;
  for (const char byte : text) rest = rest << 8 | static_cast<unsigned char>(byte);
  return mix(state ^ rest);
}

size_t num_slots(size_t num_entries) { return std::bit_ceil(2 * num_entries); }

}  // namespace

TokenIndex::TokenIndex(TextList texts)
    : texts_(std::move(texts)), seed_(random_seed()), slots_(num_slots(texts_.size())) {
  if (texts_.size() > INT32_MAX / 2) throw std::length_error("too many tokens");
  for (int32_t id = 0; id < num_tokens(); id++) {
    const uint64_t hash = hash_text(texts_[id], seed_);
    Slot& slot = slots_[slot_of(texts_[id], hash)];
    if (slot.id >= 0)
      num_repeats_++;
    else
      slot = {static_cast<uint32_t>(hash >> 32), id};
  }
}

int32_t TokenIndex::find(std::string_view text, int32_t guess) const {
  if (0 <= guess && guess < num_tokens() && texts_[guess] == text) return guess;
  return slots_[slot_of(text, hash_text(text, seed_))].id;
}

size_t TokenIndex::slot_of(std::string_view text, uint64_t hash) const {
  const auto tag = static_cast<uint32_t>(hash >> 32);
  for (size_t i = hash;; i++) {
    const Slot& slot = slots_[i &= slots_.size() - 1];
    if (slot.id < 0 || (slot.tag == tag && texts_[slot.id] == text)) return i;
  }
}

MergeTable::MergeTable(const TokenIndex& tokens, const TextList& merges, std::array<std::string, 256> byte_texts,
                       bool takes_words)
    : tokens_(tokens),
      byte_texts_(std::move(byte_texts)),
      takes_words_(takes_words),
      seed_(random_seed()),
      slots_(num_slots(merges.size()), kNoRank) {
  for (int byte = 0; byte < 256; byte++) {
    const int32_t id = tokens.find(byte_texts_[byte]);
    byte_ids_[byte] = id >= 0 ? id : tokens.num_tokens() + byte;
  }
  merges_.reserve(merges.size());
  std::string whole;
  int32_t whole_id = -1;  // most vocabularies list what merges make in the order of the merges
  for (size_t rank = 0; rank < merges.size(); rank++) {
    const std::string_view merge = merges[rank];
    const size_t space = merge.find(' ');
    if (space == merge.npos || space == 0 || space + 1 == merge.size() || merge.rfind(' ') != space)
      throw BadMerge{rank, "is not a pair"};
    const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
    whole.assign(left).append(right);
    const int32_t left_id = piece_id(left), right_id = piece_id(right);
    whole_id = tokens.find(whole, whole_id + 1);
    if (left_id < 0 || right_id < 0) throw BadMerge{rank, "has a piece that is no token"};
    if (whole_id < 0) throw BadMerge{rank, "makes what is no token"};
    merges_.push_back({left_id, right_id, whole_id});
  }
  for (uint32_t rank = 0; rank < merges_.size(); rank++) {
    uint32_t& slot = slots_[slot_of(merges_[rank].left, merges_[rank].right)];
    slot = std::min(slot, rank);
  }
}

void MergeTable::encode(std::string_view word, std::vector<int32_t>& ids) const {
  if (word.size() > INT32_MAX) throw std::length_error("a word of more than 2 GiB");
  if (const int32_t id = takes_words_ ? find_word(word) : -1; id >= 0)
    append(id, ids);
  else if (word.size() <= kShortWord)
    merge_short(word, ids);
  else
    merge_long(word, ids);
}

int32_t MergeTable::piece_id(std::string_view text) const {
  const int32_t id = tokens_.find(text);
  if (id >= 0) return id;
  const auto byte = std::find(byte_texts_.begin(), byte_texts_.end(), text);
  return byte == byte_texts_.end() ? -1 : byte_ids_[byte - byte_texts_.begin()];
}

size_t MergeTable::slot_of(int32_t left, int32_t right) const {
  for (size_t i = mix(seed_ ^ (static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(right)));; i++) {
    const uint32_t rank = slots_[i &= slots_.size() - 1];
    if (rank == kNoRank || (merges_[rank].left == left && merges_[rank].right == right)) return i;
  }
}

int32_t MergeTable::find_word(std::string_view word) const {
  std::string text;
  for (const char byte : word) text += byte_texts_[static_cast<unsigned char>(byte)];
  return tokens_.find(text);
}

void MergeTable::merge_short(std::string_view word, std::vector<int32_t>& ids) const {
  std::array<int32_t, kShortWord> symbols;
  std::array<uint32_t, kShortWord> ranks;  // [i]: of symbols i and i + 1
  size_t num_symbols = word.size();
  for (size_t i = 0; i < num_symbols; i++) symbols[i] = byte_ids_[static_cast<unsigned char>(word[i])];
  for (size_t i = 1; i < num_symbols; i++) ranks[i - 1] = rank_of(symbols[i - 1], symbols[i]);
  while (num_symbols > 1) {
    const size_t place = std::min_element(ranks.begin(), ranks.begin() + num_symbols - 1) - ranks.begin();
    if (ranks[place] == kNoRank) break;
    symbols[place] = merges_[ranks[place]].whole;
    num_symbols--;
    for (size_t i = place + 1; i < num_symbols; i++) {
      symbols[i] = symbols[i + 1];
      ranks[i - 1] = ranks[i];
    }
    if (place > 0) ranks[place - 1] = rank_of(symbols[place - 1], symbols[place]);
    if (place + 1 < num_symbols) ranks[place] = rank_of(symbols[place], symbols[place + 1]);
  }
  for (size_t i = 0; i < num_symbols; i++) append(symbols[i], ids);
}

void MergeTable::merge_long(std::string_view word, std::vector<int32_t>& ids) const {
  struct Symbol {
    int32_t id;
    uint32_t previous, next;
    uint32_t rank;  // with the next; kNoRank once it is merged into the previous
  };
  const auto num_symbols = static_cast<uint32_t>(word.size());
  std::vector<Symbol> symbols(num_symbols);
  for (uint32_t i = 0; i < num_symbols; i++)
    symbols[i] = {byte_ids_[static_cast<unsigned char>(word[i])], i == 0 ? kNowhere : i - 1,
                  i + 1 == num_symbols ? kNowhere : i + 1, kNoRank};
  const auto update_rank = [&](Symbol& symbol) {
    symbol.rank = symbol.next == kNowhere ? kNoRank : rank_of(symbol.id, symbols[symbol.next].id);
    return symbol.rank != kNoRank;
  };
  const auto entry = [&](uint32_t place) { return static_cast<uint64_t>(symbols[place].rank) << 32 | place; };
  std::vector<uint64_t> entries;
  for (uint32_t i = 0; i < num_symbols; i++)
    if (update_rank(symbols[i])) entries.push_back(entry(i));
  std::priority_queue queue(std::greater<uint64_t>{}, std::move(entries));
  while (!queue.empty()) {
    const uint64_t best = queue.top();
    queue.pop();
    const auto place = static_cast<uint32_t>(best);
    if (best != entry(place)) continue;  // one of the two has merged with another
    Symbol& symbol = symbols[place];
    Symbol& right = symbols[symbol.next];
    symbol.id = merges_[symbol.rank].whole;
    symbol.next = right.next;
    right.rank = kNoRank;
    if (symbol.next != kNowhere) symbols[symbol.next].previous = place;
    if (update_rank(symbol)) queue.push(entry(place));
    if (symbol.previous != kNowhere && update_rank(symbols[symbol.previous])) queue.push(entry(symbol.previous));
  }
  for (uint32_t i = 0; i != kNowhere; i = symbols[i].next) append(symbols[i].id, ids);
}

}  // namespace isotherm
