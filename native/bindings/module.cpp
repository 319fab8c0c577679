// The extension module: one bind_* per topic.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "../runtime/isa.h"

namespace nb = nanobind;

void bind_executor(nb::module_& m);
void bind_gpu(nb::module_& m);
void bind_merges(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_pages(nb::module_& m);
void bind_probe(nb::module_& m);
void bind_strings(nb::module_& m);

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a model that is open when the process ends is nobody's mistake
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (const auto* table : isotherm::available_tables()) names.emplace_back(table->name);
        return names;
      },
      "Instruction sets that this processor can run, slowest first.");
  bind_executor(m);
  bind_gpu(m);
  bind_merges(m);
  bind_sampler(m);
  bind_pages(m);
  bind_probe(m);
  bind_strings(m);
}
