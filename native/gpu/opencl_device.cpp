#include "opencl_device.h"

#include <algorithm>
#include <cstring>

#include "library.h"

namespace isotherm {
namespace {

// Names the ICD loader where it lies in no usual place.
constexpr const char* kVariable = "ISOTHERM_OPENCL";
#if defined(_WIN32)
const std::vector<std::string> kLoaders = {"OpenCL.dll"};
#elif defined(__APPLE__)
const std::vector<std::string> kLoaders = {"/System/Library/Frameworks/OpenCL.framework/OpenCL"};
#else
const std::vector<std::string> kLoaders = {"libOpenCL.so.1", "libOpenCL.so"};
#endif

cl::Calls load_calls() {
  void* library = open_library(kVariable, kLoaders);
  if (!library) throw GpuError(GpuFault::kNoDriver, "no OpenCL on this machine: " + kLoaders[0] + " cannot be opened");
  cl::Calls table{};
#define ISOTHERM_LOAD(name, result, arguments) load_call(library, "the OpenCL library", "cl" #name, table.name);
  ISOTHERM_OPENCL_CALLS(ISOTHERM_LOAD)
#undef ISOTHERM_LOAD
  return table;
}

GpuFault fault_of(cl::Int status) {
  switch (status) {
    case cl::kMemoryAllocationFailure:
    case cl::kOutOfHostMemory:
    case cl::kInvalidBufferSize:
      return GpuFault::kOutOfMemory;
    default:
      return GpuFault::kLost;
  }
}

template <class T>
T device_value(cl::Device device, cl::Uint what) {
  T value{};
  cl::calls().GetDeviceInfo(device, what, sizeof value, &value, nullptr);
  return value;
}

template <class Get>
std::string text_of(const Get& get) {
  size_t size = 0;
  if (get(size_t{0}, nullptr, &size) != cl::kSuccess || size == 0) return {};
  std::string text(size, '\0');
  get(size, text.data(), nullptr);
  return text.c_str();  // up to the first zero
}

std::string device_text(cl::Device device, cl::Uint what) {
  return text_of(
      [&](size_t size, void* to, size_t* real) { return cl::calls().GetDeviceInfo(device, what, size, to, real); });
}

constexpr cl::Ulong kLeastLocalBytes = 32 << 10;
constexpr size_t kLeastLanes = 256;

// What the contract's floats need, and the kernels themselves.
std::string missing(cl::Device device, bool has_compiler) {
  const auto config = device_value<cl::Ulong>(device, cl::kDeviceFloatConfig);
  std::string lacks;
  const auto need = [&](bool is_there, const char* what) {
    if (!is_there) lacks += (lacks.empty() ? "" : ", ") + std::string(what);
  };
  need(config & cl::kFloatDenormals, "subnormal floats");
  need(config & cl::kFloatInfNan, "infinities");
  need(config & cl::kFloatRoundNearest, "rounding to nearest");
  need(config & cl::kFloatFma, "fused multiply-add");
  need(config & cl::kFloatExactDivision, "exact division");
  need(has_compiler, "a compiler");
  need(device_value<cl::Uint>(device, cl::kDeviceLittleEndian) != 0, "little-endian bytes");
  need(device_value<cl::Ulong>(device, cl::kDeviceLocalMemory) >= kLeastLocalBytes, "32 KB of local memory");
  need(device_value<size_t>(device, cl::kDeviceMaxGroup) >= kLeastLanes, "groups of 256 lanes");
  return lacks;
}

GpuFacts facts_of(cl::Platform platform, cl::Device device) {
  GpuFacts facts{};
  facts.platform = text_of([&](size_t size, void* to, size_t* real) {
    return cl::calls().GetPlatformInfo(platform, cl::kPlatformName, size, to, real);
  });
  facts.name = device_text(device, cl::kDeviceName);
  facts.vendor = device_text(device, cl::kDeviceVendor);
  facts.driver = device_text(device, cl::kDriverVersion);
  facts.is_gpu = !(device_value<cl::Ulong>(device, cl::kDeviceType) & cl::kTypeCpu);
  facts.shares_memory = device_value<cl::Uint>(device, cl::kDeviceUnifiedMemory) != 0;
  facts.has_dot_product =
      device_text(device, cl::kDeviceExtensions).find("cl_khr_integer_dot_product") != std::string::npos;
  facts.has_double = device_text(device, cl::kDeviceExtensions).find("cl_khr_fp64") != std::string::npos;
  facts.memory_bytes = static_cast<int64_t>(device_value<cl::Ulong>(device, cl::kDeviceMemory));
  facts.largest_buffer_bytes = static_cast<int64_t>(device_value<cl::Ulong>(device, cl::kDeviceMaxAllocation));
  facts.num_units = static_cast<int>(device_value<cl::Uint>(device, cl::kDeviceUnits));
  facts.max_lanes = static_cast<int>(device_value<size_t>(device, cl::kDeviceMaxGroup));
  facts.lacks = missing(device, device_value<cl::Uint>(device, cl::kDeviceCompiler) != 0);
  if (!device_value<cl::Uint>(device, cl::kDeviceAvailable)) facts.lacks = "it is not available";
  return facts;
}

std::vector<std::pair<cl::Platform, cl::Device>> all_devices() {
  const cl::Calls& cl = cl::calls();
  cl::Uint num_platforms = 0;
  if (cl.GetPlatformIDs(0, nullptr, &num_platforms) != cl::kSuccess) return {};  // also: no driver is installed
  std::vector<cl::Platform> platforms(num_platforms);
  cl.GetPlatformIDs(num_platforms, platforms.data(), nullptr);
  std::vector<std::pair<cl::Platform, cl::Device>> found;
  for (cl::Platform platform : platforms) {
    cl::Uint num_devices = 0;
    if (cl.GetDeviceIDs(platform, cl::kTypeAll, 0, nullptr, &num_devices) != cl::kSuccess) continue;
    std::vector<cl::Device> devices(num_devices);
    cl.GetDeviceIDs(platform, cl::kTypeAll, num_devices, devices.data(), nullptr);
    for (cl::Device device : devices) found.emplace_back(platform, device);
  }
  return found;
}

}  // namespace

const cl::Calls& cl::calls() {
  static const Calls table = load_calls();  // tried again at the next call, where it throws
  return table;
}

std::vector<GpuFacts> list_opencl() {
  std::vector<GpuFacts> found;
  for (const auto& [platform, device] : all_devices()) found.push_back(facts_of(platform, device));
  return found;
}

void OpenClDevice::check(cl::Int status, const char* call) const {
  if (status == cl::kSuccess) return;
  throw GpuError(fault_of(status), facts_.name + ": cl" + call + " gave error " + std::to_string(status));
}

OpenClDevice::OpenClDevice(int index) : cl_(cl::calls()) {
  const auto [platform, device] = all_devices().at(static_cast<size_t>(index));
  facts_ = facts_of(platform, device);
  device_ = device;
  cl::Int status = cl::kSuccess;
  context_ = cl_.CreateContext(nullptr, 1, &device_, nullptr, nullptr, &status);
  check(status, "CreateContext");
  queue_ = cl_.CreateCommandQueue(context_, device_, 0, &status);
  if (status != cl::kSuccess) cl_.ReleaseContext(context_);
  check(status, "CreateCommandQueue");
}

OpenClDevice::~OpenClDevice() {
  cl_.Finish(queue_);
  for (Staged& staged : staged_)
    if (staged.event) cl_.ReleaseEvent(staged.event);
  for (cl::Kernel kernel : kernels_) cl_.ReleaseKernel(kernel);
  for (cl::Program program : programs_) cl_.ReleaseProgram(program);
  for (cl::Memory buffer : buffers_)
    if (buffer) cl_.ReleaseMemObject(buffer);
  cl_.ReleaseCommandQueue(queue_);
  cl_.ReleaseContext(context_);
}

GpuBuffer OpenClDevice::allocate(size_t num_bytes) {
  cl::Int status = cl::kSuccess;
  cl::Memory buffer = cl_.CreateBuffer(context_, cl::kReadWrite, std::max<size_t>(num_bytes, 4), nullptr, &status);
  check(status, "CreateBuffer");
  buffers_.push_back(buffer);
  return {static_cast<int>(buffers_.size()) - 1};
}

void OpenClDevice::release(GpuBuffer buffer) {
  cl::Memory& memory = buffers_.at(static_cast<size_t>(buffer.index));
  if (memory) cl_.ReleaseMemObject(memory);
  memory = nullptr;
}

void OpenClDevice::write(GpuBuffer to, size_t offset, const void* data, size_t num_bytes) {
  cl::Memory memory = buffers_.at(static_cast<size_t>(to.index));
  check(cl_.EnqueueWriteBuffer(queue_, memory, 1, offset, num_bytes, data, 0, nullptr, nullptr), "EnqueueWriteBuffer");
}

void OpenClDevice::read(GpuBuffer from, size_t offset, void* data, size_t num_bytes) {
  cl::Memory memory = buffers_.at(static_cast<size_t>(from.index));
  check(cl_.EnqueueReadBuffer(queue_, memory, 1, offset, num_bytes, data, 0, nullptr, nullptr), "EnqueueReadBuffer");
}

void OpenClDevice::copy(GpuBuffer from, GpuBuffer to, size_t num_bytes) {
  check(cl_.EnqueueCopyBuffer(queue_, buffers_.at(static_cast<size_t>(from.index)),
                              buffers_.at(static_cast<size_t>(to.index)), 0, 0, num_bytes, 0, nullptr, nullptr),
        "EnqueueCopyBuffer");
}

void OpenClDevice::stage(GpuBuffer to, const void* data, size_t num_bytes) {
  Staged& staged = staged_[next_staged_++ % kNumStaged];
  if (staged.event) {
    const cl::Int status = cl_.WaitForEvents(1, &staged.event);
    cl_.ReleaseEvent(staged.event);
    staged.event = nullptr;
    check(status, "WaitForEvents");
  }
  const auto* bytes = static_cast<const uint8_t*>(data);
  staged.bytes.assign(bytes, bytes + num_bytes);
  cl::Memory memory = buffers_.at(static_cast<size_t>(to.index));
  check(cl_.EnqueueWriteBuffer(queue_, memory, 0, 0, num_bytes, staged.bytes.data(), 0, nullptr, &staged.event),
        "EnqueueWriteBuffer");
}

cl::Program OpenClDevice::compile(const std::string& source, const std::string& options) {
  cl::Int status = cl::kSuccess;
  const char* text = source.data();
  const size_t size = source.size();
  cl::Program program = cl_.CreateProgramWithSource(context_, 1, &text, &size, &status);
  check(status, "CreateProgramWithSource");
  status = cl_.BuildProgram(program, 1, &device_, options.c_str(), nullptr, nullptr);
  if (status == cl::kSuccess) return program;
  const std::string log = text_of([&](size_t room, void* to, size_t* real) {
    return cl_.GetProgramBuildInfo(program, device_, cl::kProgramBuildLog, room, to, real);
  });
  cl_.ReleaseProgram(program);
  throw GpuError(GpuFault::kBuildFailed, facts_.name + ": kernels were not compiled: " + log.substr(0, 2000));
}

int OpenClDevice::build(const std::string& source, const std::string& options, const std::vector<uint8_t>& binary) {
  cl::Program program = nullptr;
  if (!binary.empty()) {
    cl::Int status = cl::kSuccess, binary_status = cl::kSuccess;
    const uint8_t* bytes = binary.data();
    const size_t size = binary.size();
    program = cl_.CreateProgramWithBinary(context_, 1, &device_, &size, &bytes, &binary_status, &status);
    if (status != cl::kSuccess) program = nullptr;
    if (program && cl_.BuildProgram(program, 1, &device_, options.c_str(), nullptr, nullptr) != cl::kSuccess) {
      cl_.ReleaseProgram(program);
      program = nullptr;
    }
  }
  programs_.push_back(program ? program : compile(source, options));
  return static_cast<int>(programs_.size()) - 1;
}

std::vector<uint8_t> OpenClDevice::binary(int program) const {
  cl::Program compiled = programs_.at(static_cast<size_t>(program));
  size_t size = 0;
  check(cl_.GetProgramInfo(compiled, cl::kProgramBinarySizes, sizeof size, &size, nullptr), "GetProgramInfo");
  std::vector<uint8_t> bytes(size);
  uint8_t* to = bytes.data();
  check(cl_.GetProgramInfo(compiled, cl::kProgramBinaries, sizeof to, &to, nullptr), "GetProgramInfo");
  return bytes;
}

int OpenClDevice::kernel(int program, const std::string& name, const std::vector<GpuArgument>& arguments) {
  cl::Int status = cl::kSuccess;
  cl::Kernel kernel = cl_.CreateKernel(programs_.at(static_cast<size_t>(program)), name.c_str(), &status);
  check(status, "CreateKernel");
  kernels_.push_back(kernel);
  for (cl::Uint i = 0; i < arguments.size(); i++) {
    if (const auto* buffer = std::get_if<GpuBuffer>(&arguments[i])) {
      cl::Memory memory = buffers_.at(static_cast<size_t>(buffer->index));
      check(cl_.SetKernelArg(kernel, i, sizeof memory, &memory), "SetKernelArg");
    } else if (const auto* whole = std::get_if<int32_t>(&arguments[i])) {
      check(cl_.SetKernelArg(kernel, i, sizeof *whole, whole), "SetKernelArg");
    } else {
      check(cl_.SetKernelArg(kernel, i, sizeof(float), &std::get<float>(arguments[i])), "SetKernelArg");
    }
  }
  return static_cast<int>(kernels_.size()) - 1;
}

void OpenClDevice::launch(int kernel, const std::array<size_t, 3>& groups, size_t lanes) {
  const size_t global[3] = {groups[0] * lanes, groups[1], groups[2]}, local[3] = {lanes, 1, 1};
  check(cl_.EnqueueNDRangeKernel(queue_, kernels_.at(static_cast<size_t>(kernel)), 3, nullptr, global, local, 0,
                                 nullptr, nullptr),
        "EnqueueNDRangeKernel");
}

void OpenClDevice::flush() { check(cl_.Flush(queue_), "Flush"); }

void OpenClDevice::finish() { check(cl_.Finish(queue_), "Finish"); }

}  // namespace isotherm
