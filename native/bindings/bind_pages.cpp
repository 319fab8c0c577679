// Pages of a mapped file, brought into the process in one call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

#include "../runtime/system.h"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Whether the system brought them in; one that cannot leaves them to be read as they are used.
bool populate(Bytes data) {
  const nb::gil_scoped_release nogil;
  return isotherm::populate(data.data(), data.size());
}

}  // namespace

void bind_pages(nb::module_& m) {
  m.def("populate", &populate, nb::arg("data"), "Maps every page of `data` now; whether the system could.");
}
