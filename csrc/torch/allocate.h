// Tensors for results and workspaces, uninitialized.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace duqpp {

// A contiguous tensor on the device of another. torch::stable::new_empty finds its op by name in
// every call, which takes longer than to allocate.
inline torch::stable::Tensor empty_on_device_of(const torch::stable::Tensor& other,
                                               const std::vector<int64_t>& sizes,
                                               torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(other.get(), &device_index));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type, device_type, device_index,
                                                  &result));
  return torch::stable::Tensor(result);
}

}  // namespace duqpp
