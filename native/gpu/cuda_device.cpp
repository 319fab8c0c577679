#include "cuda_device.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

namespace isotherm {
namespace {

constexpr size_t kLeastGraph = 4;   // launches: fewer are no dearer one by one
constexpr size_t kMostGraphs = 64;  // kept at once

GpuFault fault_of(cuda::Int status) { return status == cuda::kOutOfMemory ? GpuFault::kOutOfMemory : GpuFault::kLost; }

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

GpuFacts facts_of(const cuda::Calls& cu, cuda::Device device) {
  const auto number = [&](cuda::Int what) {
    cuda::Int value = 0;
    cu.DeviceGetAttribute(&value, what, device);
    return value;
  };
  char name[256] = {};
  int version = 0, major = 0, minor = 0;
  size_t memory_bytes = 0;
  cu.DeviceGetName(name, sizeof name, device);
  cu.DriverGetVersion(&version);
  cu.DeviceTotalMem(&memory_bytes, device);
  GpuFacts facts{};
  facts.platform = "CUDA";
  facts.name = name;
  facts.vendor = "NVIDIA";
  facts.driver = version_text(version);
  facts.architecture = "sm_" + std::to_string(number(cuda::kMajor)) + std::to_string(number(cuda::kMinor));
  facts.is_gpu = facts.has_double = true;
  facts.shares_memory = number(cuda::kIsIntegrated) != 0;
  facts.memory_bytes = facts.largest_buffer_bytes = static_cast<int64_t>(memory_bytes);
  facts.num_units = number(cuda::kNumUnits);
  facts.max_lanes = number(cuda::kMaxLanes);
  if (const cuda::Compiler* compiler = cuda::compiler()) {
    compiler->Version(&major, &minor);
    const std::string text = "NVRTC " + std::to_string(major) + "." + std::to_string(minor);
    facts.driver += ", " + text;
    if (major > version / 1000) facts.lacks = "a driver as new as its compiler, " + text;
  } else {
    facts.lacks = "NVRTC, CUDA's compiler (pip install isotherm[cuda])";
  }
  return facts;
}

// The driver, started; null where there is none, or no device.
const cuda::Calls* started() {
  const cuda::Calls* cu = cuda::calls();
  const cuda::Int status = cu ? cu->Init(0) : cuda::kSuccess;
  if (status == cuda::kNoDevice) return nullptr;
  if (status == cuda::kSuccess) return cu;
  throw GpuError(GpuFault::kNoDriver, "CUDA's driver does not start: cuInit gave error " + std::to_string(status));
}

}  // namespace

std::vector<GpuFacts> list_cuda() {
  const cuda::Calls* cu = started();
  int count = 0;
  if (cu) cu->DeviceGetCount(&count);
  std::vector<GpuFacts> found;
  for (int i = 0; i < count; i++) {
    cuda::Device device = 0;
    if (cu->DeviceGet(&device, i) == cuda::kSuccess) found.push_back(facts_of(*cu, device));
  }
  return found;
}

void CudaDevice::check(cuda::Int status, const char* call) const {
  if (status == cuda::kSuccess) return;
  const char* name = nullptr;
  cu_.GetErrorName(status, &name);
  throw GpuError(fault_of(status), facts_.name + ": cu" + call + " gave error " + std::to_string(status) + " (" +
                                       (name ? name : "unknown") + ")");
}

CudaDevice::Entered::Entered(const CudaDevice& device) : cu_(device.cu_) {
  device.check(cu_.CtxPushCurrent(device.context_), "CtxPushCurrent");
}

CudaDevice::Entered::~Entered() {
  cuda::Context left = nullptr;
  cu_.CtxPopCurrent(&left);
}

CudaDevice::CudaDevice(int index) : cu_(*started()) {
  check(cu_.DeviceGet(&device_, index), "DeviceGet");
  facts_ = facts_of(cu_, device_);
  check(cu_.PrimaryCtxRetain(&context_, device_), "DevicePrimaryCtxRetain");
  try {
    const Entered entered(*this);
    check(cu_.StreamCreate(&stream_, 1), "StreamCreate");  // waits for no other stream
  } catch (const GpuError&) {
    cu_.PrimaryCtxRelease(device_);
    throw;
  }
}

CudaDevice::~CudaDevice() {
  cuda::Context left = nullptr;
  const bool is_entered = cu_.CtxPushCurrent(context_) == cuda::kSuccess;
  forget_graphs();
  for (Staged& staged : staged_) {
    if (staged.event) cu_.EventDestroy(staged.event);
    if (staged.bytes) cu_.MemFreeHost(staged.bytes);
  }
  for (Program& program : programs_) cu_.ModuleUnload(program.module);
  for (cuda::Address buffer : buffers_)
    if (buffer) cu_.MemFree(buffer);
  cu_.StreamDestroy(stream_);
  if (is_entered) cu_.CtxPopCurrent(&left);
  cu_.PrimaryCtxRelease(device_);
}

GpuBuffer CudaDevice::allocate(size_t num_bytes) {
  const Entered entered(*this);
  cuda::Address buffer = 0;
  check(cu_.MemAlloc(&buffer, std::max<size_t>(num_bytes, 4)), "MemAlloc");
  buffers_.push_back(buffer);
  return {static_cast<int>(buffers_.size()) - 1};
}

void CudaDevice::release(GpuBuffer buffer) {
  const Entered entered(*this);
  finish();  // unlike OpenCL's, a buffer goes at once
  if (address(buffer)) cu_.MemFree(address(buffer));
  address(buffer) = 0;
}

void CudaDevice::write(GpuBuffer to, size_t offset, const void* data, size_t num_bytes) {
  const Entered entered(*this);
  submit();
  check(cu_.CopyToDevice(address(to) + offset, data, num_bytes, stream_), "MemcpyHtoDAsync");
  finish();
}

void CudaDevice::read(GpuBuffer from, size_t offset, void* data, size_t num_bytes) {
  const Entered entered(*this);
  submit();
  check(cu_.CopyToHost(data, address(from) + offset, num_bytes, stream_), "MemcpyDtoHAsync");
  finish();
}

void CudaDevice::copy(GpuBuffer from, GpuBuffer to, size_t num_bytes) {
  const Entered entered(*this);
  submit();
  check(cu_.CopyOnDevice(address(to), address(from), num_bytes, stream_), "MemcpyDtoDAsync");
}

void CudaDevice::stage(GpuBuffer to, const void* data, size_t num_bytes) {
  const Entered entered(*this);
  submit();
  Staged& staged = staged_[next_staged_++ % kNumStaged];
  if (!staged.event) check(cu_.EventCreate(&staged.event, cuda::kNoTiming), "EventCreate");
  check(cu_.EventSynchronize(staged.event), "EventSynchronize");
  if (staged.room < num_bytes) {
    if (staged.bytes) cu_.MemFreeHost(staged.bytes);
    staged = {nullptr, 0, staged.event};
    check(cu_.MemAllocHost(&staged.bytes, num_bytes), "MemAllocHost");
    staged.room = num_bytes;
  }
  std::memcpy(staged.bytes, data, num_bytes);
  check(cu_.CopyToDevice(address(to), staged.bytes, num_bytes, stream_), "MemcpyHtoDAsync");
  check(cu_.EventRecord(staged.event, stream_), "EventRecord");
}

std::vector<uint8_t> CudaDevice::compile(const std::string& source, const std::string& options) const {
  const cuda::Compiler* compiler = cuda::compiler();
  if (!compiler) throw GpuError(GpuFault::kRefused, facts_.name + " lacks " + facts_.lacks);
  std::vector<std::string> words;
  std::istringstream stream(options);
  for (std::string word; stream >> word;) words.push_back(word);
  std::vector<const char*> pointers;
  for (const std::string& word : words) pointers.push_back(word.c_str());
  cuda::Source program = nullptr;
  cuda::Int status = compiler->Create(&program, source.c_str(), "kernels.cu", 0, nullptr, nullptr);
  if (status == cuda::kSuccess) status = compiler->Compile(program, static_cast<int>(pointers.size()), pointers.data());
  const auto text_of = [&](auto get_size, auto get) {
    size_t size = 0;
    if (!program || get_size(program, &size) != cuda::kSuccess) return std::string();
    std::string text(size, '\0');
    get(program, text.data());
    return text;
  };
  const std::string made = status == cuda::kSuccess ? text_of(compiler->GetBinarySize, compiler->GetBinary)
                                                    : text_of(compiler->GetLogSize, compiler->GetLog);
  if (program) compiler->Destroy(&program);
  if (status == cuda::kSuccess) return {made.begin(), made.end()};
  throw GpuError(GpuFault::kBuildFailed, facts_.name + ": kernels were not compiled: NVRTC gave error " +
                                             std::to_string(status) + ": " + std::string(made.c_str()).substr(0, 2000));
}

int CudaDevice::build(const std::string& source, const std::string& options, const std::vector<uint8_t>& binary) {
  const Entered entered(*this);
  Program program{nullptr, binary};
  if (binary.empty() || cu_.ModuleLoadData(&program.module, binary.data()) != cuda::kSuccess) {
    program.binary = compile(source, options);
    check(cu_.ModuleLoadData(&program.module, program.binary.data()), "ModuleLoadData");
  }
  programs_.push_back(std::move(program));
  return static_cast<int>(programs_.size()) - 1;
}

std::vector<uint8_t> CudaDevice::binary(int program) const { return programs_.at(static_cast<size_t>(program)).binary; }

int CudaDevice::kernel(int program, const std::string& name, const std::vector<GpuArgument>& arguments) {
  const Entered entered(*this);
  Kernel kernel;
  check(cu_.ModuleGetFunction(&kernel.function, programs_.at(static_cast<size_t>(program)).module, name.c_str()),
        "ModuleGetFunction");
  for (const GpuArgument& argument : arguments) {
    uint64_t value = 0;
    if (const auto* buffer = std::get_if<GpuBuffer>(&argument)) {
      value = address(*buffer);
    } else if (const auto* whole = std::get_if<int32_t>(&argument)) {
      std::memcpy(&value, whole, sizeof *whole);
    } else {
      std::memcpy(&value, &std::get<float>(argument), sizeof(float));
    }
    kernel.values.push_back(value);
  }
  kernels_.push_back(std::move(kernel));
  return static_cast<int>(kernels_.size()) - 1;
}

void CudaDevice::launch(int kernel, const std::array<size_t, 3>& groups, size_t lanes) {
  const auto word = [](size_t value) { return static_cast<cuda::Uint>(value); };
  gathered_.push_back({kernel, {word(groups[0]), word(groups[1]), word(groups[2])}, word(lanes)});
}

void CudaDevice::enqueue(const Run& run) {
  for (const Launch& l : run) {
    Kernel& kernel = kernels_.at(static_cast<size_t>(l.kernel));
    std::vector<void*> arguments;
    for (uint64_t& value : kernel.values) arguments.push_back(&value);
    check(cu_.LaunchKernel(kernel.function, l.groups[0], l.groups[1], l.groups[2], l.lanes, 1, 1, 0, stream_,
                           arguments.data(), nullptr),
          "LaunchKernel");
  }
}

cuda::GraphExec CudaDevice::record(const Run& run) {
  cuda::Graph graph = nullptr;
  cuda::GraphExec made = nullptr;
  check(cu_.StreamBeginCapture(stream_, cuda::kCaptureThread), "StreamBeginCapture");
  try {
    enqueue(run);
  } catch (const GpuError&) {
    cu_.StreamEndCapture(stream_, &graph);
    if (graph) cu_.GraphDestroy(graph);
    throw;
  }
  check(cu_.StreamEndCapture(stream_, &graph), "StreamEndCapture");
  const cuda::Int status = cu_.GraphInstantiate(&made, graph, 0);
  cu_.GraphDestroy(graph);
  check(status, "GraphInstantiateWithFlags");
  return made;
}

void CudaDevice::submit() {
  enqueue(std::exchange(gathered_, {}));  // forgotten also where one of them fails
}

void CudaDevice::forget_graphs() {
  cu_.StreamSynchronize(stream_);
  for (const auto& [run, graph] : graphs_)
    if (graph) cu_.GraphExecDestroy(graph);
  graphs_.clear();
}

void CudaDevice::flush() {
  const Entered entered(*this);
  if (gathered_.size() < kLeastGraph) return submit();
  const Run run = std::exchange(gathered_, {});
  if (graphs_.size() >= kMostGraphs && !graphs_.contains(run)) forget_graphs();
  const auto [found, is_new] = graphs_.try_emplace(run, nullptr);
  if (is_new) return enqueue(run);
  if (!found->second) found->second = record(run);
  check(cu_.GraphLaunch(found->second, stream_), "GraphLaunch");
}

void CudaDevice::finish() {
  const Entered entered(*this);
  submit();
  check(cu_.StreamSynchronize(stream_), "StreamSynchronize");
}

}  // namespace isotherm
