// What one step computes, as the runtime sees it.
#pragma once
#include <cstdint>
#include <vector>

namespace isotherm {

struct SequenceView {
  int start;  // first row in the batch
  int num_new, num_cached;
  std::vector<const int32_t*> page_tables;  // by state group
  bool is_trimmed;
};

struct BatchView {
  const int32_t* token_ids;
  int num_tokens;
  std::vector<SequenceView> sequences;
  const int32_t* logit_rows;
  int num_logit_rows;
};

}  // namespace isotherm
