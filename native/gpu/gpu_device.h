// One GPU, by OpenCL: memory, compiled kernels and a queue in which commands run in order. Everything that fails throws
// GpuError. Commands may be given from any thread; those of one batch come from one.
#pragma once
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "opencl.h"

namespace isotherm {

enum class GpuFault : int { kNoDriver, kRefused, kOutOfMemory, kBuildFailed, kLost };

struct GpuError : std::runtime_error {
  GpuError(GpuFault fault, const std::string& what) : std::runtime_error(what), fault(fault) {}
  GpuFault fault;
};

struct GpuFacts {
  std::string platform, name, vendor, driver;
  bool is_gpu;           // not a CPU that a driver presents as a device
  bool shares_memory;    // with the CPU
  bool has_dot_product;  // of four packed bytes, as one operation
  bool has_double;
  int64_t memory_bytes, largest_buffer_bytes;
  int num_units, max_lanes;  // of a group
  std::string lacks;         // what of the arithmetic contract's needs; empty: nothing
};

// Every device of every driver, in the drivers' order.
std::vector<GpuFacts> list_gpus();

using GpuArgument = std::variant<int32_t, float, struct GpuBuffer>;
struct GpuBuffer {
  int index;
};

class GpuDevice {
 public:
  explicit GpuDevice(int index);  // as `list_gpus` has it
  ~GpuDevice();
  GpuDevice(const GpuDevice&) = delete;
  GpuDevice& operator=(const GpuDevice&) = delete;

  const GpuFacts& facts() const { return facts_; }

  // Buffers, programs and kernels live as long as the device.
  GpuBuffer allocate(size_t num_bytes);
  void release(GpuBuffer buffer);
  void write(GpuBuffer to, size_t offset, const void* data, size_t num_bytes);  // waits
  void read(GpuBuffer from, size_t offset, void* data, size_t num_bytes);       // waits for all commands before it
  void copy(GpuBuffer from, GpuBuffer to, size_t num_bytes);
  // A write that does not wait: the bytes are kept until they are read.
  void stage(GpuBuffer to, const void* data, size_t num_bytes);

  // A program from what `binary` gave earlier, or where that is empty or refused, from its source.
  int build(const std::string& source, const std::string& options, const std::vector<uint8_t>& binary);
  std::vector<uint8_t> binary(int program) const;
  // A kernel with its arguments.
  int kernel(int program, const std::string& name, const std::vector<GpuArgument>& arguments);
  void launch(int kernel, const std::array<size_t, 3>& groups, size_t lanes);
  void flush();
  void finish();

 private:
  struct Staged {
    std::vector<uint8_t> bytes;
    cl::Event event = nullptr;
  };
  static constexpr size_t kNumStaged = 4;  // writes under way

  void check(cl::Int status, const char* call) const;
  cl::Program compile(const std::string& source, const std::string& options);

  const cl::Calls& cl_;
  GpuFacts facts_;
  cl::Device device_ = nullptr;
  cl::Context context_ = nullptr;
  cl::Queue queue_ = nullptr;
  std::vector<cl::Memory> buffers_;
  std::vector<cl::Program> programs_;
  std::vector<cl::Kernel> kernels_;
  std::array<Staged, kNumStaged> staged_;
  size_t next_staged_ = 0;
};

}  // namespace isotherm
