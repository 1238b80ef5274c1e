"""The fixture that keeps the reference out of tests of a GPU's kernels; no GPU is needed."""

import pytest
import torch

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.ops.backend import Quantization
from duqpp.ops.native import CUDA_BACKENDS
from tests import inputs
from tests.ops.backends import in_kernel_dtype

NAMES = [backend.name for backend in CUDA_BACKENDS]


def asked_of(name: str):
    """A backend and its three ops on float32, whose kernels are looked for on the CPU here."""
    backend = next(backend for backend in CUDA_BACKENDS if backend.name == name)
    x = Quantization(torch.ones(2, 64), None, ScaleRule.EVEN)
    weight = backend.prepare_weight(MXFP4Tensor(*inputs.mxfp4_operand(8, 64, seed=1)))
    return {
        "run_quantization": lambda: backend.run_quantization(x),
        "run_linear": lambda: backend.run_linear(x, weight, None),
        "mxfp4_gemm": lambda: backend.mxfp4_gemm(weight, weight, None, torch.float32),
    }


@pytest.mark.parametrize("backend", NAMES)
def test_float32_fails_where_kernels_are_tested(backend):
    for op, call in asked_of(backend).items():
        with pytest.raises(
            pytest.fail.Exception, match=f"in the place of the kernels of {backend}"
        ):
            call()
            raise AssertionError(f"{op} was computed")


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_the_references_elsewhere(name):
    assert asked_of(name)["run_quantization"]().codes.shape == (2, 32)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_is_skipped_where_kernels_are_tested(dtype, backend):
    assert dtype == torch.bfloat16, "the fixture has let it through"


@pytest.mark.parametrize("backend", [*NAMES, "cpu"])
def test_values_come_in_a_dtype_of_the_kernels(backend):
    expected = torch.float32 if backend == "cpu" else torch.bfloat16
    assert in_kernel_dtype(torch.ones(2), backend).dtype == expected
