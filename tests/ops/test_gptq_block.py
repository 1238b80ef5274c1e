"""GPTQ's inner loop: backends give the bytes of the definition, and that is the recurrence."""

import numpy as np
import pytest
import torch

from duqpp.format import MXFP4Tensor, ScaleRule, dequantize, quantize
from duqpp.ops.dispatch import BACKENDS as ALL
from duqpp.ops.gptq_block import GptqBlock, gptq_block
from tests import inputs, oracle
from tests.ops.backends import BACKENDS

RULES = list(ScaleRule)
by_name = {backend.name: backend for backend in ALL}


def corner(seed: int) -> torch.Tensor:
    """Upper triangular with ones on the diagonal, float32 [32, 32]."""
    return torch.eye(32) + 0.3 * inputs.gaussian(32, 32, seed).triu(1)


def assert_same(made: GptqBlock, expected: GptqBlock, message: str) -> None:
    for name in GptqBlock._fields:
        oracle.assert_same(getattr(made, name), getattr(expected, name), f"{name}, {message}")


@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_recurrence_in_float64(rule):
    values, factor = inputs.gaussian(200, 32, 1), corner(2)
    made = gptq_block(values, factor, rule)
    rounded = made.rounded.double().numpy()
    compensated, G = values.double().numpy().copy(), factor.double().numpy()
    for j in range(32):
        error = compensated[:, j] - rounded[:, j]
        compensated[:, j + 1 :] -= np.outer(error, G[j, j + 1 :])
    np.testing.assert_allclose(made.compensated.double().numpy(), compensated, rtol=0, atol=2e-5)
    assert np.abs(compensated - values.numpy()).max() > 0.5, "errors must reach other columns"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_codes_and_scales_are_those_of_what_was_rounded(rule, backend):
    values = inputs.gaussian(70, 32, 3)
    made = by_name[backend].gptq_block(values, corner(4), rule)
    oracle.assert_same(made.scales, quantize(values, rule=rule).scales[:, 0], "scales")
    nearest = oracle.round_block(made.compensated[:, None], made.scales[:, None])
    oracle.assert_same(made.rounded, nearest.reshape(70, 32), "rounded")
    own = dequantize(MXFP4Tensor(made.codes, made.scales[:, None]))
    oracle.assert_same(made.rounded, own, "codes")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_without_a_factor_it_is_round_to_nearest(rule, backend):
    for make in (inputs.outliers, inputs.grid_and_ties, inputs.zero_blocks):
        values = make(45, 32, 5)
        made = by_name[backend].gptq_block(values, None, rule)
        expected = quantize(values, rule=rule)
        oracle.assert_same(made.codes, expected.codes, "codes")
        oracle.assert_same(made.scales, expected.scales[:, 0], "scales")
        oracle.assert_same(made.compensated, values, "compensated")
        oracle.assert_same(made.rounded, dequantize(expected), "rounded")
