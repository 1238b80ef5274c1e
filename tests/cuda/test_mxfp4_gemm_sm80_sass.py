"""What the compiler made of mxfp4_gemm for sm_80 to sm_90: no GPU is needed."""

import re

import pytest

from tests.cuda.library import compiled_sm80_kernels
from tests.cuda.sass import Kernel

# The most registers a thread may take (65536 of an SM for all threads of a CTA), and instructions
# of the loop over plain segments for each tile of 16 x 32 of W: what nvcc 13.0 makes, rounded up.
# A model, not a measurement: such a tile is 272 bytes, 18 clocks of an H100's SM at its 15 bytes a
# clock, 72 issue slots of its four schedulers; 96 at three quarters of that.
BUDGETS = {
    "sm80_16x8": (88, 51),
    "sm80_32x8": (128, 39),
    "sm80_64x8": (168, 33),
    "sm80_16x16": (112, 79),
    "sm80_32x16": (144, 57),
    "sm80_64x16": (200, 48),
    "sm80_32x32": (200, 95),
}
ARCHITECTURES = ("sm_80", "sm_90a")
STAGE_BLOCKS = 4  # blocks of K in a turn of the loop

every_kernel = pytest.mark.parametrize("name", BUDGETS)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def compiled(architecture: str, name: str) -> Kernel:
    kernels = compiled_sm80_kernels()
    if not any(arch == architecture for arch, _ in kernels):
        pytest.skip(f"the build leaves out {architecture}")
    return kernels[architecture, name]


def tiles(name: str) -> tuple[int, int]:
    """Tiles of 16 rows of W, and of 8 rows of x."""
    rows, columns = map(int, name.removeprefix("sm80_").split("x"))
    return rows // 16, columns // 8


def hot_loop(kernel: Kernel) -> tuple[int, int]:
    """The innermost loop that loads W 128 bits at a time and multiplies."""
    loops = [
        loop
        for loop in kernel.loops
        if {"IMMA", "LDG"} <= {op.split(".")[0] for op in kernel.opcodes(*loop)}
        and any(re.match(r"LDG\..*\b128\b", op) for op in kernel.opcodes(*loop))
    ]
    assert loops, "no loop multiplies what it loads"
    return min(loops, key=lambda loop: loop[1] - loop[0])


@every_architecture
def test_every_kernel_is_compiled(architecture):
    compiled(architecture, "sm80_16x8")
    names = {name for arch, name in compiled_sm80_kernels() if arch == architecture}
    assert names == set(BUDGETS)


@every_kernel
@every_architecture
def test_registers_and_memory(architecture, name):
    kernel = compiled(architecture, name)
    assert kernel.registers <= BUDGETS[name][0]
    assert kernel.stack_bytes == kernel.local_bytes == 0
    assert kernel.count("LDL") == kernel.count("STL") == 0


@every_kernel
@every_architecture
def test_hot_loop(architecture, name):
    kernel = compiled(architecture, name)
    rows, columns = tiles(name)
    loop = hot_loop(kernel)
    opcodes = kernel.opcodes(*loop)
    budget = BUDGETS[name][1] * rows * STAGE_BLOCKS
    assert len(opcodes) <= budget, f"{len(opcodes)} instructions, budget {budget}"

    # Exact block products of 8-bit integers, two terms each; two FFMA for each of four sums.
    integer = [op for op in opcodes if op.startswith("IMMA.16832.S8.S8")]
    assert len(integer) == 2 * rows * columns * STAGE_BLOCKS
    assert not [op for op in opcodes if re.match(r"HMMA|QMMA|I2F", op)]
    assert sum(op == "FFMA" for op in opcodes) == 8 * rows * columns * STAGE_BLOCKS
    # W: 128 bits of each tile and pair of blocks; x: a word of each tile and block.
    wide = [op for op in opcodes if re.match(r"LDG\..*\b128\b", op)]
    assert len(wide) == rows * STAGE_BLOCKS // 2
    assert sum(op.startswith("LDG") for op in opcodes) - len(wide) == columns * STAGE_BLOCKS
    assert not [op for op in opcodes if op.startswith(("ST", "BAR")) or ".FTZ" in op]


@every_kernel
def test_waits_before_it_reads_x(name):
    """Programmatic dependent launch: W may be read early, x may not, nothing is written."""
    kernel = compiled("sm_90a", name)
    opcodes = kernel.opcodes()
    assert opcodes.count("ACQBULK") == 1, "no griddepcontrol.wait"
    assert opcodes.count("PREEXIT") == 1, "no griddepcontrol.launch_dependents"
    before = opcodes[: opcodes.index("ACQBULK")]
    assert opcodes.index("PREEXIT") > len(before)
    rows, _ = tiles(name)
    wide = sum(re.match(r"LDG\..*\b128\b", op) is not None for op in before)
    assert wide == rows * STAGE_BLOCKS // 2  # the first stage of W
    # Scales of W: words, or single bytes of a segment that is not whole.
    narrow = [op for op in before if op.startswith("LDG") and "128" not in op]
    assert sum("U8" not in op for op in narrow) == 2 * rows
    assert not [op for op in before if op.startswith(("STG", "RED", "ATOM"))]
