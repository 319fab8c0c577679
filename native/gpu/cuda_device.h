// A device of NVIDIA's, by CUDA. Launches are gathered until something else is asked for. A run of them that is
// flushed, so that nobody waits for it, and comes a second time is a graph from then on, which costs one call.
#pragma once
#include <compare>
#include <map>

#include "cuda.h"
#include "gpu_device.h"

namespace isotherm {

// None where the driver is not there, or finds no device.
std::vector<GpuFacts> list_cuda();

class CudaDevice final : public GpuDevice {
 public:
  explicit CudaDevice(int index);  // as `list_cuda` has it
  ~CudaDevice() override;

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
  // Its context is the thread's as long as this lives. Then again what was before: others in this process use CUDA too.
  class Entered {
   public:
    explicit Entered(const CudaDevice& device);
    ~Entered();
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;

   private:
    const cuda::Calls& cu_;
  };
  struct Staged {
    void* bytes = nullptr;  // pinned
    size_t room = 0;
    cuda::Event event = nullptr;
  };
  struct Program {
    cuda::Module module = nullptr;
    std::vector<uint8_t> binary;
  };
  struct Kernel {
    cuda::Function function = nullptr;
    std::vector<uint64_t> values;  // one argument each, in its first bytes
  };
  struct Launch {
    int kernel;
    std::array<cuda::Uint, 3> groups;
    cuda::Uint lanes;
    std::strong_ordering operator<=>(const Launch&) const = default;
  };
  using Run = std::vector<Launch>;
  static constexpr size_t kNumStaged = 4;  // writes under way

  void check(cuda::Int status, const char* call) const;
  cuda::Address& address(GpuBuffer buffer) { return buffers_.at(static_cast<size_t>(buffer.index)); }
  std::vector<uint8_t> compile(const std::string& source, const std::string& options) const;
  void submit();
  void enqueue(const Run& run);
  cuda::GraphExec record(const Run& run);
  void forget_graphs();

  const cuda::Calls& cu_;
  cuda::Device device_ = 0;
  cuda::Context context_ = nullptr;
  cuda::Stream stream_ = nullptr;
  std::vector<cuda::Address> buffers_;
  std::vector<Program> programs_;
  std::vector<Kernel> kernels_;
  std::array<Staged, kNumStaged> staged_;
  size_t next_staged_ = 0;
  Run gathered_;
  std::map<Run, cuda::GraphExec> graphs_;  // null: it came once
};

}  // namespace isotherm
