// The kernels for one instruction set. Nothing here may be shared with another translation unit by name: everything
// but the table is in unnamed namespaces. AVX2, and the dot product of AVX-512 VNNI in registers of 256 bits.
#include "table.h"
#include "vec_avx2.h"

namespace {
constexpr int kFewTokens = 2;   // tokens in registers at once, codes of two tiles from the packed panel
constexpr int kLoneTokens = 4;  // the same, a tile after the other
constexpr int kManyTokens = 2;  // the same, codes from an unpacked chunk
constexpr int kAttendRows = 3;  // query rows in registers at once

// acc + sum over the four columns of code * activation. kWide: codes may pass 127.
template <bool kWide>
VEC I dot(I acc, U codes, I quad) {
  return {_mm256_dpbusd_avx_epi32(acc.a, codes.a, quad.a), _mm256_dpbusd_avx_epi32(acc.b, codes.b, quad.b)};
}
}  // namespace

// clang-format off: the order is that of use
#include "elementwise.inl"
#include "codecs.inl"
#include "matmul.inl"
#include "attention.inl"
// clang-format on

const isotherm::KernelTable isotherm::kAvxVnniTable = {
    "avxvnni",      kLoneTokens, kManyTokens, &rms_norm, &add_norm, &add,    &quantise,     &multiply_panel,
    &finish_linear, &finish_glu, &embed_row,  &rope,     &append,   &attend, &attend_block, &merge_blocks,
};
