"""Matrices that need no data."""

import pytest
import torch

from duqpp.rotation.basis import hadamard, random_orthogonal
from tests import inputs, oracle


@pytest.mark.parametrize("n", [1, 2, 4, 32, 128])
def test_hadamard_is_symmetric_orthogonal_and_even(n):
    H = hadamard(n)
    assert H.dtype == torch.float64
    assert (H @ H.T - torch.eye(n)).abs().max() < 1e-14
    assert (H == H.T).all()
    assert (H.abs() - n**-0.5).abs().max() < 1e-15
    assert (H[0] > 0).all()


@pytest.mark.parametrize("n", [0, -2, 3, 12, 31])
def test_hadamard_needs_a_power_of_two(n):
    with pytest.raises(ValueError, match=rf"^hadamard: n must be a power of two, got {n}$"):
        hadamard(n)


@pytest.mark.parametrize("n", [2, 31, 32])
@pytest.mark.parametrize("count", [None, 1, 5])
def test_random_orthogonal_is_orthogonal(n, count):
    Q = random_orthogonal(n, inputs.generator(0), count=count)
    assert Q.shape == ((n, n) if count is None else (count, n, n))
    assert Q.dtype == torch.float64
    assert (Q @ Q.transpose(-1, -2) - torch.eye(n)).abs().max() < 1e-14


def test_random_orthogonal_is_the_generators():
    first, again = (random_orthogonal(32, inputs.generator(3), count=2) for _ in range(2))
    oracle.assert_same(first, again, "same seed")
    assert (first[0] != first[1]).any()
    assert (first != random_orthogonal(32, inputs.generator(4), count=2)).any()
    state = torch.get_rng_state()
    random_orthogonal(32, inputs.generator(3))
    oracle.assert_same(torch.get_rng_state(), state, "torch's own random state")


def test_random_orthogonal_is_haar():
    """Under Haar measure every entry has mean 0 and variance 1/n; plain QR fixes column signs."""
    Q = random_orthogonal(8, inputs.generator(5), count=4000)
    # Standard errors: 1/sqrt(8 * 4000) = 0.006 of the mean, 0.003 of the mean square.
    assert Q.mean(0).abs().max() < 0.03
    assert (Q.square().mean(0) - 1 / 8).abs().max() < 0.015
    # The trace of a Haar matrix has mean 0 and variance 1.
    trace = Q.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(float(trace.mean())) < 0.08
    assert abs(float(trace.var()) - 1) < 0.12
