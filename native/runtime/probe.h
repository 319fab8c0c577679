// How fast this machine reads memory and multiplies bytes: the two limits of every step.
#pragma once
#include <cstddef>
#include <string>

namespace isotherm {

// Bytes per second that `num_threads` streams read together from a buffer of `buffer_bytes`, best of `num_rounds` of
// `round_s` each. A round is short: a neighbour on the machine spoils some, hardly all. `isa` is an available one.
double measure_read(const std::string& isa, int num_threads, size_t buffer_bytes, int num_rounds, double round_s);

// Operations per second (a multiply-add is two) of u8 x s8 dot products between registers, by the instructions that
// the kernels of `isa` use.
double measure_int8(const std::string& isa, int num_threads, int num_rounds, double round_s);

}  // namespace isotherm
