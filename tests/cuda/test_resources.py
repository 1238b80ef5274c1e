"""rotate_quantize compiles for every architecture within its budgets; no GPU is needed.

What a GPU would show as slowness or as a rare race, its machine code shows: registers, spills, the
instructions of the loop over whole tiles, the width of loads, the wait for the kernel before.
"""

import itertools
import re
from dataclasses import dataclass

import pytest

from tests import toolchain
from tests.cuda import sass

# Those of the build in CMakeLists.txt.
FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-DCUTLASS_ENABLE_GDC_FOR_SM90=1",
    "-DCUTLASS_ENABLE_GDC_FOR_SM100=1",
    "-Xcompiler=-Wall,-Wextra",
    "-Werror=all-warnings",
]
ARCHITECTURES = ("80", "90a", "100f", "120f")
DTYPES = ("bfloat16", "float16")
PROLOGUES = ("none", "rms_norm", "silu_mul")
RULES = ("floor", "even", "ceil", "mse")

# Instructions of the loop over whole 16 x 32 tiles: a warp's issue slots, which memory must
# outlast. A model, not a measurement: at 26 bytes a clock and SM (B200) the 1296 bytes of a tile
# last 50 clocks, 200 slots of the four schedulers; at 14.5 (H100) 89 clocks, 357 slots. SiLU's
# 2320 bytes last 356 slots and 640. The budgets are what nvcc 13.0 makes, rounded up a little; mse
# adds its two sums, float16 its second term.
LOOP = {
    #         none  rms_norm  silu_mul   mse  float16
    "100f": ((125, 190, 325), 165, 75),
    "120f": ((130, 195, 325), 165, 75),
    "90a": ((285, 335, 475), 190, 80),
    "80": ((285, 335, 475), 190, 80),
}
REGISTERS = {"none": 72, "rms_norm": 120, "silu_mul": 80}


@dataclass(frozen=True)
class Variant:
    dtype: str
    prologue: str
    rule: str
    rotate: bool
    kernel: sass.Kernel
    spill_bytes: int

    @property
    def hot_loop(self) -> tuple[int, int]:
        """The loop over whole tiles: the innermost that stores two rows of codes."""
        loops = [
            loop
            for loop in self.kernel.loops
            if sum(re.fullmatch(r"STG\.E", op) is not None for op in self.kernel.opcodes(*loop))
            == 2
        ]
        assert loops, f"{self}: no loop stores the codes of a tile"
        return min(loops, key=lambda loop: loop[1] - loop[0])

    def __str__(self) -> str:
        rotation = "rotated" if self.rotate else "identity"
        return f"{self.dtype} {self.prologue} {self.rule} {rotation}"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request) -> tuple[str, list[Variant]]:
    """(architecture, every kernel of rotate_quantize.cu for it)."""
    architecture = request.param
    nvcc, cutlass = toolchain.nvcc(), toolchain.cutlass_include()
    toolchain.cuobjdump()  # or skip before the compiler runs
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    source = toolchain.CSRC / "cuda/rotate_quantize.cu"
    include = ["-isystem", cutlass, "-I", toolchain.CSRC]
    options = ["-Xptxas=-v", "-gencode", target, "-cubin"]
    cubin, log = toolchain.compiled([nvcc, *FLAGS, *include, *options, source], timeout=250)
    variants = []
    spilled = sass.spilled_bytes(log)
    for kernel in sass.read_kernels(cubin):
        # The arguments of RotateQuantizeTraits, mangled: enumerators as digits, then a bool.
        found = re.search(r"DtypeE(\d)ELNS_8PrologueE(\d)ELNS_9ScaleRuleE(\d)ELb(\d)E", kernel.name)
        dtype, prologue, rule, rotate = map(int, found.groups())
        names = DTYPES[dtype], PROLOGUES[prologue], RULES[rule]
        variants.append(Variant(*names, rotate == 1, kernel, spilled[kernel.name]))
    return architecture, variants


def test_every_variant_is_compiled(compiled):
    _, variants = compiled
    made = {(v.dtype, v.prologue, v.rule, v.rotate) for v in variants}
    assert made == set(itertools.product(DTYPES, PROLOGUES, RULES, (False, True)))
    assert len(variants) == len(made)


def test_registers_and_memory(compiled):
    _, variants = compiled
    for v in variants:
        kernel = v.kernel
        assert kernel.registers <= REGISTERS[v.prologue], f"{v}: {kernel.registers} registers"
        assert (kernel.stack_bytes, v.spill_bytes) == (0, 0), f"{v} spills"
        assert kernel.count("LDL") == kernel.count("STL") == 0, f"{v} uses local memory"
        assert kernel.local_bytes == 0, f"{v} uses local memory"
        assert (kernel.shared_bytes > 0) == (v.prologue == "rms_norm"), f"{v}"


def test_hot_loop(compiled):
    architecture, variants = compiled
    budgets, mse, float16 = LOOP[architecture]
    for v in variants:
        budget = budgets[PROLOGUES.index(v.prologue)]
        budget += mse * (v.rule == "mse") + float16 * (v.dtype == "float16" and v.rotate)
        opcodes = v.kernel.opcodes(*v.hot_loop)
        assert len(opcodes) <= budget, f"{v}: {len(opcodes)} instructions, budget {budget}"

        terms = (2 if v.dtype == "float16" else 1) if v.rotate else 0
        assert sum(op == "HMMA.16816.F32.BF16" for op in opcodes) == 8 * terms, f"{v}"
        in_hardware = sum(op.startswith("F2FP") and "E2M1" in op for op in opcodes)
        assert in_hardware == (8 if architecture in ("100f", "120f") else 0), f"{v}"
        tensors = 2 if v.prologue == "silu_mul" else 1
        assert sum(op.startswith("LDG") for op in opcodes) == 2 * tensors, f"{v}"


def test_loads_are_of_128_bits(compiled):
    _, variants = compiled
    for v in variants:
        loads = [
            op for op in v.kernel.opcodes() if op.startswith("LD") and not op.startswith("LDC")
        ]
        loads = [op for op in loads if not op.startswith("LDS")]
        assert loads and all(re.match(r"LDG\..*\b128\b", op) for op in loads), f"{v}: {set(loads)}"


def test_subnormals_are_kept(compiled):
    """Blocks of scale exponent 0 hold float32 subnormals; only SiLU's approximations may flush."""
    _, variants = compiled
    for v in variants:
        if v.prologue != "silu_mul":
            assert not [op for op in v.kernel.opcodes(*v.hot_loop) if ".FTZ" in op], f"{v}"


def test_waits_before_it_reads_x(compiled):
    """Programmatic dependent launch: constants may be read early, x may not, nothing is written."""
    architecture, variants = compiled
    if architecture == "80":
        pytest.skip("sm_80 has no programmatic dependent launch")
    for v in variants:
        opcodes = v.kernel.opcodes()
        assert opcodes.count("ACQBULK") == 1, f"{v}: no griddepcontrol.wait"
        assert opcodes.count("PREEXIT") == 1, f"{v}: no griddepcontrol.launch_dependents"
        before = opcodes[: opcodes.index("ACQBULK")]
        assert opcodes.index("PREEXIT") > len(before), f"{v}"
        early = sum(op.startswith("LDG") for op in before)
        constants = 8 * v.rotate + (v.prologue == "rms_norm")
        assert early == constants, f"{v}: {early} loads before the wait, {constants} of constants"
        assert not [op for op in before if op.startswith("ST")], f"{v}"
