#include "cuda/kernel_table.h"

#include <pybind11/stl.h>

#include <optional>

#include "python/mxfp4_gemm.h"

namespace duqpp::python {

namespace py = pybind11;
using namespace py::literals;

void bind_kernel_table(py::module_& module) {
  py::class_<cuda::GemmPlan>(module, "GemmPlan",
                             "A kernel of mxfp4_gemm and the arguments not in the problem.")
      .def(py::init([](const std::string& kernel, int splits, int sm_count) {
             for (size_t i = 0; i < cuda::kGemmKernels; ++i) {
               if (kernel == cuda::kGemmKernelInfo[i].name) {
                 return cuda::GemmPlan{static_cast<cuda::GemmKernel>(i), splits, sm_count};
               }
             }
             throw py::value_error("GemmPlan: no kernel is named '" + kernel + "'");
           }),
           "kernel"_a, py::kw_only(), "splits"_a = 1, "sm_count"_a)
      .def_property_readonly(
          "kernel",
          [](const cuda::GemmPlan& plan) { return cuda::gemm_kernel_info(plan.kernel).name; })
      .def_readonly("splits", &cuda::GemmPlan::splits)
      .def_readonly("sm_count", &cuda::GemmPlan::sm_count)
      .def("__repr__", [](const cuda::GemmPlan& plan) {
        return std::string("GemmPlan('") + cuda::gemm_kernel_info(plan.kernel).name +
               "', splits=" + std::to_string(plan.splits) +
               ", sm_count=" + std::to_string(plan.sm_count) + ")";
      });

  module.def(
      "gemm_kernels",
      [] {
        py::list kernels;
        for (const cuda::GemmKernelInfo& info : cuda::kGemmKernelInfo) {
          kernels.append(py::dict("name"_a = info.name, "arch"_a = info.arch,
                                  "tile"_a = py::make_tuple(info.tile_m, info.tile_n, info.tile_k),
                                  "sms"_a = info.sms, "swapped"_a = info.swapped));
        }
        return kernels;
      },
      "The kernels of mxfp4_gemm: name, arch, tile (M, N, K), sms per tile, swapped.");
  module.def("select_gemm", &cuda::select_gemm, "M"_a, "N"_a, "K"_a, py::kw_only(), "arch"_a,
             "sm_count"_a,
             "The plan for [M, K] by [N, K] on compute capability arch / 10, or None.");
  module.def("gemm_workspace_size", &cuda::gemm_workspace_size, "plan"_a, "M"_a, "N"_a,
             "Bytes of device memory that a launch of the plan needs.");
}

}  // namespace duqpp::python
