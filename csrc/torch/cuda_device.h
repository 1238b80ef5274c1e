// What the ops of a CUDA device have in common: torch's stream, and checks of where tensors are.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

#include "torch/checks.h"

namespace duqpp {

// torch's current stream. The function is in libtorch_cuda, which a CPU build of torch lacks: it is
// looked up in the library that is loaded already, so that this one loads under either.
inline void* current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

inline void check_aligned(const char* op, const char* name, const void* pointer) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, op, ": ", name,
                  " must start at a multiple of 16 bytes; pass a copy");
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                       const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), op,
                  ": ", name, " must be on the CUDA device of the first argument");
}

}  // namespace duqpp
