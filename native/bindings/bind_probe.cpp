// The two probes for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "../runtime/isa.h"
#include "../runtime/probe.h"

namespace nb = nanobind;
using namespace isotherm;

namespace {

void require_sound(const std::string& isa, int num_threads, int num_rounds, double round_s) {
  if (!find_table(isa)) throw std::invalid_argument("instruction set " + isa);
  if (num_threads < 1 || num_rounds < 1 || !(round_s >= 0)) throw std::invalid_argument("threads, rounds or seconds");
}

}  // namespace

void bind_probe(nb::module_& m) {
  m.def(
      "measure_read",
      [](const std::string& isa, int num_threads, size_t buffer_bytes, int num_rounds, double round_s) {
        require_sound(isa, num_threads, num_rounds, round_s);
        nb::gil_scoped_release nogil;
        return measure_read(isa, num_threads, buffer_bytes, num_rounds, round_s);
      },
      nb::arg("isa"), nb::arg("num_threads"), nb::arg("buffer_bytes"), nb::arg("num_rounds"), nb::arg("round_s"),
      "Bytes per second read from memory by all threads together.");
  m.def(
      "measure_int8",
      [](const std::string& isa, int num_threads, int num_rounds, double round_s) {
        require_sound(isa, num_threads, num_rounds, round_s);
        nb::gil_scoped_release nogil;
        return measure_int8(isa, num_threads, num_rounds, round_s);
      },
      nb::arg("isa"), nb::arg("num_threads"), nb::arg("num_rounds"), nb::arg("round_s"),
      "Operations per second of u8 x s8 dot products, a multiply-add counted as two.");
}
