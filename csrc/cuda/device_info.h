// What the choice and the launch of a kernel depend on, for callers that see no CUDA header.
#pragma once

namespace duqpp::cuda {

struct DeviceInfo {
  int arch;  // 10 x compute capability: 103 for 10.3
  int sm_count;
  int shared_memory;  // bytes that a CTA can ask for
};

// Of a device by its index; asked once each, since a query takes microseconds.
// Throws std::runtime_error when CUDA refuses.
DeviceInfo device_info(int index);

// 1000 x major + 10 x minor, as in 13010: of the CUDA runtime in this library, and the newest that
// the driver serves; 0 where there is no driver. Asks no device. A driver serves every runtime of
// its own major version, and older ones.
struct CudaVersions {
  int runtime, driver;
};
CudaVersions cuda_versions();

}  // namespace duqpp::cuda
