"""Faults to plant in mxfp4_gemm for sm_80 to sm_90, each with the test that must turn red."""

from tests.mutations.mutation import Mutation

PROGRAM = "tests/cpp/test_cpu_programs.py::test_program_passes_under_the_sanitizers"
WARP_PROGRAM = f"{PROGRAM}[test_gemm_warp_program]"
SASS_TESTS = "tests/cuda/test_mxfp4_gemm_sm80_sass.py"
TABLE_TESTS = "tests/cuda/test_kernel_table.py"
LAYOUT_TESTS = "tests/format/test_weight_fragment.py"

STATE = "csrc/cuda/mxfp4_gemm_sm80_state.cuh"
MAINLOOP = "csrc/cuda/mxfp4_gemm_sm80_mainloop.cuh"
EPILOGUE = "csrc/cuda/mxfp4_gemm_sm80_epilogue.cuh"
LAUNCH = "csrc/cuda/mxfp4_gemm_sm80.cu"
WARP = "csrc/cuda/mxfp4_gemm_sm80_warp.cuh"
PLAN = "csrc/cuda/mxfp4_gemm_sm80_plan.h"
LAYOUT = "csrc/format/weight_fragment.h"
TABLE = "csrc/cuda/kernel_table.h"
PYTHON = "duqpp/format/weight_fragment.py"

