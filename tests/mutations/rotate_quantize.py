"""Faults to plant in rotate_quantize, each with the test that must turn red."""

from tests.mutations.mutation import Mutation

PROGRAMS = "tests/cpp/test_rotate_quantize_programs.py"
NUMERICS = f"{PROGRAMS}::test_numerics_over_whole_domains"
PROGRAM = f"{PROGRAMS}::test_warp_program_equals_the_format"
CUTLASS = f"{PROGRAMS}::test_layouts_and_conversions_are_those_of_cutlass"
RESOURCES = "tests/cuda/test_resources.py"
HOT_LOOP = f"{RESOURCES}::test_hot_loop[100f]"
WAITS = f"{RESOURCES}::test_waits_before_it_reads_x[100f]"
LOADS = f"{RESOURCES}::test_loads_are_of_128_bits[100f]"

E2M1 = "csrc/format/e2m1.h"
WORD = "csrc/format/e2m1_word.h"
E8M0 = "csrc/format/e8m0.h"
CHANGE = "csrc/format/error_change.h"
LAYOUT = "csrc/format/scale_layout.h"
FRAGMENT = "csrc/format/fragment.h"
PLAN = "csrc/cuda/rotate_quantize_plan.h"
KERNEL = "csrc/cuda/rotate_quantize.cuh"
WARP = "csrc/cuda/gpu_warp.cuh"
LAUNCH = "csrc/cuda/rotate_quantize.cu"

