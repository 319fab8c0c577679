// One GPU, by whichever driver: memory, compiled kernels and a queue in which commands run in order. Everything that
// fails throws GpuError. Commands may be given from any thread, by one at a time.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace isotherm {

enum class GpuFault : int { kNoDriver, kRefused, kOutOfMemory, kBuildFailed, kLost };

struct GpuError : std::runtime_error {
  GpuError(GpuFault fault, const std::string& what) : std::runtime_error(what), fault(fault) {}
  GpuFault fault;
};

struct GpuFacts {
  std::string platform, name, vendor, driver;
  std::string architecture;  // that CUDA C++ is compiled for; empty: kernels are OpenCL C
  bool is_gpu;               // not a CPU that a driver presents as a device
  bool shares_memory;        // with the CPU
  bool has_dot_product;      // of four packed bytes, as one operation of OpenCL C
  bool has_double;
  int64_t memory_bytes, largest_buffer_bytes;
  int num_units, max_lanes;  // of a group
  std::string lacks;         // what of the arithmetic contract's needs; empty: nothing
};

using GpuArgument = std::variant<int32_t, float, struct GpuBuffer>;
struct GpuBuffer {
  int index;
};

class GpuDevice {
 public:
  GpuDevice() = default;
  virtual ~GpuDevice() = default;
  GpuDevice(const GpuDevice&) = delete;
  GpuDevice& operator=(const GpuDevice&) = delete;

  const GpuFacts& facts() const { return facts_; }

  // Buffers, programs and kernels live as long as the device.
  virtual GpuBuffer allocate(size_t num_bytes) = 0;
  virtual void release(GpuBuffer buffer) = 0;
  virtual void write(GpuBuffer to, size_t offset, const void* data, size_t num_bytes) = 0;  // waits
  // Waits for all commands before it.
  virtual void read(GpuBuffer from, size_t offset, void* data, size_t num_bytes) = 0;
  virtual void copy(GpuBuffer from, GpuBuffer to, size_t num_bytes) = 0;
  // A write that does not wait: the bytes are kept until they are read.
  virtual void stage(GpuBuffer to, const void* data, size_t num_bytes) = 0;

  // A program from what `binary` gave earlier, or where that is empty or refused, from its source.
  virtual int build(const std::string& source, const std::string& options, const std::vector<uint8_t>& binary) = 0;
  virtual std::vector<uint8_t> binary(int program) const = 0;
  // A kernel with its arguments.
  virtual int kernel(int program, const std::string& name, const std::vector<GpuArgument>& arguments) = 0;
  virtual void launch(int kernel, const std::array<size_t, 3>& groups, size_t lanes) = 0;
  virtual void flush() = 0;
  virtual void finish() = 0;

 protected:
  GpuFacts facts_;
};

// Every device of every driver: OpenCL's in its drivers' order, then CUDA's.
std::vector<GpuFacts> list_gpus();
std::shared_ptr<GpuDevice> open_gpu(int index);  // as `list_gpus` has it

}  // namespace isotherm
