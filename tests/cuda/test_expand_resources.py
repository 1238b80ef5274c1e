"""The kernels of expansion compile within their budgets; no GPU is needed.

They are to wait for memory only. A model, not a measurement: while an H100 (14.5 bytes a clock and
SM) moves what a warp loads and stores for 16 bytes of float8 a lane, its four schedulers issue some
210 instructions; an A100 (10.2 bytes) some 250 for 16 bytes of bfloat16.
"""

import re
from dataclasses import dataclass

import pytest

from tests import toolchain
from tests.cuda import sass
from tests.cuda.test_resources import FLAGS

ARCHITECTURES = ("80", "90a")
UNROLL = 4  # kExpandUnroll


@dataclass(frozen=True)
class Budget:
    """Of a kernel: what nvcc 13.0 makes, rounded up.

    instructions: in the loop, for each 16 bytes that a lane stores in it; the code for scales far
        below the row's largest and for ragged tiles is among them, and jumped over.
    stores: of 16 bytes, from each load of codes. load: of codes.
    """

    instructions: int
    stores: int
    load: str
    registers: int


BUDGETS = {
    ("activation", "E4M3"): Budget(105, 1, "LDG.E.64", 40),
    ("activation", "BFloat16"): Budget(80, 1, "LDG.E", 32),
    ("weight", "E4M3"): Budget(150, 2, "LDG.E.128", 64),  # eight CTAs an SM
    ("weight", "BFloat16"): Budget(90, 4, "LDG.E.128", 72),
}


@dataclass(frozen=True)
class Variant:
    operand: str
    format: str
    kernel: sass.Kernel
    spill_bytes: int

    @property
    def key(self) -> tuple[str, str]:
        return self.operand, self.format

    @property
    def budget(self) -> Budget:
        return BUDGETS[self.key]

    @property
    def loop(self) -> tuple[int, int]:
        """The one over all stores; what is jumped over may jump back into it from behind it."""
        loops = [
            loop
            for loop in self.kernel.loops
            if any(op == "STG.E.128" for op in self.kernel.opcodes(*loop))
        ]
        assert loops, f"{self.key}: no loop stores 128 bits"
        return max(loops, key=lambda loop: loop[1] - loop[0])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def variants(request) -> list[Variant]:
    """Every kernel of expand.cu for an architecture."""
    nvcc = toolchain.nvcc()
    toolchain.cuobjdump()  # or skip before the compiler runs
    target = f"arch=compute_{request.param},code=sm_{request.param}"
    source = toolchain.CSRC / "cuda/expand.cu"
    options = ["-I", toolchain.CSRC, "-Xptxas=-v", "-gencode", target, "-cubin"]
    cubin, log = toolchain.compiled([nvcc, *FLAGS, *options, source], timeout=200)
    spilled = sass.spilled_bytes(log)
    found = []
    for kernel in sass.read_kernels(cubin):
        pattern = r"expand_(activation|weight)_kernelINS_\d+(\w+?)BlockE"
        operand, name = re.search(pattern, kernel.name).groups()
        found.append(Variant(operand, name, kernel, spilled[kernel.name]))
    return found


def test_every_variant_is_compiled(variants):
    assert sorted(v.key for v in variants) == sorted(BUDGETS)


def test_registers_and_memory(variants):
    for v in variants:
        kernel = v.kernel
        assert kernel.registers <= v.budget.registers, f"{v.key}: {kernel.registers} registers"
        assert (kernel.stack_bytes, kernel.local_bytes, v.spill_bytes) == (0, 0, 0), f"{v.key}"
        assert kernel.count("LDL") == kernel.count("STL") == 0, f"{v.key} uses local memory"


def test_loop(variants):
    """Four loads of codes are under way before the first is used; every store is of 128 bits."""
    for v in variants:
        opcodes = v.kernel.opcodes(*v.loop)
        count = UNROLL * v.budget.stores
        assert len(opcodes) <= v.budget.instructions * count, f"{v.key}: {len(opcodes)}"
        stores = [i for i, op in enumerate(opcodes) if op.startswith("ST")]
        assert [opcodes[i] for i in stores] == ["STG.E.128"] * count, f"{v.key}"
        loads = [i for i, op in enumerate(opcodes) if op == v.budget.load]
        assert len(loads) == UNROLL and max(loads) < min(stores), f"{v.key}"
        assert not [op for op in opcodes if ".FTZ" in op], f"{v.key}"
