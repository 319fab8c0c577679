// All kernels, over the vector layer and the dot product that were included before, and the table of them. An
// isa_*.cpp is compiled for one instruction set: nothing here may be shared with another by name, so that everything
// but the table is in unnamed namespaces.
// clang-format off: the order is that of use
#include "elementwise.inl"
#include "codecs.inl"
#include "chunks.inl"
#include "matmul.inl"
#include "sparse.inl"
#include "experts.inl"
#include "attention.inl"
// clang-format on

namespace {

constexpr isotherm::KernelTable make_table(const char* name) {
  return {
      name,      kLoneTokens,     kManyTokens,    &read_lines,   &rms_norm,      &layer_norm, &add_norm,   &add,
      &quantise, &multiply_panel, &multiply_rows, &add_neurons,  &finish_linear, &trim,       &finish_glu, &embed_row,
      &rope,     &append,         &attend,        &attend_block, &merge_blocks,  &route,      &mix,
  };
}

}  // namespace
