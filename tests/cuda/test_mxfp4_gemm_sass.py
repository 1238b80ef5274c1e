"""What the compiler made of the CUDA kernels of mxfp4_gemm: instructions, waits, spills.

No GPU is needed: the code is read from the library.
"""

import functools
import re
from typing import Any

import pytest

from tests.cuda.library import compiled_kernels, cuda_extension
from tests.cuda.sass import Kernel

# The most registers a thread may take: what it took when written, and room where there is any.
REGISTERS = {
    "sm100_swapped_128x64": 84,
    "sm100_swapped_128x64_streamk": 160,
    "sm100_256x128": 90,
    "sm100_256x192": 90,
    "sm100_256x256": 255,
    "sm120_128x128": 168,
}
SM100 = [kernel for kernel in REGISTERS if kernel.startswith("sm100")]

every_kernel = pytest.mark.parametrize("name", REGISTERS)
every_sm100_kernel = pytest.mark.parametrize("name", SM100)


@functools.cache
def compiled(name: str) -> tuple[Kernel, Any]:
    """The one kernel in the library for a row of the kernel table, and a plan for it."""
    module = cuda_extension()
    plan = module.GemmPlan(name, sm_count=1)
    if not module.has_mxfp4_gemm_kernel(plan):
        pytest.skip(f"the build leaves out {name}")
    index = module.gemm_kernels().index(name)
    tag = re.compile(rf"CutlassGemm<duqpp::cuda::\w+<\(duqpp::cuda::GemmKernel\){index}\W")
    found = [kernel for full_name, kernel in compiled_kernels().items() if tag.search(full_name)]
    assert len(found) == 1, f"{name}: {len(found)} kernels in the library"
    return found[0], plan


@every_kernel
def test_built_once_for_the_family_of_architectures(name):
    kernel, plan = compiled(name)
    assert kernel.arch == f"sm_{plan.arch}f"


@every_kernel
def test_no_register_is_spilled(name):
    kernel, _ = compiled(name)
    assert kernel.count("STL") == kernel.count("LDL") == 0
    assert kernel.stack_bytes == kernel.local_bytes == 0
    assert kernel.registers <= REGISTERS[name]


@every_sm100_kernel
def test_sm100_multiplies_on_the_fp4_tensor_core(name):
    kernel, plan = compiled(name)
    pair = plan.sms == 2
    assert kernel.count("UTCOMMA") >= 4  # block-scaled FP4, four steps of 64 along K
    assert kernel.count("UTCOMMA", "2CTA") == (kernel.count("UTCOMMA") if pair else 0)
    assert kernel.count("UTCCP") >= 4  # scales to tensor memory
    assert kernel.count("LDTM") >= 1  # accumulators from it
    others = [op for op in kernel.opcodes() if re.match(r"UTC[A-Z]*MMA|HMMA|QMMA|OMMA|IMMA", op)]
    assert {op.split(".")[0] for op in others} == {"UTCOMMA"}


def test_sm120_multiplies_on_the_fp4_tensor_core():
    kernel, _ = compiled("sm120_128x128")
    assert kernel.count("OMMA", "SF", "16864", "E2M1", "E8") >= 64
    others = [op for op in kernel.opcodes() if re.match(r"UTC[A-Z]*MMA|HMMA|QMMA|IMMA", op)]
    assert not others


@every_kernel
def test_operands_and_output_move_by_tma(name):
    kernel, _ = compiled(name)
    assert kernel.count("UTMALDG") >= 4  # codes and scales of both operands
    assert kernel.count("UTMASTG") >= 1


@every_kernel
def test_each_reader_waits_for_the_kernel_before(name):
    # Under programmatic dependent launch a kernel without the wait reads half-written input.
    kernel, _ = compiled(name)
    # Two are CUTLASS's, one in the warp that loads the operands; one is ours, before the bias.
    assert kernel.count("ACQBULK") == 3


@every_sm100_kernel
def test_sm100_lets_the_kernel_after_it_start_early(name):
    kernel, _ = compiled(name)
    assert kernel.count("PREEXIT") >= 1


@every_kernel
def test_out_is_rounded_to_bfloat16_or_float16_at_run_time(name):
    kernel, _ = compiled(name)
    assert kernel.count("F2FP", "BF16", "F32") == kernel.count("F2FP", "F16", "F32") > 0
