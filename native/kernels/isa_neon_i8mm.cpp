// The kernels for one instruction set. Nothing here may be shared with another translation unit by name: everything
// but the table is in unnamed namespaces. NEON with the dot product of unsigned and signed bytes.
#include "table.h"
#include "vec_neon.h"

namespace {
constexpr int kFewTokens = 2;   // tokens in registers at once, codes of two tiles from the packed panel
constexpr int kLoneTokens = 6;  // the same, a tile after the other
constexpr int kManyTokens = 2;  // the same, codes from an unpacked chunk
constexpr int kAttendRows = 1;  // query rows in registers at once

// acc + sum over the four columns of code * activation. kWide: codes may pass 127.
template <bool kWide>
VEC I dot(I acc, U codes, I quad) {
  return each<I>([&](int i) { return vusdotq_s32(acc.v[i], codes.v[i], vreinterpretq_s8_s32(quad.v[i])); });
}
}  // namespace

// clang-format off: the order is that of use
#include "elementwise.inl"
#include "codecs.inl"
#include "matmul.inl"
#include "attention.inl"
// clang-format on

const isotherm::KernelTable isotherm::kNeonI8mmTable = {
    "neon_i8mm",    kLoneTokens, kManyTokens, &rms_norm, &add_norm, &add,    &quantise,     &multiply_panel,
    &finish_linear, &finish_glu, &embed_row,  &rope,     &append,   &attend, &attend_block, &merge_blocks,
};