MUTATIONS = (
    Mutation(
        "segments added in another order",
        EPILOGUE,
        "for (int i = 0; i < segments; ++i) total += memory[i].sums[sum];",
        "for (int i = segments - 1; i >= 0; --i) total += memory[i].sums[sum];",
        WARP_PROGRAM,
    ),
    Mutation(
        "totals of earlier rounds forgotten",
        EPILOGUE,
        "float total = round == 0 ? 0.0f : totals[sum];",
        "float total = 0.0f;",
        WARP_PROGRAM,
    ),
    Mutation(
        "scale and product rounded apart",
        MAINLOOP,
        "sum = fmaf(fmaf(magic_dot, a[0], a[1]), w[2 * t + i / 2], sum);",
        "sum += (a[0] * w[2 * t + i / 2]) * (magic_dot - kMagic);",
        WARP_PROGRAM,
    ),
    Mutation(
        "huge scales left to the usual arithmetic",
        MAINLOOP,
        "if (is_plain(task, segment) && !huge) {",
        "if (is_plain(task, segment)) {",
        WARP_PROGRAM,
    ),
    Mutation(
        "an odd last block taken for a pair",
        STATE,
        "(segment + 1 < task.segments || task.blocks % kPairBlocks == 0)",
        "(segment + 1 < task.segments || task.blocks > 0)",
        WARP_PROGRAM,
    ),
    Mutation(
        "a tile of 8 rows taken for a whole one",
        STATE,
        "return task.whole && (segment + 1",
        "return (segment + 1",
        WARP_PROGRAM,
    ),
    Mutation(
        "rows r and r + 8 swapped",
        MAINLOOP,
        "weights[i][lane].word[h] = terms[i][0];",
        "weights[i][lane].word[1 - h] = terms[i][0];",
        WARP_PROGRAM,
    ),
    Mutation(
        "the two terms of W are one",
        MAINLOOP,
        "Warp::mma(weights[1], x[column], dots, dots);",
        "Warp::mma(weights[0], x[column], dots, dots);",
        WARP_PROGRAM,
    ),
    Mutation(
        "-kMagic a forgotten for the next segment",
        MAINLOOP,
        "activation[1] = -kMagic * a;",
        "activation[1] = -kMagic;",
        WARP_PROGRAM,
    ),
    Mutation(
        "a pair multiplied while its codes are on their way",
        MAINLOOP,
        "Warp::template wait_for_copies<Traits::kStages - 1>();",
        "Warp::template wait_for_copies<Traits::kStages>();",
        WARP_PROGRAM,
    ),
    Mutation(
        "every pair on its way waited for",
        MAINLOOP,
        "Warp::template wait_for_copies<Traits::kStages - 1>();",
        "Warp::template wait_for_copies<0>();",
        f"{SASS_TESTS}::test_the_hot_loop_waits_for_the_oldest_pair_alone",
        library=True,
    ),
    Mutation(
        "a pair's place in the ring given away before it is read",
        MAINLOOP,
        "    Warp::template wait_for_copies<Traits::kStages - 1>();\n",
        "    Warp::template wait_for_copies<Traits::kStages - 1>();\n"
        "    copy_weights<Traits, Warp>(task, constants, first + pair + Traits::kStages, place);\n",
        WARP_PROGRAM,
    ),
    Mutation(
        "pairs of a segment that is not a plain one land on those after it",
        MAINLOOP,
        "    Warp::template wait_for_copies<0>();",
        "    ",
        WARP_PROGRAM,
    ),
    Mutation(
        "the pair kStages ahead sought beyond the segment",
        MAINLOOP,
        "first + ahead + (ahead < pairs ? 0 : (task.warps - 1) * kPairs);",
        "first + ahead;",
        WARP_PROGRAM,
    ),
    Mutation(
        "a bias of float16 read as bfloat16",
        EPILOGUE,
        "Dtype::kBFloat16 ? decode_bfloat16(bits) : decode_float16(bits);",
        "Dtype::kBFloat16 ? decode_bfloat16(bits) : decode_bfloat16(bits);",
        WARP_PROGRAM,
    ),
    Mutation(
        "rows of x beyond M stored",
        EPILOGUE,
        "if (n >= problem.N || m >= problem.M) return;",
        "if (n >= problem.N) return;",
        WARP_PROGRAM,
    ),
    Mutation(
        "a round too few",
        PLAN,
        "return {segments, ceil_div(segments, rounds), rounds};",
        "return {segments, segments / rounds, rounds};",
        f"{TABLE_TESTS}::test_rounds_take_every_segment_once_and_their_ctas_fit",
        library=True,
    ),
    Mutation(
        "fragment order: an odd last block laid out as a pair",
        LAYOUT,
        "blocks - first < kPairBlocks ? 1 : kPairBlocks;",
        "blocks - first < kPairBlocks ? 2 : kPairBlocks;",
        WARP_PROGRAM,
    ),
    Mutation(
        "fragment order in Python: block and half swapped",
        PYTHON,
        "return split.permute(0, 3, 2, 5, 4, 1, 6).flatten(1)",
        "return split.permute(0, 3, 2, 5, 1, 4, 6).flatten(1)",
        f"{LAYOUT_TESTS}::test_fragment_order_is_that_of_the_header",
    ),
    Mutation(
        "fragment order in Python: not undone",
        PYTHON,
        "return split.permute(0, 5, 2, 1, 4, 3, 6).reshape(tiles, rows, -1, 4, 4)",
        "return split.permute(0, 5, 2, 1, 3, 4, 6).reshape(tiles, rows, -1, 4, 4)",
        f"{LAYOUT_TESTS}::test_the_inverse_restores_every_byte",
    ),
    Mutation(
        "scales of W checked as swizzled",
        TABLE,
        "return arch >= 80 && arch <= 90 ? fragment_scales_size",
        "return arch >= 80 && arch < 80 ? fragment_scales_size",
        f"{TABLE_TESTS}::test_scales_of_a_weight_are_swizzled_or_in_fragment_order",
        library=True,
    ),
    Mutation(
        "too few CTAs for the SMs",
        TABLE,
        "return ceil_div(ceil_div(N, rows), sm_count) * (rows + 10);",
        "return ceil_div(N, rows) * (rows + 10);",
        f"{TABLE_TESTS}::test_older_gpus_have_as_many_columns_as_rows_of_x_and_ctas_for_their_sms",
        library=True,
    ),
    Mutation(
        "x read before the wait",
        LAUNCH,
        "  wait_for_kernel_before();  // returns at once where it has\n",
        "  copy_first_activations<Traits, GpuGemmWarp>(task, warp, constants, memory);\n"
        "  wait_for_kernel_before();\n",
        f"{SASS_TESTS}::test_waits_before_it_reads_x",
        library=True,
    ),
    Mutation(
        "W read before the kernel that may have written it has ended",
        LAUNCH,
        "  if (!params.early_weights) wait_for_kernel_before();\n",
        "",
        f"{SASS_TESTS}::test_waits_before_it_reads_x",
        library=True,
    ),
    Mutation(
        "tables of PRMT moved to a register for each use",
        WARP,
        ': "=r"(kept)\n        : "r"(value));\n    return kept;',
        ': "=r"(kept)\n        : "r"(value));\n    return value ^ (kept ^ kept);',
        f"{SASS_TESTS}::test_hot_loop",
        library=True,
    ),
)
