"""Rotations and calibration compute where their inputs are, and give the CPU's bits."""

import pytest
import torch
from torch import Tensor

from duqpp.calibration.drift import making_up_for_drift
from duqpp.calibration.gptq import Gptq
from duqpp.calibration.hessian import ProductSum
from duqpp.calibration.statistics import InputStatistics, draw_sample
from duqpp.placement import host_generator
from duqpp.rotation.balance import balanced_transform, second_moments
from duqpp.rotation.construct import duquant_transform, outlier_aware
from tests import inputs
from tests.second_device import DEVICE, second_device

K = 96


def searched(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Both scopes of the outlier-aware rotation, and what DuQuant makes of it."""
    made = []
    for per_block in (False, True):
        options = {"per_block": per_block, "max_steps": 8}
        made.append(outlier_aware(x, host_generator(1), **options))
        transform = duquant_transform(x, host_generator(1), **options)
        made += [transform.rotation.matrix, transform.pre_rotation.matrix, transform.permutation]
    return made


def balanced(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [balanced_transform(second_moments(x), second_moments(weight), host_generator(2))]


def observed(x: Tensor, weight: Tensor) -> list[Tensor]:
    sample = draw_sample(len(x), 50, seed=3)
    statistics = InputStatistics("x", K, sample, second_moment=True, device=x.device)
    products = ProductSum(K, x.device)
    for part in x.split(40):
        statistics.update(part)
        products.update(part, part)
    return [statistics.samples(), statistics.amax, statistics.take_gram(), products.mean()]


def rounded(x: Tensor, weight: Tensor) -> list[Tensor]:
    """GPTQ in both orders, from weights that make up for a drift, as few rows do and as many do."""
    hessian = x.T @ x
    drift = 0.1 * hessian.tril()
    made = [
        making_up_for_drift(hessian, drift, share=0.5, rows=rows)(weight) for rows in (40, 2 * K)
    ]
    start = made[0]
    for order in ("diagonal", "channels"):
        result = Gptq.of(hessian, damping=0.01, order=order).round(start, "mse")
        made += [result.weight.codes, result.weight.scales, result.compensated]
    return made


@pytest.mark.parametrize("compute", [searched, balanced, observed, rounded])
def test_it_computes_where_its_inputs_are(compute):
    x, weight = inputs.outliers(120, K, seed=4), inputs.gaussian(40, K, seed=5)
    expected = compute(x, weight)
    with second_device() as device:
        made = compute(x.to(device), weight.to(device))
        assert {tensor.device for tensor in made} == {DEVICE}
        assert all(torch.equal(own.cpu(), other) for own, other in zip(made, expected, strict=True))


def test_the_second_device_refuses_to_meet_the_first():
    """So that the test above can fail."""
    with second_device() as device, pytest.raises(RuntimeError, match="cpu:1 and cpu met"):
        torch.ones(3, device=device) + torch.ones(3)
