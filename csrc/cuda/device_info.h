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

}  // namespace duqpp::cuda
