// GPUs for Python: which there are, and the parts that a GpuProgram is made of.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "../runtime/gpu_program.h"

namespace nb = nanobind;
using namespace isotherm;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Rows = std::vector<std::tuple<int, GpuBuffer, int, int, int>>;  // as GpuRows has it

// Errors by the name that isotherm.errors has for them, with the way out.
void raise_error(const GpuError& error) {
  const bool is_missing = error.fault == GpuFault::kNoDriver || error.fault == GpuFault::kRefused;
  const bool is_full = error.fault == GpuFault::kOutOfMemory;
  const char* name = is_missing ? "DeviceNotFound" : is_full ? "InsufficientMemory" : "DeviceFailed";
  const char* way_out = is_missing ? "; `isotherm doctor` lists devices, --device cpu needs none"
                        : is_full  ? "; give it less with --vram, or take a smaller context (--ctx)"
                                   : "; --device cpu does without it";
  const nb::object kind = nb::module_::import_("isotherm.errors").attr(name);
  PyErr_SetString(kind.ptr(), (std::string(error.what()) + way_out).c_str());
}

// A program with what its raw pointers point into.
class BoundProgram {
 public:
  BoundProgram(std::shared_ptr<GpuDevice> device, GpuBuffer batch, GpuBuffer head, int num_states)
      : program(std::make_shared<GpuProgram>(std::move(device), batch, head, num_states)) {}

  void rope(FloatRows table) {
    program->add_rope(table.data(), static_cast<int>(table.shape(1)));
    arrays_.push_back(nb::cast(table));
  }

  // launches: as GpuLaunch has it.
  int step(const std::vector<std::tuple<int, int, int, int, int, int, int>>& launches, const Rows& uploads,
           const Rows& outputs, const Rows& downloads) {
    GpuStep made;
    for (const auto& [kernel, panels, rows_per_group, blocks, lanes, least, most] : launches)
      made.launches.push_back({kernel, panels, rows_per_group, static_cast<GpuBlocks>(blocks), lanes, least, most});
    fill(made.uploads, uploads);
    fill(made.outputs, outputs);
    fill(made.downloads, downloads);
    return program->add_step(std::move(made));
  }

  std::shared_ptr<GpuProgram> program;

 private:
  static void fill(std::vector<GpuRows>& to, const Rows& from) {
    for (const auto& [buffer, on_device, offset, stride, width] : from)
      to.push_back({buffer, on_device, offset, stride, width});
  }

  std::vector<nb::object> arrays_;
};

}  // namespace

std::shared_ptr<GpuProgram> gpu_program(nb::handle bound) { return nb::cast<BoundProgram&>(bound).program; }

void bind_gpu(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const GpuError& error) {
      raise_error(error);
    }
  });
  nb::class_<GpuFacts>(m, "GpuFacts")
      .def_ro("platform", &GpuFacts::platform)
      .def_ro("name", &GpuFacts::name)
      .def_ro("vendor", &GpuFacts::vendor)
      .def_ro("driver", &GpuFacts::driver)
      .def_ro("architecture", &GpuFacts::architecture)
      .def_ro("is_gpu", &GpuFacts::is_gpu)
      .def_ro("shares_memory", &GpuFacts::shares_memory)
      .def_ro("has_dot_product", &GpuFacts::has_dot_product)
      .def_ro("has_double", &GpuFacts::has_double)
      .def_ro("memory_bytes", &GpuFacts::memory_bytes)
      .def_ro("largest_buffer_bytes", &GpuFacts::largest_buffer_bytes)
      .def_ro("num_units", &GpuFacts::num_units)
      .def_ro("max_lanes", &GpuFacts::max_lanes)
      .def_ro("lacks", &GpuFacts::lacks);
  m.def("list_gpus", &list_gpus, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<GpuBuffer>(m, "GpuBuffer").def(nb::init<int>()).def_ro("index", &GpuBuffer::index);
  nb::class_<GpuDevice>(m, "GpuDevice")
      .def(nb::new_([](int index) {
             const nb::gil_scoped_release nogil;
             return open_gpu(index);
           }),
           nb::arg("index"))
      .def_prop_ro("facts", &GpuDevice::facts, nb::rv_policy::copy)
      .def("allocate", &GpuDevice::allocate)
      .def("release", &GpuDevice::release)
      .def("write",
           [](GpuDevice& device, GpuBuffer to, size_t offset, Bytes data) {
             const nb::gil_scoped_release nogil;
             device.write(to, offset, data.data(), data.size());
           })
      .def("read",
           [](GpuDevice& device, GpuBuffer from, size_t offset, MutableBytes data) {
             const nb::gil_scoped_release nogil;
             device.read(from, offset, data.data(), data.size());
           })
      .def("copy", &GpuDevice::copy)
      .def("build",
           [](GpuDevice& device, const std::string& source, const std::string& options, const nb::bytes& binary) {
             const auto* first = static_cast<const uint8_t*>(binary.data());
             const std::vector<uint8_t> stored(first, first + binary.size());
             const nb::gil_scoped_release nogil;
             return device.build(source, options, stored);
           })
      .def("binary",
           [](const GpuDevice& device, int program) {
             const std::vector<uint8_t> bytes = device.binary(program);
             return nb::bytes(bytes.data(), bytes.size());
           })
      .def("kernel", &GpuDevice::kernel)
      .def("launch", &GpuDevice::launch)
      .def("finish", &GpuDevice::finish, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<BoundProgram>(m, "GpuProgram")
      .def(nb::init<std::shared_ptr<GpuDevice>, GpuBuffer, GpuBuffer, int>())
      .def("rope", &BoundProgram::rope)
      .def("pages", [](BoundProgram& self, int state, GpuBuffer buffer) { self.program->add_pages({state, buffer}); })
      .def("choice", [](BoundProgram& self, int kernel, int lanes, GpuBuffer out, int row_words,
                        int most_kept) { self.program->set_choice({kernel, lanes, out, row_words, most_kept}); })
      .def("step", &BoundProgram::step);
}
