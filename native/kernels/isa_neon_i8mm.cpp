// The kernels on NEON with the dot product of unsigned and signed bytes.
#include "table.h"
#include "vec_neon.h"

namespace {
// acc + sum over the four columns of code * activation. kWide: codes may pass 127.
template <bool kWide>
VEC I dot(I acc, U codes, I quad) {
  return each<I>([&](int i) { return vusdotq_s32(acc.v[i], codes.v[i], vreinterpretq_s8_s32(quad.v[i])); });
}
}  // namespace

#include "kernels.inl"

const isotherm::KernelTable isotherm::kNeonI8mmTable = make_table("neon_i8mm");
