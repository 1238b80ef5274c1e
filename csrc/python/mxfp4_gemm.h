// The parts of duqpp._C about mxfp4_gemm on Blackwell: what can be asked without a tensor or a GPU.
#pragma once

#include <pybind11/pybind11.h>

namespace duqpp::python {

void bind_kernel_table(pybind11::module_& module);  // in every build
void bind_mxfp4_gemm(pybind11::module_& module);    // in builds with the CUDA kernels

}  // namespace duqpp::python
