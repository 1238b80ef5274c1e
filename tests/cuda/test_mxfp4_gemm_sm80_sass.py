"""What the compiler made of mxfp4_gemm for sm_80 to sm_90: no GPU is needed."""

import re

import pytest

from tests.cuda.library import compiled_sm80_kernels
from tests.cuda.sass import Kernel

# The most registers a thread may take (65536 of an SM for all threads of a CTA), and instructions
# of the loop over plain segments for each tile of 16 x 32 of W: what nvcc 13.0 makes, rounded up.
# A model, not a measurement: such a tile is 272 bytes, 18 clocks of an H100's SM at its 15 bytes a
# clock, 72 issue slots of its four schedulers; 96 at three quarters of that. With 128 registers an
# SM has room for two CTAs of eight warps (K = 4096).
BUDGETS = {
    "sm80_16x8": (72, 58),
    "sm80_32x8": (104, 43),
    "sm80_64x8": (128, 36),
    "sm80_16x16": (104, 89),
    "sm80_32x16": (128, 62),
    "sm80_64x16": (184, 52),
    "sm80_32x32": (192, 103),
}
ARCHITECTURES = ("sm_80", "sm_90a")
PAIR_BLOCKS = 2  # blocks of K in a turn of the loop

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


def stages(name: str) -> int:
    """Pairs of blocks that a warp has on the way: gemm_sm80_stages in mxfp4_gemm_sm80_plan.h."""
    return 8 // tiles(name)[0]


def is_wide_copy(opcode: str) -> bool:
    """Whether 128 bits go from memory to shared memory, and to no register or L1."""
    return opcode.startswith("LDGSTS") and opcode.endswith("BYPASS.128")


def hot_loop(kernel: Kernel) -> tuple[int, int]:
    """The innermost loop that copies W 128 bits at a time and multiplies."""
    loops = [
        loop
        for loop in kernel.loops
        if any(op.startswith("IMMA") for op in kernel.opcodes(*loop))
        and any(is_wide_copy(op) for op in kernel.opcodes(*loop))
    ]
    assert loops, "no loop multiplies what it copies"
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
    budget = BUDGETS[name][1] * rows * PAIR_BLOCKS
    assert len(opcodes) <= budget, f"{len(opcodes)} instructions, budget {budget}"

    # Exact block products of 8-bit integers, two terms each; two FFMA for each of four sums.
    integer = [op for op in opcodes if op.startswith("IMMA.16832.S8.S8")]
    assert len(integer) == 2 * rows * columns * PAIR_BLOCKS
    assert not [op for op in opcodes if re.match(r"HMMA|QMMA|I2F", op)]
    assert sum(op == "FFMA" for op in opcodes) == 8 * rows * columns * PAIR_BLOCKS
    # W: 128 bits of each tile; x: a word of each tile and block. Nothing is loaded to a register,
    # which would be waited for with all that shares its scoreboard.
    copies = [op for op in opcodes if op.startswith("LDGSTS")]
    assert sum(map(is_wide_copy, copies)) == rows
    assert len(copies) == rows + columns * PAIR_BLOCKS
    assert not [op for op in opcodes if op.startswith(("LDG.", "ST", "BAR")) or ".FTZ" in op]


@every_kernel
@every_architecture
def test_the_hot_loop_waits_for_the_oldest_pair_alone(architecture, name):
    kernel = compiled(architecture, name)
    first, last = hot_loop(kernel)
    assert kernel.opcodes(first, last).count("LDGDEPBAR") == 1  # a group for each pair
    waits = [text for text in kernel.code[first : last + 1] if "DEPBAR.LE" in text]
    assert len(waits) == 1 and waits[0].endswith(f"SB0, {stages(name) - 1:#x}"), waits
    # So is every other wait for copies, but for the one where a segment was not a plain one.
    every = [text.split()[-1] for text in kernel.code if "DEPBAR.LE" in text]
    assert sorted(every) == ["0x0", f"{stages(name) - 1:#x}"]


@every_kernel
def test_waits_before_it_reads_x(name):
    """Programmatic dependent launch: W may be read early, x may not, nothing is written.

    Where W may not be read early either, a wait that is jumped over elsewhere comes before all.
    """
    kernel = compiled("sm_90a", name)
    opcodes = kernel.opcodes()
    assert opcodes.count("ACQBULK") == 2, "griddepcontrol.wait: for W, and for x"
    assert opcodes.count("PREEXIT") == 1, "no griddepcontrol.launch_dependents"
    for_w = opcodes.index("ACQBULK")
    for_x = opcodes.index("ACQBULK", for_w + 1)
    assert opcodes.index("PREEXIT") > for_x
    memory = ("LDG", "STG", "RED", "ATOM")
    assert not [op for op in opcodes[:for_w] if op.startswith(memory)]
    assert re.match(r"@!?U?P\d+ BRA", kernel.code[for_w - 1]), kernel.code[for_w - 1]
    before = [op for op in opcodes[for_w:for_x] if op.startswith(memory)]
    rows, _ = tiles(name)
    assert sum(map(is_wide_copy, before)) == rows * stages(name)  # the first pairs of W
    # Scales of W: words, or single bytes of a segment that is not whole.
    narrow = [op for op in before if not is_wide_copy(op)]
    assert all(op.startswith("LDG.") for op in narrow), narrow
    assert sum("U8" not in op for op in narrow) == 2 * rows
