// What launch code asks of the CUDA runtime: the stream, the current device, and its errors as
// text.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
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

// Devices 0 .. kKnownDevices - 1 are asked once, others each time.
inline constexpr int kKnownDevices = 64;

// A set of known devices, for what is done once on each. Threads may add the same one at a time.
class DeviceSet {
 public:
  bool has(int index) const { return (bits_.load(std::memory_order_acquire) & bit(index)) != 0; }
  void add(int index) { bits_.fetch_or(bit(index), std::memory_order_release); }

 private:
  static uint64_t bit(int index) { return index < kKnownDevices ? uint64_t{1} << index : 0; }

  std::atomic<uint64_t> bits_{0};
};

// Index of the calling thread's current device.
inline int current_device(const char* op) {
  int index = 0;
  DUQPP_CHECK_CUDA(op, cudaGetDevice(&index));
  return index;
}

// Whether the current device's code of a kernel has the wait for the kernel before it. Code for
// sm_80 has none, and a driver may have compiled it for a newer device from PTX: launched to
// overlap, it would race. Asked once for each kernel and device, whose index is `device`.
template <auto kKernel>
bool has_wait(const char* op, int device) {
  static DeviceSet asked, waiting;
  if (asked.has(device)) return waiting.has(device);
  cudaFuncAttributes attributes{};
  DUQPP_CHECK_CUDA(op, cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)));
  const bool answer = attributes.ptxVersion >= 90;
  if (answer) waiting.add(device);
  asked.add(device);
  return answer;
}

// Lets a kernel ask for `bytes` of shared memory in a launch on the current device, whose index is
// `device`: more than 48 KiB must be allowed, once on each.
template <auto kKernel>
void allow_shared_memory(const char* op, int device, int bytes) {
  static DeviceSet allowed;
  if (allowed.has(device)) return;
  DUQPP_CHECK_CUDA(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  allowed.add(device);
}

}  // namespace duqpp::cuda
