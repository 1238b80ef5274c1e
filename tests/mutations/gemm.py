"""Faults to plant in the Blackwell mxfp4_gemm, each with the test that must turn red.

(name, file, old text, new text, test); "build" stands for a compilation that must fail. The old
text occurs once. Those of the first list compile no CUDA kernel to its end.
"""

TABLE = "tests/cuda/test_kernel_table.py"
HOST = "tests/cuda/test_mxfp4_gemm_host.py"
SASS = "tests/cuda/test_mxfp4_gemm_sass.py"
GUARDS = "tests/cuda/test_mxfp4_gemm_build.py"

MUTATIONS = [
    (
        "splits not limited to 4",
        "csrc/cuda/kernel_table.h",
        "std::min(by_sms, by_k), 1, 4)",
        "std::min(by_sms, by_k), 1, 64)",
        f"{TABLE}::test_splits_use_idle_sms_and_leave_each_a_share_of_k",
    ),
    (
        "splits of less than two tiles along K",
        "csrc/cuda/kernel_table.h",
        "gemm_kernel_info(kernel).tile_k) / 2;",
        "gemm_kernel_info(kernel).tile_k);",
        f"{TABLE}::test_splits_use_idle_sms_and_leave_each_a_share_of_k",
    ),
    (
        "one split sent to stream-K",
        "csrc/cuda/kernel_table.h",
        "if (splits > 1) return",
        "if (splits > 0) return",
        f"{HOST}::test_the_kernel_of_every_legal_shape_can_implement_it_in_the_workspace_of_the_table",
    ),
    (
        "cost of a wave of 256x192 tiles",
        "csrc/cuda/kernel_table.h",
        "{GemmKernel::kSm100Tile256x192, 7}",
        "{GemmKernel::kSm100Tile256x192, 9}",
        f"{TABLE}::test_llama_3_linears_on_a_b200",
    ),
    (
        "pairs of SMs counted as one each",
        "csrc/cuda/kernel_table.h",
        "std::max(1, sm_count / gemm_kernel_info(kernel).sms)",
        "std::max(1, sm_count)",
        f"{TABLE}::test_llama_3_linears_on_a_b200",
    ),
    (
        "workspace without barriers",
        "csrc/cuda/kernel_table.h",
        " + ceil_div(tiles * 4, 128) * 128;",
        ";",
        f"{HOST}::test_workspace_of_explicit_splits_is_the_formula",
    ),
    (
        "sm_121 forgotten",
        "csrc/cuda/kernel_table.h",
        "if (arch == 120 || arch == 121)",
        "if (arch == 120)",
        f"{TABLE}::test_one_kernel_serves_sm_120",
    ),
    (
        "a kernel in another's place",
        "csrc/cuda/mxfp4_gemm.cpp",
        "&kSm100Swapped,     &kSm100SwappedStreamK,",
        "&kSm100SwappedStreamK, &kSm100Swapped,",
        f"{HOST}::test_workspace_of_explicit_splits_is_the_formula",
    ),
    (
        "N % 8 not checked",
        "csrc/cuda/mxfp4_gemm.cpp",
        "N <= 0 || N > kMost || N % 8",
        "N <= 0 || N > kMost",
        f"{HOST}::test_each_refusal_names_its_argument",
    ),
    (
        "K % 32 not checked",
        "csrc/cuda/mxfp4_gemm.cpp",
        "K <= 0 || K > kMost || K % kBlockSize",
        "K <= 0 || K > kMost",
        f"{HOST}::test_each_refusal_names_its_argument",
    ),
    (
        "scales of a checked without their padding",
        "csrc/cuda/mxfp4_gemm.cpp",
        "const int64_t expected = swizzled_size(rows, K / kBlockSize);",
        "const int64_t expected = rows * (K / kBlockSize);",
        f"{HOST}::test_each_refusal_names_its_argument",
    ),
    (
        "scales of b checked for the rows of a",
        "csrc/cuda/mxfp4_gemm.cpp",
        'check_scales("b.scales", N, K, b_scales_size)',
        'check_scales("b.scales", M, K, b_scales_size)',
        f"{HOST}::test_every_legal_shape_passes_the_checks",
    ),
    (
        "alignment of b.scales not checked",
        "csrc/cuda/mxfp4_gemm.cpp",
        '           check_alignment("b.scales", problem.b_scales, 16),\n',
        "",
        f"{HOST}::test_each_refusal_names_its_argument",
    ),
    (
        "float32 output accepted",
        "csrc/cuda/mxfp4_gemm.cpp",
        "problem.out_dtype == Dtype::kFloat32",
        "false",
        f"{HOST}::test_each_refusal_names_its_argument",
    ),
    (
        "no guard against a build without the wait of programmatic dependent launch",
        "csrc/cuda/mxfp4_gemm_cutlass.cuh",
        "#if !defined(CUTLASS_ENABLE_GDC_FOR_SM100)",
        "#if 0",
        f"{GUARDS}::test_the_definition_that_makes_the_wait_is_required",
    ),
    (
        "no guard against architectures without the wait",
        "csrc/cuda/mxfp4_gemm_cutlass.cuh",
        "#if defined(__CUDA_ARCH__) && !defined(CUTLASS_GDC_ENABLED)",
        "#if 0",
        f"{GUARDS}::test_architectures_without_the_wait_are_refused",
    ),
    (
        "the definition of the wait dropped from the build",
        "csrc/cuda/mxfp4_gemm_epilogue.cuh",
        "#pragma once\n",
        "#pragma once\n#undef CUTLASS_ENABLE_GDC_FOR_SM100\n",
        "build",
    ),
    (
        "bias of a swapped kernel along columns",
        "csrc/cuda/mxfp4_gemm_cutlass.cuh",
        "kSwapped ? BiasAlong::kRows : BiasAlong::kColumns;",
        "BiasAlong::kColumns;",
        "build",
    ),
]

