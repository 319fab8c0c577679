// The kernels for one instruction set. Nothing here may be shared with another translation unit by name: everything
// but the table is in unnamed namespaces.
#include "table.h"
#include "vec_avx512.h"

namespace {
constexpr int kFewTokens = 4;   // tokens in registers at once, codes of two tiles from the packed panel
constexpr int kLoneTokens = 8;  // the same, a tile after the other
constexpr int kManyTokens = 6;  // the same, codes from an unpacked chunk
constexpr int kAttendRows = 6;  // query rows in registers at once
}  // namespace

// clang-format off: the order is that of use
#include "elementwise.inl"
#include "codecs.inl"
#include "matmul.inl"
#include "attention.inl"
// clang-format on

const isotherm::KernelTable isotherm::kAvx512Table = {
    "avx512",       kLoneTokens, kManyTokens, &rms_norm, &add_norm, &add,    &quantise,     &multiply_panel,
    &finish_linear, &finish_glu, &embed_row,  &rope,     &append,   &attend, &attend_block, &merge_blocks,
};
