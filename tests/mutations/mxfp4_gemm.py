"""Faults to plant in mxfp4_gemm on Blackwell, each with the test that must turn red."""

from tests.mutations.mutation import Mutation

TABLE_TESTS = "tests/cuda/test_kernel_table.py"
HOST_TESTS = "tests/cuda/test_mxfp4_gemm_host.py"
SASS_TESTS = "tests/cuda/test_mxfp4_gemm_sass.py"
OP_TESTS = "tests/cuda/test_op_checks.py"
BUILD_TESTS = "tests/cuda/test_mxfp4_gemm_build.py"

TABLE = "csrc/cuda/kernel_table.h"
SWITCH = "csrc/cuda/streamk_switch.h"
OPS = "csrc/torch/cuda_ops.cpp"
LAUNCH = "csrc/cuda/mxfp4_gemm.cpp"
KERNEL = "csrc/cuda/mxfp4_gemm_cutlass.cuh"
EPILOGUE = "csrc/cuda/mxfp4_gemm_epilogue.cuh"
SM100 = "csrc/cuda/mxfp4_gemm_sm100.cuh"

MUTATIONS = (
    Mutation(
        "splits not limited to 4",
        TABLE,
        "std::min(by_sms, by_k), 1, 4)",
        "std::min(by_sms, by_k), 1, 64)",
        f"{TABLE_TESTS}::test_splits_use_idle_sms_and_leave_each_a_share_of_k",
        library=True,
    ),
    Mutation(
        "splits of less than two tiles along K",
        TABLE,
        "gemm_kernel_info(kernel).tile_k) / 2;",
        "gemm_kernel_info(kernel).tile_k);",
        f"{TABLE_TESTS}::test_splits_use_idle_sms_and_leave_each_a_share_of_k",
        library=True,
    ),
    Mutation(
        "stream-K chosen where it is off",
        TABLE,
        "const int splits = streamk ? streamk_splits(M, N, K, sm_count) : 1;",
        "const int splits = streamk_splits(M, N, K, sm_count);",
        f"{TABLE_TESTS}::test_stream_k_has_an_off_switch",
        library=True,
    ),
    Mutation(
        "stream-K on, whatever the environment says",
        SWITCH,
        'return value == "on";',
        "return true;",
        f"{TABLE_TESTS}::test_the_switch_is_what_the_environment_says",
    ),
    Mutation(
        "one split sent to stream-K",
        TABLE,
        "if (splits > 1) return",
        "if (splits > 0) return",
        f"{HOST_TESTS}::test_the_kernel_of_every_legal_shape_can_implement_it_in_the_workspace_of_the_table",
        library=True,
    ),
    Mutation(
        "cost of a wave of 256x192 tiles",
        TABLE,
        "{GemmKernel::kSm100Tile256x192, 7}",
        "{GemmKernel::kSm100Tile256x192, 9}",
        f"{TABLE_TESTS}::test_llama_3_linears_on_a_b200",
        library=True,
    ),
    Mutation(
        "pairs of SMs counted as one each",
        TABLE,
        "std::max(1, sm_count / gemm_kernel_info(kernel).sms)",
        "std::max(1, sm_count)",
        f"{TABLE_TESTS}::test_llama_3_linears_on_a_b200",
        library=True,
    ),
    Mutation(
        "workspace without barriers",
        TABLE,
        " + ceil_div(tiles * 4, 128) * 128;",
        ";",
        f"{HOST_TESTS}::test_workspace_of_explicit_splits_is_the_formula",
        library=True,
    ),
    Mutation(
        "sm_121 forgotten",
        TABLE,
        "if (arch == 120 || arch == 121)",
        "if (arch == 120)",
        f"{TABLE_TESTS}::test_one_kernel_serves_sm_120",
        library=True,
    ),
    Mutation(
        "a kernel in another's place",
        LAUNCH,
        "return instances[static_cast<size_t>(kernel)];",
        "return instances[static_cast<size_t>(kernel) ^ 1];",
        f"{HOST_TESTS}::test_workspace_of_explicit_splits_is_the_formula",
        library=True,
    ),
    Mutation(
        "N % 8 not checked",
        OPS,
        "codes.size(0) > 0 && codes.size(0) % 8 == 0",
        "codes.size(0) > 0",
        f"{OP_TESTS}::test_a_weight_has_rows_of_out_that_can_be_stored",
        library=True,
    ),
    Mutation(
        "K % 32 not checked",
        OPS,
        "K > 0 && K <= kMost && K % kBlockSize == 0",
        "K > 0 && K <= kMost",
        f"{OP_TESTS}::test_k_is_a_multiple_of_32_that_fits_32_bits",
        library=True,
    ),
    Mutation(
        "scales of a checked without their padding",
        OPS,
        "a_scales_size = swizzled_size(a_codes.size(0), K / kBlockSize);",
        "a_scales_size = a_codes.size(0) * (K / kBlockSize);",
        f"{OP_TESTS}::test_scales_of_x_are_swizzled_with_their_padding",
        library=True,
    ),
    Mutation(
        "a weight's scales counted without their padding",
        TABLE,
        "swizzled_size(N, K / kBlockSize);",
        "N * (K / kBlockSize);",
        f"{TABLE_TESTS}::test_scales_of_a_weight_are_swizzled_or_in_fragment_order",
        library=True,
    ),
    Mutation(
        "alignment of scales not checked",
        OPS,
        "  check_aligned(kGemm, scales_name.c_str(), scales.const_data_ptr());\n",
        "",
        f"{OP_TESTS}::test_products_name_the_operand",
        library=True,
    ),
    Mutation(
        "float32 output accepted",
        OPS,
        "out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half, kGemm,",
        "out_dtype != ScalarType::Byte, kGemm,",
        f"{OP_TESTS}::test_out_is_of_16_bits",
        library=True,
    ),
    Mutation(
        "no guard against a build without the wait of programmatic dependent launch",
        KERNEL,
        "#if !defined(CUTLASS_ENABLE_GDC_FOR_SM100)",
        "#if 0",
        f"{BUILD_TESTS}::test_the_definition_that_makes_the_wait_is_required",
    ),
    Mutation(
        "no guard against architectures without the wait",
        KERNEL,
        "#if defined(__CUDA_ARCH__) && !defined(CUTLASS_GDC_ENABLED)",
        "#if 0",
        f"{BUILD_TESTS}::test_architectures_without_the_wait_are_refused",
    ),
    Mutation(
        "the definition of the wait dropped from the build",
        EPILOGUE,
        "#pragma once\n",
        "#pragma once\n#undef CUTLASS_ENABLE_GDC_FOR_SM100\n",
        "compile csrc/cuda/mxfp4_gemm_sm100_256x128.cu",
    ),
    Mutation(
        "bias of a swapped kernel along columns",
        KERNEL,
        "kSwapped ? BiasAlong::kRows : BiasAlong::kColumns;",
        "BiasAlong::kColumns;",
        "compile csrc/cuda/mxfp4_gemm_sm100_swapped.cu",
    ),
    # Each compiles one or more kernels to the end, some 100 s apiece.
    Mutation(
        "operands of a swapped kernel not swapped",
        KERNEL,
        "const Matrix& A = kSwapped ? weight : x;\n    const Matrix& B = kSwapped ? x : weight;",
        "const Matrix& A = x;\n    const Matrix& B = weight;",
        f"{HOST_TESTS}::test_a_kernel_can_implement_every_legal_shape",
        library=True,
    ),
    Mutation(
        "sm_count left for CUTLASS to query",
        KERNEL,
        "    arguments.hw_info.sm_count = plan.sm_count;\n",
        "",
        f"{HOST_TESTS}::test_workspace_of_explicit_splits_is_the_formula",
        library=True,
    ),
    Mutation(
        "splits not passed to stream-K",
        KERNEL,
        "arguments.scheduler.splits = plan.splits;",
        "",
        f"{HOST_TESTS}::test_workspace_of_explicit_splits_is_the_formula",
        library=True,
    ),
    Mutation(
        "bias read before the kernel ahead has ended",
        EPILOGUE,
        "      if (bias != nullptr) cutlass::arch::wait_on_dependent_grids();\n",
        "",
        f"{SASS_TESTS}::test_each_reader_waits_for_the_kernel_before",
        library=True,
    ),
    Mutation(
        "out rounded to bfloat16 whatever its dtype",
        EPILOGUE,
        "arguments.to_float16 ? words<cutlass::half_t>(values)",
        "arguments.to_float16 ? words<cutlass::bfloat16_t>(values)",
        f"{SASS_TESTS}::test_out_is_rounded_to_bfloat16_or_float16_at_run_time",
        library=True,
    ),
    Mutation(
        "a pair of SMs replaced by single SMs",
        SM100,
        "static constexpr bool kPair = kInfo.sms == 2;",
        "static constexpr bool kPair = false;",
        "compile csrc/cuda/mxfp4_gemm_sm100_256x128.cu",
    ),
)
