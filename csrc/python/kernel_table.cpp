#include "cuda/kernel_table.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "cuda/mxfp4_gemm_sm80_plan.h"
#include "cuda/rotate_quantize_plan.h"
#include "cuda/streamk_switch.h"
#include "format/weight_fragment.h"
#include "python/mxfp4_gemm.h"

namespace duqpp::python {

namespace py = pybind11;
using namespace py::literals;

namespace {

Prologue prologue_of(const std::string& op) {
  if (op == "rotate_quantize") return Prologue::kNone;
  if (op == "rmsnorm_rotate_quantize") return Prologue::kRmsNorm;
  if (op == "silu_mul_rotate_quantize") return Prologue::kSiluMul;
  throw py::value_error("'" + op + "' is no form of rotate_quantize");
}

}  // namespace

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
      .def_property_readonly(
          "arch",
          [](const cuda::GemmPlan& plan) { return cuda::gemm_kernel_info(plan.kernel).arch; })
      .def_property_readonly("tile",
                             [](const cuda::GemmPlan& plan) {
                               const auto& info = cuda::gemm_kernel_info(plan.kernel);
                               return py::make_tuple(info.tile_m, info.tile_n, info.tile_k);
                             })
      .def_property_readonly(
          "sms", [](const cuda::GemmPlan& plan) { return cuda::gemm_kernel_info(plan.kernel).sms; })
      .def_property_readonly(
          "swapped",
          [](const cuda::GemmPlan& plan) { return cuda::gemm_kernel_info(plan.kernel).swapped; })
      .def_property_readonly(
          "reason",
          [](const cuda::GemmPlan& plan) { return cuda::gemm_kernel_reason(plan.kernel); })
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
        py::list names;
        for (const cuda::GemmKernelInfo& info : cuda::kGemmKernelInfo) names.append(info.name);
        return names;
      },
      "Names of the kernels of mxfp4_gemm, in the order of the enumeration.");
  module.def(
      "gemm_sm80_launch",
      [](const cuda::GemmPlan& plan, int64_t M, int64_t N, int64_t K, int arch) {
        const cuda::GemmKernelInfo& info = cuda::gemm_kernel_info(plan.kernel);
        if (info.arch != 80) throw py::value_error(std::string(info.name) + " is not for sm_80");
        const int rows = info.tile_m / 16, columns = info.tile_n / 8;
        const cuda::GemmSm80Plan split =
            cuda::plan_gemm_sm80(K, rows, columns, cuda::gemm_sm80_most_shared_memory(arch));
        return py::dict(
            "ctas"_a = cuda::gemm_tiles(plan.kernel, M, N), "warps"_a = split.warps,
            "rounds"_a = split.rounds, "segments"_a = split.segments,
            "shared_memory"_a = cuda::gemm_sm80_shared_memory(split.warps, rows, columns));
      },
      "plan"_a, "M"_a, "N"_a, "K"_a, py::kw_only(), "arch"_a,
      "How a kernel for sm_80 is launched on compute capability arch / 10: ctas, warps of each, "
      "rounds in which these take the segments of K, and bytes of shared memory of a CTA.");
  module.def(
      "select_gemm",
      [](int64_t M, int64_t N, int64_t K, int arch, int sm_count, std::optional<bool> streamk) {
        const bool allowed = streamk.has_value() ? *streamk : cuda::streamk_switch().load();
        return cuda::select_gemm(M, N, K, arch, sm_count, allowed);
      },
      "M"_a, "N"_a, "K"_a, py::kw_only(), "arch"_a, "sm_count"_a, "streamk"_a = py::none(),
      "The plan for [M, K] by [N, K] on compute capability arch / 10, or None. streamk: whether it "
      "may be stream-K; None is what an op would do.");
  module.def(
      "allow_streamk", [](bool allowed) { return cuda::streamk_switch().exchange(allowed); },
      "allowed"_a, "Let ops choose stream-K, or not; returns whether they could before.");
  module.def(
      "gemm_waves",
      [](const cuda::GemmPlan& plan, int64_t M, int64_t N) {
        return cuda::gemm_waves(plan.kernel, M, N, plan.sm_count);
      },
      "plan"_a, "M"_a, "N"_a, "Rounds of tiles until all are done, whatever their splits.");
  module.def("weight_scales_size", &cuda::weight_scales_size, "N"_a, "K"_a, py::kw_only(), "arch"_a,
             "Bytes of the scales of a weight [N, K] prepared for compute capability arch / 10.");
  module.def("gemm_workspace_size", &cuda::gemm_workspace_size, "plan"_a, "M"_a, "N"_a,
             "Bytes of device memory that a launch of the plan needs.");
  module.def("fragment_nibble_offset", &fragment_nibble_offset, "row"_a, "column"_a, "N"_a, "K"_a,
             "Where fragment order has the code of (row, column), in nibbles.");
  module.def("fragment_scale_offset", &fragment_scale_offset, "row"_a, "block"_a, "N"_a, "K"_a,
             "Where fragment order has the scale of (row, block), in bytes.");
  module.def(
      "rotate_quantize_launch",
      [](const std::string& op, int64_t M, int64_t K, int arch, int sm_count) {
        RotateQuantizeProblem problem{};
        problem.M = M;
        problem.K = K;
        problem.prologue = prologue_of(op);
        problem.scale_layout = ScaleLayout::kSwizzled;
        const cuda::RotateQuantizePlan plan = cuda::plan_rotate_quantize(problem, sm_count);
        return py::dict("ctas"_a = plan.column_chunks * plan.row_strips,
                        "threads"_a = plan.teams * cuda::kTeamWarps * kWarpLanes,
                        // GpuWarp::encode: code for sm_100 and sm_120 has the instruction.
                        "hardware_e2m1"_a = arch >= 100);
      },
      "op"_a, "M"_a, "K"_a, py::kw_only(), "arch"_a, "sm_count"_a,
      "How rotate_quantize, or a fused form of it, is launched on compute capability arch / 10: "
      "ctas, threads of each, and whether codes are rounded by an instruction.");
}

}  // namespace duqpp::python
