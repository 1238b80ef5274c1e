// What launch code asks of the CUDA runtime: the stream, the current device, and its errors as
// text.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace duqpp::cuda {

// Throws std::runtime_error "<op>: <call>: <name> (<description>)" unless the call succeeded.
inline void check_cuda(cudaError_t status, const char* op, const char* call) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + call + ": " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ")");
}
#define DUQPP_CHECK_CUDA(op, call) ::duqpp::cuda::check_cuda((call), (op), #call)

// Callers that see no CUDA header pass a stream as void*; null is the default stream.
inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// What a launch depends on, of the calling thread's current device.
struct Device {
  int capability_major;  // 9 for compute capability 9.0
  int sm_count;
};

inline Device current_device(const char* op) {
  int index = 0;
  Device device{};
  DUQPP_CHECK_CUDA(op, cudaGetDevice(&index));
  DUQPP_CHECK_CUDA(op, cudaDeviceGetAttribute(&device.capability_major,
                                              cudaDevAttrComputeCapabilityMajor, index));
  DUQPP_CHECK_CUDA(op,
                   cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, index));
  return device;
}

}  // namespace duqpp::cuda
