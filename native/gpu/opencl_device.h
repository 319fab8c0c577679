// A device of OpenCL.
#pragma once
#include "gpu_device.h"
#include "opencl.h"

namespace isotherm {

// Every device of every OpenCL driver, in the drivers' order.
std::vector<GpuFacts> list_opencl();

class OpenClDevice final : public GpuDevice {
 public:
  explicit OpenClDevice(int index);  // as `list_opencl` has it
  ~OpenClDevice() override;

  GpuBuffer allocate(size_t num_bytes) override;
  void release(GpuBuffer buffer) override;
  void write(GpuBuffer to, size_t offset, const void* data, size_t num_bytes) override;
  void read(GpuBuffer from, size_t offset, void* data, size_t num_bytes) override;
  void copy(GpuBuffer from, GpuBuffer to, size_t num_bytes) override;
  void stage(GpuBuffer to, const void* data, size_t num_bytes) override;
  int build(const std::string& source, const std::string& options, const std::vector<uint8_t>& binary) override;
  std::vector<uint8_t> binary(int program) const override;
  int kernel(int program, const std::string& name, const std::vector<GpuArgument>& arguments) override;
  void launch(int kernel, const std::array<size_t, 3>& groups, size_t lanes) override;
  void flush() override;
  void finish() override;

 private:
  struct Staged {
    std::vector<uint8_t> bytes;
    cl::Event event = nullptr;
  };
  static constexpr size_t kNumStaged = 4;  // writes under way

  void check(cl::Int status, const char* call) const;
  cl::Program compile(const std::string& source, const std::string& options);

  const cl::Calls& cl_;
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
