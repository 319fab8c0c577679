// Pages of a mapped file, brought into the process in one call.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ of Linux 5.14: older headers lack the name

// Whether the system brought them in; one that cannot leaves them to be read as they are used.
bool populate(Bytes data) {
  const nb::gil_scoped_release nogil;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(data.data()), start = first - first % page;
  return madvise(reinterpret_cast<void*>(start), first + data.size() - start, kPopulateRead) == 0;
}

}  // namespace

void bind_pages(nb::module_& m) {
  m.def("populate", &populate, nb::arg("data"), "Maps every page of `data` now; whether the system could.");
}
