"""The kernel of GPTQ's inner loop compiles within its budgets; no GPU is needed."""

import re

import pytest

from tests import toolchain
from tests.cuda import sass
from tests.cuda.test_resources import ARCHITECTURES, FLAGS

FED = 496  # errors that are fed into later columns: 32 * 31 / 2
# By whether errors are fed: registers of a thread, and instructions. What nvcc 13.0 makes, rounded
# up; a thread issues each instruction once.
BUDGETS = {True: (96, 2600), False: (80, 1300)}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request) -> dict[bool, sass.Kernel]:
    """Both kernels of gptq_block.cu for an architecture."""
    nvcc = toolchain.nvcc()
    toolchain.cuobjdump()  # or skip before the compiler runs
    target = f"arch=compute_{request.param},code=sm_{request.param}"
    source = toolchain.CSRC / "cuda/gptq_block.cu"
    options = ["-I", toolchain.CSRC, "-Xptxas=-v", "-gencode", target, "-cubin"]
    cubin, log = toolchain.compiled([nvcc, *FLAGS, *options, source], timeout=200)
    assert set(sass.spilled_bytes(log).values()) == {0}
    found = sass.read_kernels(cubin)
    return {re.search(r"gptq_block_kernelILb(\d)E", k.name)[1] == "1": k for k in found}


def test_registers_and_memory(kernels):
    assert set(kernels) == set(BUDGETS)
    for fed, kernel in kernels.items():
        registers, instructions = BUDGETS[fed]
        assert kernel.registers <= registers, f"{kernel.registers} registers"
        assert len(kernel.code) <= instructions, f"{len(kernel.code)} instructions"
        assert (kernel.stack_bytes, kernel.local_bytes) == (0, 0)
        assert kernel.count("LDL") == kernel.count("STL") == 0, "values are in local memory"
        assert kernel.shared_bytes <= (5120 if fed else 1024)  # the factor; sm_90 on: 1024 more


def test_no_multiply_add_is_fused_where_errors_are_fed(kernels):
    """The definition rounds each product: as many of them, and of differences, are here."""
    extra = {op: kernels[True].count(op) - kernels[False].count(op) for op in ("FMUL", "FFMA")}
    assert extra == {"FMUL": FED, "FFMA": 0}
    assert kernels[True].count("FADD") >= FED + kernels[False].count("FADD")


def test_rows_are_moved_by_16_bytes(kernels):
    """A row's 8 loads, its 16 stores of floats and one of codes; the scale is a byte."""
    for fed, kernel in kernels.items():
        stores = [op for op in kernel.opcodes() if op.startswith("STG")]
        assert sorted(stores) == ["STG.E.128"] * 17 + ["STG.E.U8"]
        loads = [op for op in kernel.opcodes() if op.startswith("LDG")]
        assert set(loads) == {"LDG.E.128"} and len(loads) >= (9 if fed else 8)
        assert not [op for op in kernel.opcodes() if ".FTZ" in op]
