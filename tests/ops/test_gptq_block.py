"""GPTQ's inner loop: backends give the bytes of the definition, and that is the recurrence."""

import numpy as np
import pytest
import torch

from duqpp.format import MXFP4Tensor, ScaleRule, dequantize, quantize
from duqpp.ops.dispatch import BACKENDS
from duqpp.ops.gptq_block import GptqBlock, gptq_block
from tests import inputs, oracle
from tests.ops.backends import QUANTIZERS

RULES = list(ScaleRule)


def corner(seed: int) -> torch.Tensor:
    """Upper triangular with ones on the diagonal, float32 [32, 32]."""
    return torch.eye(32) + 0.3 * inputs.gaussian(32, 32, seed).triu(1)


def run(name: str, values: torch.Tensor, factor: torch.Tensor | None, rule: ScaleRule) -> GptqBlock:
    """What a backend makes of tensors of the CPU, wherever it runs."""
    backend = next(backend for backend in BACKENDS if backend.name == name)
    device = torch.device("cuda" if name.startswith("cuda") else "cpu")
    factor = None if factor is None else factor.to(device)
    made = backend.gptq_block(values.to(device), factor, rule)
    return GptqBlock(*(tensor.cpu() for tensor in made))


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


@pytest.mark.parametrize("backend", QUANTIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_codes_and_scales_are_those_of_what_was_rounded(rule, backend):
    values = inputs.gaussian(70, 32, 3)
    made = run(backend, values, corner(4), rule)
    oracle.assert_same(made.scales, quantize(values, rule=rule).scales[:, 0], "scales")
    nearest = oracle.round_block(made.compensated[:, None], made.scales[:, None])
    oracle.assert_same(made.rounded, nearest.reshape(70, 32), "rounded")
    own = dequantize(MXFP4Tensor(made.codes, made.scales[:, None]))
    oracle.assert_same(made.rounded, own, "codes")


@pytest.mark.parametrize("backend", QUANTIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_without_a_factor_it_is_round_to_nearest(rule, backend):
    for make in (inputs.outliers, inputs.grid_and_ties, inputs.zero_blocks):
        values = make(45, 32, 5)
        made = run(backend, values, None, rule)
        expected = quantize(values, rule=rule)
        oracle.assert_same(made.codes, expected.codes, "codes")
        oracle.assert_same(made.scales, expected.scales[:, 0], "scales")
        oracle.assert_same(made.compensated, values, "compensated")
        oracle.assert_same(made.rounded, dequantize(expected), "rounded")


@pytest.mark.parametrize("backend", QUANTIZERS)
@pytest.mark.parametrize("rows", [0, 1, 31, 33, 300])
def test_a_backend_gives_the_bytes_of_the_definition(rows, backend):
    """Of rows of any magnitude, views of larger matrices among them."""
    values, large = inputs.gaussian(rows, 96, 6), inputs.gaussian(96, 96, 7) * 0.3
    for exponent in (-135, -40, 0, 110):
        scaled = values * 2.0**exponent
        for rule in RULES:
            for factor in (corner(8), large[32:64, 64:]):
                made = run(backend, scaled[:, 32:64], factor, rule)
                expected = gptq_block(scaled[:, 32:64], factor, rule)
                assert_same(made, expected, f"{rows} rows, 2**{exponent}, {rule}")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_byte(threads):
    values, factor = inputs.outliers(1500, 32, 9), corner(10)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made = run("cpu", values, factor, ScaleRule.MSE)
    finally:
        torch.set_num_threads(before)
    assert_same(made, gptq_block(values, factor, ScaleRule.MSE), f"{threads} threads")
