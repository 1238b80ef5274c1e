// csrc/cuda/device.h: what is asked or set once for a kernel is so once on each device. The CUDA
// runtime is this file.

#include "cuda/device.h"

#include "check.h"

namespace {

int device = 0;             // the current one
int asked[2], allowed[2];   // calls, of each device
int ptx_version[2] = {80, 90};

void kernel() {}
void other_kernel() {}

}  // namespace

cudaError_t cudaGetDevice(int* index) {
  *index = device;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  ++asked[device];
  attributes->ptxVersion = ptx_version[device];
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  ++allowed[device];
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

int main() {
  using namespace duqpp::cuda;
  for (int round = 0; round < 3; ++round) {
    for (device = 0; device < 2; ++device) {
      const int index = current_device("test");
      CHECK(has_wait<&kernel>("test", index) == (index == 1), "device %d", index);
      allow_shared_memory<&kernel>("test", index, 65536);
    }
  }
  CHECK(asked[0] == 1 && asked[1] == 1, "asked %d and %d times", asked[0], asked[1]);
  CHECK(allowed[0] == 1 && allowed[1] == 1, "allowed %d and %d times", allowed[0], allowed[1]);
  device = 0;
  allow_shared_memory<&other_kernel>("test", 0, 65536);
  CHECK(allowed[0] == 2, "another kernel: %d", allowed[0]);
  for (int call = 0; call < 2; ++call) has_wait<&kernel>("test", kKnownDevices);
  CHECK(asked[0] == 3, "a device beyond those that are known: %d", asked[0]);
  return duqpp::testing::finish("test_device");
}
