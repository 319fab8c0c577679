// The kernels on NEON with its dot products of signed bytes.
#include "table.h"
#include "vec_neon.h"

namespace {
// acc + sum over the four columns of code * activation. kWide: codes may pass 127. The instruction takes signed bytes:
// a wide code goes in as code - 128, with its top bit flipped, and 128 times the activations are added.
template <bool kWide>
VEC I dot(I acc, U codes, I quad) {
  return each<I>([&](int i) {
    const int8x16_t activations = vreinterpretq_s8_s32(quad.v[i]);
    if constexpr (!kWide) return vdotq_s32(acc.v[i], vreinterpretq_s8_u8(codes.v[i]), activations);
    const int32x4_t surplus = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), activations);
    const int8x16_t flipped = vreinterpretq_s8_u8(veorq_u8(codes.v[i], vdupq_n_u8(128)));
    return vdotq_s32(vsubq_s32(acc.v[i], surplus), flipped, activations);
  });
}
}  // namespace

#include "kernels.inl"

const isotherm::KernelTable isotherm::kNeonTable = make_table("neon");
