#include "gpu_device.h"

#include "cuda_device.h"
#include "opencl_device.h"

namespace isotherm {

std::vector<GpuFacts> list_gpus() {
  std::vector<GpuFacts> found;
  std::string missing;
  for (const auto list : {list_opencl, list_cuda}) {
    try {
      const std::vector<GpuFacts> more = list();
      found.insert(found.end(), more.begin(), more.end());
    } catch (const GpuError& error) {  // the other may be there
      if (error.fault != GpuFault::kNoDriver) throw;
      missing += (missing.empty() ? "" : "; ") + std::string(error.what());
    }
  }
  if (found.empty() && !missing.empty()) throw GpuError(GpuFault::kNoDriver, missing);
  return found;
}

std::shared_ptr<GpuDevice> open_gpu(int index) {
  const std::vector<GpuFacts> all = list_gpus();
  if (index < 0 || index >= std::ssize(all))
    throw GpuError(GpuFault::kRefused, "there is no device " + std::to_string(index));
  int first_cuda = 0;
  while (first_cuda < std::ssize(all) && all[static_cast<size_t>(first_cuda)].architecture.empty()) first_cuda++;
  if (index < first_cuda) return std::make_shared<OpenClDevice>(index);
  return std::make_shared<CudaDevice>(index - first_cuda);
}

}  // namespace isotherm
