"""Tensors of one op are on one device, or it says in one line which are not."""

from functools import partial

import pytest
import torch

from duqpp import ops
from duqpp.format import MXFP4Tensor, ScaleRule
from tests.ops.backends import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_must_be_on_one_device(backend):
    x, rotation, there = torch.zeros(2, 64), torch.eye(32).bfloat16(), torch.device("meta")
    weight = MXFP4Tensor(torch.zeros(8, 32).byte(), torch.zeros(8, 2).byte())
    scales = MXFP4Tensor(weight.codes, weight.scales.to(there))
    options = {"rule": ScaleRule.EVEN, "backend": backend}
    norm, gate = partial(ops.rmsnorm_rotate_quantize, epsilon=1e-6), ops.silu_mul_rotate_quantize
    calls = {
        "rotate_quantize: x and rotation": lambda: ops.rotate_quantize(
            x, rotation.to(there), **options
        ),
        "rmsnorm_rotate_quantize: x and norm_weight": lambda: norm(
            x, torch.ones(64, device=there), rotation, **options
        ),
        "silu_mul_rotate_quantize: gate and up": lambda: gate(x, x.to(there), None, **options),
        "mxfp4_linear: x and weight.scales": lambda: ops.mxfp4_linear(x, None, scales, **options),
        "mxfp4_linear: x and bias": lambda: ops.mxfp4_linear(
            x, None, weight, torch.ones(8, device=there), **options
        ),
        "prepare_weight: weight.codes and weight.scales": lambda: ops.prepare_weight(
            scales, backend=backend
        ),
        "restore_weight: weight.codes and weight.scales": lambda: ops.restore_weight(
            scales, backend=backend
        ),
    }
    for names, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == f"{names} must be on one device, got cpu and meta"


def test_the_first_device_of_the_cpu_is_the_cpu():
    x, rotation = torch.ones(2, 32, device="cpu:0"), torch.eye(32).bfloat16()
    quantized = ops.rotate_quantize(x, rotation, rule=ScaleRule.EVEN, backend="reference")
    assert quantized.shape == (2, 32)
