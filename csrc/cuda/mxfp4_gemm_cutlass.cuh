// A CUTLASS MXFP4 GEMM kernel behind plain functions: what the instantiations for sm_100 and sm_120
// share.
//
// CUTLASS computes D[m, n] = sum over k of A[m, k] B[n, k], both along K in memory. Normally A is x
// and B the weight. A swapped kernel has the weight as A and x as B, and D column-major: the same
// memory as out row-major, so that a weight is stored once for both. Codes and scales of A and B
// have one format (format/scale_layout.h).
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <cutlass/util/packed_stride.hpp>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/gemm_kernel.h"
#include "cuda/mxfp4_gemm_epilogue.cuh"
#include "cuda/mxfp4_gemm_instance.h"
#include "problem.h"

// Every launch below lets the kernel start before the one ahead of it has ended (programmatic
// dependent launch). CUTLASS's wait for that kernel's writes compiles to nothing without this
// definition, and to nothing for an architecture that its header does not know: a silent race.
#if !defined(CUTLASS_ENABLE_GDC_FOR_SM100)
#error "compile with -DCUTLASS_ENABLE_GDC_FOR_SM100=1: launches race without it"
#endif
#if defined(__CUDA_ARCH__) && !defined(CUTLASS_GDC_ENABLED)
#error "CUTLASS emits no griddepcontrol.wait for this architecture; build for sm_100f or sm_120f"
#endif

namespace duqpp::cuda {

// Config has `kKernel`, its row of the kernel table; `Arch`; `Cluster`; the schedules
// `MainloopSchedule` and `EpilogueSchedule`; and `Scheduler`, a tile scheduler or void for
// CUTLASS's own.
template <class Config>
struct CutlassGemm {
  static constexpr GemmKernelInfo kInfo = gemm_kernel_info(Config::kKernel);
  static constexpr bool kSwapped = kInfo.swapped;

  using Operand = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
  using Code = typename Operand::DataType;
  using Scale = typename Operand::ScaleFactorType;
  using OutWord = uint16_t;  // bfloat16 or float16, as the epilogue rounds
  using OutLayout =
      std::conditional_t<kSwapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kOutAlignment = 8;       // 16 bytes for TMA, hence N % 8 == 0
  static constexpr int kOperandAlignment = 32;  // 16 bytes, a block

  using Tile =
      cute::Shape<cute::Int<kInfo.tile_m>, cute::Int<kInfo.tile_n>, cute::Int<kInfo.tile_k>>;
  using CtaTile = cute::Shape<cute::Int<kInfo.tile_m / kInfo.sms>, cute::Int<kInfo.tile_n>,
                              cute::Int<kInfo.tile_k>>;
  using OpClass = cutlass::arch::OpClassBlockScaledTensorOp;

  // The bias has an entry for each of the N rows of the weight.
  static constexpr BiasAlong kBiasAlong = kSwapped ? BiasAlong::kRows : BiasAlong::kColumns;
  static_assert((kBiasAlong == BiasAlong::kRows) ==
                std::is_same_v<OutLayout, cutlass::layout::ColumnMajor>);
  static constexpr auto kRounding = cutlass::FloatRoundStyle::round_to_nearest;
  // 1 x accumulator + bias, rounded once: with cutlass::plus in its place nvcc 13.0 takes 98
  // registers rather than 76 for the swapped kernel.
  using AddBias = fusion::Sm90EVT<
      fusion::Sm90Compute<cutlass::homogeneous_multiply_add, float, float, kRounding>,
      fusion::Sm90ScalarBroadcast<float>, fusion::Sm90AccFetch, Bias<CtaTile, kBiasAlong>>;
  using Fusion = fusion::Sm90EVT<fusion::Sm90Compute<Round, OutWord, float, kRounding>, AddBias>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Config::Arch, OpClass, Tile, typename Config::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, OutLayout, kOutAlignment,
      OutWord, OutLayout, kOutAlignment, typename Config::EpilogueSchedule, Fusion>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Config::Arch, OpClass, Operand, cutlass::layout::RowMajor, kOperandAlignment,
      Operand, cutlass::layout::ColumnMajor, kOperandAlignment, float, Tile,
      typename Config::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Config::MainloopSchedule>::CollectiveOp;

