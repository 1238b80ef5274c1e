#include "cuda/device_info.h"

#include <map>
#include <mutex>

#include "cuda/device.h"

namespace duqpp::cuda {

DeviceInfo device_info(int index) {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(index); found != known.end()) return found->second;

  constexpr const char* kOp = "device_info";
  int major = 0, minor = 0, sm_count = 0;
  DUQPP_CHECK_CUDA(kOp, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  DUQPP_CHECK_CUDA(kOp, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  DUQPP_CHECK_CUDA(kOp, cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, index));
  return known[index] = {10 * major + minor, sm_count};
}

}  // namespace duqpp::cuda