MUTATIONS = (
    Mutation(
        "the wait of a kernel known by the answer of another device",
        "csrc/cuda/device.h",
        "if (answer) waiting.add(device);",
        "if (answer) waiting.add(0);",
        "tests/cpp/test_rotate_quantize_programs.py"
        "::test_what_is_set_once_is_set_once_on_each_device",
    ),
    # Numerics.
    Mutation(
        "e2m1: tie at 1/4 goes up",
        E2M1,
        "magnitude > 0x3E800000u",
        "magnitude >= 0x3E800000u",
        NUMERICS,
    ),
    Mutation(
        "e2m1: tie at 3/4 goes down",
        E2M1,
        "magnitude >= 0x3F400000u",
        "magnitude > 0x3F400000u",
        NUMERICS,
    ),
    Mutation(
        "e2m1: ties go away from zero",
        E2M1,
        "0x1FFFFFu + ((magnitude >> 22) & 1u)",
        "0x200000u",
        NUMERICS,
    ),
    Mutation("e2m1: no saturation", E2M1, "(code < 7u ? code : 7u)", "(code & 7u)", NUMERICS),
    Mutation(
        "e2m1: nibbles swapped",
        E2M1,
        "even_column | (odd_column << 4)",
        "odd_column | (even_column << 4)",
        NUMERICS,
    ),
    Mutation(
        "e2m1 word: ties of the coarse grid", WORD, "kBase + 2.0f)", "kBase + 2.5f)", NUMERICS
    ),
    Mutation(
        "e2m1 word: nibbles swapped",
        WORD,
        "for (int i = 7; i >= 0; --i) {",
        "for (int j = 7; j >= 0; --j) {\n    const int i = j ^ 1;",
        NUMERICS,
    ),
    Mutation("e2m1 word: no saturation", WORD, "if (kSaturate)", "if (false)", NUMERICS),
    Mutation("e8m0: ceil steps up at 1.5 itself", E8M0, "0x3FFFFFu", "0x400000u", NUMERICS),
    Mutation("e8m0: even steps up at 1.5", E8M0, "? 0x200000u", "? 0x400000u", NUMERICS),
    Mutation(
        "e8m0: infinity is a number",
        E8M0,
        "amax_bits >= kInfinityBits",
        "amax_bits > kInfinityBits",
        NUMERICS,
    ),
    Mutation(
        "mse: equal errors step", CHANGE, "(gain >> 6) < saving", "(gain >> 6) <= saving", NUMERICS
    ),
    Mutation(
        "mse: errors near 3/2 forgotten",
        CHANGE,
        "fminf(fabsf(s - 0.5f), fabsf(s - 1.5f))",
        "fabsf(s - 0.5f)",
        NUMERICS,
    ),
    # Layouts.
    Mutation(
        "scales: another order of terms",
        LAYOUT,
        "(row & 31) * 16 +\n         ((row >> 5) & 3) * 4",
        "(row & 31) * 4 +\n         ((row >> 5) & 3) * 128",
        CUTLASS,
    ),
    Mutation(
        "scales: strides of tiles",
        PLAN,
        "return {16, 128, 256, 4,",
        "return {16, 256, 128, 4,",
        CUTLASS,
    ),
    Mutation(
        "scales: strides in the kernel",
        PLAN,
        "return {16, 128, 256, 4,",
        "return {16, 256, 128, 4,",
        PROGRAM,
    ),
    Mutation(
        "fragment: k not permuted",
        FRAGMENT,
        "return 8 * ((k & 7) >> 1) + 4 * step + 2 * (k >> 3) + (k & 1);",
        "return 16 * step + k;",
        PROGRAM,
    ),
    Mutation(
        "fragment: n not permuted",
        FRAGMENT,
        "return 8 * (n >> 1) + 2 * tile + (n & 1);",
        "return 8 * tile + n;",
        PROGRAM,
    ),
    Mutation(
        "fragment: matrix halves swapped",
        FRAGMENT,
        "const int j = 4 * step + 2 * half;",
        "const int j = 4 * step + 2 * (1 - half);",
        PROGRAM,
    ),
    Mutation(
        "fragment: matrix columns of the neighbour",
        FRAGMENT,
        "(lane_row(lane) & 1) * 16",
        "(1 - (lane_row(lane) & 1)) * 16",
        PROGRAM,
    ),
    Mutation(
        "fragment: A rows swapped",
        KERNEL,
        "{{x[0].word[2 * step], x[1].word[2 * step],",
        "{{x[1].word[2 * step], x[0].word[2 * step],",
        PROGRAM,
    ),
    # The program's loops.
    Mutation("padding rows are not written", KERNEL, "scale[0] = 0;", "", PROGRAM),
    Mutation(
        "padding rows of the ragged tile",
        KERNEL,
        "lanes_row < params.plan.scale_rows",
        "live",
        PROGRAM,
    ),
    Mutation(
        "padding blocks are not written",
        PLAN,
        "swizzled ? columns * kScaleTileBlocks : blocks",
        "blocks",
        PROGRAM,
    ),
    Mutation(
        "ragged rows have a scale", KERNEL, "live ? exponent[lane] : 0", "exponent[lane]", PROGRAM
    ),
    Mutation(
        "ragged rows are stored", KERNEL, "kWhole || lanes_row < params.problem.M", "true", PROGRAM
    ),
    Mutation(
        "ragged rows are loaded",
        KERNEL,
        "lanes_row + 8 < live_rows",
        "true",
        PROGRAM,
    ),
    Mutation(
        "the tile ahead is not fetched",
        KERNEL,
        "row + kTileRows < whole_end;",
        "row + 2 * kTileRows < whole_end;",
        PROGRAM,
    ),
    Mutation(
        "strips overlap",
        PLAN,
        "task.first_row + plan.rows_per_cta",
        "task.first_row + 2 * plan.rows_per_cta",
        PROGRAM,
    ),
    Mutation(
        "every block has the first matrix",
        KERNEL,
        "problem.rotation_matrices > 1 ? block : 0",
        "0",
        PROGRAM,
    ),
    Mutation(
        "float16: second term lost",
        KERNEL,
        "values[i] -= high[i]",
        "values[i] = 0 * high[i]",
        PROGRAM,
    ),
    Mutation(
        "mse: NaN blocks step",
        KERNEL,
        "exponent[lane] != kNanScale && next_exponent",
        "next_exponent",
        PROGRAM,
    ),
    Mutation(
        "rms norm: weights of the first block",
        KERNEL,
        "(problem.norm_weight) + int64_t{block} * kBlockSize +",
        "(problem.norm_weight) +",
        PROGRAM,
    ),
    Mutation("rms norm: epsilon lost", KERNEL, "mean + problem.epsilon", "mean", PROGRAM),
    Mutation(
        "rms norm: a piece is lost",
        KERNEL,
        "column += kRowParts * kPiece",
        "column += 2 * kRowParts * kPiece",
        PROGRAM,
    ),
    Mutation(
        "rms norm: the sum's order depends on the launch",
        KERNEL,
        "rows.parts[unit / kRowParts][part] =",
        "rows.parts[unit / kRowParts][(part + params.plan.teams) % kRowParts] =",
        PROGRAM,
    ),
    # What only the machine code shows.
    Mutation(
        "GDC define dropped", RESOURCES, '    "-DCUTLASS_ENABLE_GDC_FOR_SM100=1",\n', "", WAITS
    ),
    Mutation(
        "GDC define dropped from the build",
        "CMakeLists.txt",
        "PROPERTIES COMPILE_DEFINITIONS CUTLASS_ENABLE_GDC_FOR_SM90=1",
        "PROPERTIES COMPILE_DEFINITIONS NOTHING=1",
        f"compile {LAUNCH}",
    ),
    Mutation(
        "no wait for the kernel before",
        LAUNCH,
        "cutlass::arch::wait_on_dependent_grids();",
        "",
        WAITS,
    ),
    Mutation(
        "no early launch of the next kernel",
        LAUNCH,
        "cutlass::arch::launch_dependent_grids();",
        "",
        WAITS,
    ),
    Mutation(
        "x is read before the wait",
        KERNEL,
        "constants[lane].matrix = matrix_fragment(rows, lane);",
        "Words x{};\n"
        "      Warp::load(x, problem.x, true);\n"
        "      rows[0].word[0] ^= x.word[0];\n"
        "      constants[lane].matrix = matrix_fragment(rows, lane);",
        WAITS,
    ),
    Mutation(
        "software conversion on Blackwell",
        WARP,
        "#if defined(CUDA_PTX_FP4FP6_CVT_ENABLED)",
        "#if 0",
        HOT_LOOP,
    ),
    Mutation(
        "a loop around the tiles' loop",
        KERNEL,
        "if constexpr (!Traits::kNorm) break;",
        "",
        HOT_LOOP,
    ),
    Mutation(
        "64-bit loads",
        WARP,
        "cutlass::arch::global_load<Words, sizeof(Words)>(words, address, valid);",
        "using Half = cutlass::Array<uint32_t, 2>;\n"
        "    auto* halves = reinterpret_cast<Half*>(&words);\n"
        "    const auto* from = static_cast<const char*>(address);\n"
        "    cutlass::arch::global_load<Half, 8>(halves[0], from, valid);\n"
        "    cutlass::arch::global_load<Half, 8>(halves[1], from + 8, valid);",
        LOADS,
    ),
)
