"""making_up_for_drift against plain least squares in float64."""

import numpy as np
import pytest
import torch

import duqpp.calibration.drift as module
from duqpp.calibration.drift import making_up_for_drift
from tests import inputs

TOKENS, K = 400, 64


@pytest.fixture(params=[24, 96])
def problem(request):
    """W; the product's inputs q, and how much larger the float model's are; H and C of them."""
    weight, q = inputs.gaussian(request.param, K, 1), inputs.gaussian(TOKENS, K, 2)
    drift = 0.2 * q @ inputs.gaussian(K, K, 3) / K**0.5 + 0.1 * inputs.gaussian(TOKENS, K, 4)
    return weight, q, drift, 2 / TOKENS * q.T @ q, 2 / TOKENS * drift.T @ q


def made_up(weight, H, C, share):
    return making_up_for_drift(H, C, share=share, rows=len(weight))(weight)


def test_the_whole_is_the_least_squares_solution(problem, monkeypatch):
    weight, q, drift, H, C = problem
    monkeypatch.setattr(module, "_DAMPING", 0.0)
    made = made_up(weight, H, C, share=1.0)
    targets = (q.double() + drift.double()) @ weight.double().T
    expected = np.linalg.lstsq(q.double().numpy(), targets.numpy(), rcond=None)[0].T
    torch.testing.assert_close(made.double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)


def test_damping_is_a_fraction_of_the_mean_diagonal(problem):
    """Five percent of it, as rows added to the least-squares problem, with no drift to explain."""
    weight, _, _, H, C = problem
    H = H.double()
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(K).double()
    expected = weight.double() + weight.double() @ C.double() @ torch.linalg.inv(damped)
    made = made_up(weight, H.float(), C, share=1.0)
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_share_goes_a_share_of_the_way(problem):
    weight, _, _, H, C = problem
    whole = made_up(weight, H, C, share=1.0) - weight
    part = made_up(weight, H, C, share=0.3) - weight
    torch.testing.assert_close(part, 0.3 * whole, rtol=1e-4, atol=1e-6)
    assert torch.equal(made_up(weight, H, torch.zeros_like(C), share=1.0), weight)


def test_outputs_come_closer_to_those_of_the_float_inputs(problem):
    weight, q, drift, H, C = problem
    wanted = (q + drift) @ weight.T
    before = (q @ weight.T - wanted).norm()
    errors = [(q @ made_up(weight, H, C, share=s).T - wanted).norm() for s in (0.3, 0.6, 1.0)]
    assert before > errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.6 * before  # what is left is the part that q does not tell


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e6])
def test_a_hessian_that_cannot_be_solved_is_left_for_gptq_to_report(value, problem):
    weight, _, _, H, C = problem
    H[3, 3] = value
    assert made_up(weight, H, C, share=0.3) is weight


def test_rows_are_as_they_are_among_all(problem):
    """A part of a weight, or a rank's share, is solved for as the whole would be."""
    weight, _, _, H, C = problem
    make_up = making_up_for_drift(H, C, share=0.3, rows=len(weight))
    parts = torch.cat([make_up(part) for part in weight.split(7)])
    torch.testing.assert_close(parts, make_up(weight), rtol=1e-5, atol=1e-6)
