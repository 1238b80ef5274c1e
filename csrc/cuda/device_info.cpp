#include "cuda/device_info.h"

#include <mutex>

#include "cuda/device.h"

namespace duqpp::cuda {

DeviceInfo device_info(int index) {
  static DeviceInfo known[kKnownDevices];
  static DeviceSet asked;
  static std::mutex writing;
  if (asked.has(index)) return known[index];

  const auto attribute = [index](cudaDeviceAttr attribute) {
    int value = 0;
    DUQPP_CHECK_CUDA("device_info", cudaDeviceGetAttribute(&value, attribute, index));
    return value;
  };
  const DeviceInfo info = {10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                               attribute(cudaDevAttrComputeCapabilityMinor),
                           attribute(cudaDevAttrMultiProcessorCount),
                           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  const std::lock_guard<std::mutex> lock(writing);
  if (index < kKnownDevices && !asked.has(index)) {
    known[index] = info;
    asked.add(index);
  }
  return info;
}

CudaVersions cuda_versions() {
  CudaVersions versions{};
  DUQPP_CHECK_CUDA("cuda_versions", cudaRuntimeGetVersion(&versions.runtime));
  DUQPP_CHECK_CUDA("cuda_versions", cudaDriverGetVersion(&versions.driver));
  return versions;
}

}  // namespace duqpp::cuda