# Each compiles one or more CUDA kernels again, over a minute apiece.
SLOW_MUTATIONS = [
    (
        "operands of a swapped kernel not swapped",
        "csrc/cuda/mxfp4_gemm_cutlass.cuh",
        "const Matrix& A = kSwapped ? weight : x;\n    const Matrix& B = kSwapped ? x : weight;",
        "const Matrix& A = x;\n    const Matrix& B = weight;",
        f"{HOST}::test_a_kernel_can_implement_every_legal_shape",
    ),
    (
        "sm_count left for CUTLASS to query",
        "csrc/cuda/mxfp4_gemm_cutlass.cuh",
        "    arguments.hw_info.sm_count = plan.sm_count;\n",
        "",
        f"{HOST}::test_workspace_of_explicit_splits_is_the_formula",
    ),
    (
        "splits not passed to stream-K",
        "csrc/cuda/mxfp4_gemm_cutlass.cuh",
        "arguments.scheduler.splits = plan.splits;",
        "",
        f"{HOST}::test_workspace_of_explicit_splits_is_the_formula",
    ),
    (
        "bias read before the kernel ahead has ended",
        "csrc/cuda/mxfp4_gemm_epilogue.cuh",
        "      if (bias != nullptr) cutlass::arch::wait_on_dependent_grids();\n",
        "",
        f"{SASS}::test_each_reader_waits_for_the_kernel_before",
    ),
    (
        "out rounded to bfloat16 whatever its dtype",
        "csrc/cuda/mxfp4_gemm_epilogue.cuh",
        "arguments.to_float16 ? words<cutlass::half_t>(values)",
        "arguments.to_float16 ? words<cutlass::bfloat16_t>(values)",
        f"{SASS}::test_out_is_rounded_to_bfloat16_or_float16_at_run_time",
    ),
    (
        "a pair of SMs replaced by single SMs",
        "csrc/cuda/mxfp4_gemm_sm100.cuh",
        "static constexpr bool kPair = kInfo.sms == 2;",
        "static constexpr bool kPair = false;",
        "build",
    ),
]
