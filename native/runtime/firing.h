// Which neurons fire: by their gates, and by the codes of hidden values.
#pragma once
#include <algorithm>
#include <cstring>

#include "../kernels/table.h"

namespace isotherm {

constexpr int kQuadBytes = 4;

// The neurons of a block whose code is not zero, moved together into quads, each half of the block by itself where
// halves have scales of their own.
struct LiveBlock {
  int ends[2];    // of the quads of each half; of all
  float sums[2];  // of the codes
  int32_t ids[kBlockColumns];
  int8_t codes[kBlockColumns];

  // False: there are none.
  bool collect(const QuantRows& x, int block, int row, int num_rows, bool is_halved) {
    constexpr int kBlockQuads = kBlockColumns / kQuadBytes;
    const int num_parts = is_halved ? 2 : 1, part_quads = kBlockQuads / num_parts;
    int count = 0;
    for (int part = 0; part < 2; part++) {
      int sum = 0;
      for (int q = part * part_quads; q < std::min(kBlockQuads, (part + 1) * part_quads); q++) {
        const int first = block * kBlockQuads + q;
        const int8_t* quad = x.codes + static_cast<size_t>(first * num_rows + row) * kQuadBytes;
        int32_t all;
        std::memcpy(&all, quad, sizeof all);
        if (all == 0) continue;
        for (int i = 0; i < kQuadBytes; i++)
          if (quad[i] != 0) {
            ids[count] = first * kQuadBytes + i;
            codes[count++] = quad[i];
            sum += quad[i];
          }
      }
      for (; count % kQuadBytes; count++) {
        ids[count] = ids[count - 1];
        codes[count] = 0;
      }
      ends[part] = count / kQuadBytes;
      sums[part] = static_cast<float>(sum);
    }
    return count > 0;
  }
};

// Neurons whose code is not zero in any row.
inline int count_live(const QuantRows& x, int num_rows) {
  int count = 0;
  for (int quad = 0; quad < x.columns / kQuadBytes; quad++) {
    uint32_t any = 0, codes;
    for (int r = 0; r < num_rows; r++) {
      std::memcpy(&codes, x.codes + static_cast<size_t>(quad * num_rows + r) * kQuadBytes, sizeof codes);
      any |= codes;
    }
    for (; any; any >>= 8) count += (any & 255) != 0;
  }
  return count;
}

// Whether every scale is a number: what is none must reach every output.
inline bool is_sound(const QuantRows& x, int num_rows) {
  bool is_sound = true;
  for (int i = 0; i < x.columns / kBlockColumns * num_rows; i++) is_sound &= x.scales[i] - x.scales[i] == 0.0f;
  return is_sound;
}

// Adds the neurons of a row of gates that fire; what is not a number fires, so that it is seen.
inline void mark_firing(const float* gates, int width, bool fires_below_zero, uint8_t* fires) {
  if (fires_below_zero) {
    for (int i = 0; i < width; i++) fires[i] |= gates[i] != 0.0f;
  } else {
    for (int i = 0; i < width; i++) fires[i] |= !(gates[i] <= 0.0f);
  }
}

// Ids of the neurons that fire, rising from that of the first on; how many. There is room for one more than all.
inline int list_neurons(const uint8_t* fires, int width, int first_id, int32_t* ids) {
  int count = 0;
  for (int i = 0; i < width; i++) {
    ids[count] = first_id + i;
    count += fires[i];
  }
  return count;
}

}  // namespace isotherm