  using Universal = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                         Epilogue, typename Config::Scheduler>;
  // Types of our own, so that profilers and tests see a name that can be read, and because the host
  // compiler (GCC 12) takes CUTLASS's type for sm_120 and the same type as nvcc spells it for two.
  struct Kernel : Universal {
    struct Params : Universal::Params {
      Params() = default;
      Params(const typename Universal::Params& params) : Universal::Params(params) {}
    };
  };
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Gemm::Arguments;

  // A matrix along K: codes and scales, as x and the weight both come.
  struct Matrix {
    const uint8_t* codes;
    const uint8_t* scales;
    int rows;
  };

  static Arguments arguments(const MXFP4GemmProblem& problem, const GemmPlan& plan) {
    const Matrix x{problem.a_codes, problem.a_scales, static_cast<int>(problem.M)};
    const Matrix weight{problem.b_codes, problem.b_scales, static_cast<int>(problem.N)};
    const Matrix& A = kSwapped ? weight : x;
    const Matrix& B = kSwapped ? x : weight;
    const int K = static_cast<int>(problem.K);
    const auto shape = cute::make_shape(A.rows, B.rows, K, 1);

    using ScaleConfig = typename Mainloop::Sm1xxBlkScaledConfig;
    typename Kernel::MainloopArguments mainloop{};
    mainloop.ptr_A = reinterpret_cast<const Code*>(A.codes);
    mainloop.dA = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {A.rows, K, 1});
    mainloop.ptr_SFA = reinterpret_cast<const Scale*>(A.scales);
    mainloop.layout_SFA = ScaleConfig::tile_atom_to_shape_SFA(shape);
    mainloop.ptr_B = reinterpret_cast<const Code*>(B.codes);
    mainloop.dB = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {B.rows, K, 1});
    mainloop.ptr_SFB = reinterpret_cast<const Scale*>(B.scales);
    mainloop.layout_SFB = ScaleConfig::tile_atom_to_shape_SFB(shape);

    typename Kernel::EpilogueArguments epilogue{};
    // The arguments of a visitor's inputs come before its own.
    const typename AddBias::Arguments add_bias{
        {{1.0f}}, {}, {problem.bias, problem.bias_dtype}, {}};
    epilogue.thread = {add_bias, {problem.out_dtype == Dtype::kFloat16}};
    epilogue.ptr_D = static_cast<OutWord*>(problem.out);
    epilogue.dD = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {A.rows, B.rows, 1});

    Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm, shape, mainloop, epilogue};
    arguments.hw_info.sm_count = plan.sm_count;
    if constexpr (std::is_same_v<typename Config::Scheduler, cutlass::gemm::StreamKScheduler>) {
      arguments.scheduler.splits = plan.splits;
    }
    return arguments;
  }

  static bool can_implement(const MXFP4GemmProblem& problem, const GemmPlan& plan) {
    return Gemm::can_implement(arguments(problem, plan)) == cutlass::Status::kSuccess;
  }

  static int64_t workspace_size(const MXFP4GemmProblem& problem, const GemmPlan& plan) {
    return static_cast<int64_t>(Gemm::get_workspace_size(arguments(problem, plan)));
  }

  static void clear_workspace(const MXFP4GemmProblem& problem, const GemmPlan& plan,
                              void* workspace, void* stream) {
    check(Kernel::initialize_workspace(arguments(problem, plan), workspace, as_stream(stream)));
  }

  static void run(const MXFP4GemmProblem& problem, const GemmPlan& plan, void* workspace,
                  void* stream) {
    allow_shared_memory<cutlass::device_kernel<Kernel>>(
        "mxfp4_gemm", current_device("mxfp4_gemm"), kInstance.shared_memory);
    typename Kernel::Params params =
        Kernel::to_underlying_arguments(arguments(problem, plan), workspace);
    check(Gemm::run(params, as_stream(stream), nullptr, /*launch_with_pdl=*/true));
  }

  static void check(cutlass::Status status) {
    if (status == cutlass::Status::kSuccess) return;
    throw std::runtime_error(std::string("mxfp4_gemm: ") + kInfo.name + ": " +
                             cutlass::cutlassGetStatusString(status));
  }

  static constexpr GemmInstance kInstance = {Kernel::SharedStorageSize, can_implement,
                                             workspace_size, clear_workspace, run};
};

}  // namespace duqpp::cuda
