"""Balanced transforms by their properties: what they equalize, and that nothing does better."""

import pytest
import torch

from duqpp.format import ScaleRule, dequantize, quantize
from duqpp.rotation.balance import RIDGE, balanced_transform, second_moments
from duqpp.rotation.basis import hadamard, random_orthogonal
from duqpp.rotation.block_rotation import MAX_CONDITION, BlockRotation
from tests import inputs

BLOCKS = 4


def correlated(rows: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    """Rows of 4 blocks with channels of different sizes, mixed within their block: float64."""
    generator = inputs.generator(seed)
    size = torch.exp(spread * torch.rand(BLOCKS, 32, generator=generator, dtype=torch.float64))
    mix = torch.randn(BLOCKS, 32, 32, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, BLOCKS, 32, generator=generator, dtype=torch.float64) * size
    return torch.einsum("nbi,bij->nbj", x, mix).flatten(1)


def moments(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return second_moments(correlated(500, seed)), second_moments(correlated(300, seed + 100))


def cost(matrix: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """tr(R.T Sx R) tr(R^-1 Sw R^-T) of each block: [B]."""
    inverse = torch.linalg.inv(matrix)
    traces = [
        (m @ s @ m.mT).diagonal(dim1=-2, dim2=-1).sum(-1) for m, s in ((matrix.mT, x), (inverse, w))
    ]
    return traces[0] * traces[1]


def test_second_moments_are_those_of_each_block():
    x = correlated(50, 1)
    for block, moment in enumerate(second_moments(x.float())):
        part = x[:, 32 * block : 32 * block + 32]
        torch.testing.assert_close(moment, part.T @ part, rtol=1e-5, atol=1e-3 * moment.abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_both_sides_get_the_same_moment_with_an_even_diagonal(seed):
    x, w = moments(seed)
    matrix = balanced_transform(x, w, inputs.generator(seed))
    inverse = torch.linalg.inv(matrix)
    left, right = matrix.mT @ x @ matrix, inverse @ w @ inverse.mT
    for moment in (left, right):
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        # The ridge is not part of the moments: the diagonals differ by its share.
        assert (diagonal.amax(-1) / diagonal.amin(-1)).max() < 1.2
    left, right = (m / m.flatten(1).norm(dim=1)[:, None, None] for m in (left, right))
    assert (left - right).flatten(1).norm(dim=1).max() < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_cost_is_the_square_of_the_nuclear_norm_and_no_neighbour_has_less(seed):
    x, w = moments(seed)
    matrix = balanced_transform(x, w, inputs.generator(seed))
    factors = torch.linalg.cholesky(x), torch.linalg.cholesky(w)
    least = torch.linalg.svdvals(factors[0].mT @ factors[1]).sum(-1) ** 2
    made = cost(matrix, x, w)
    assert (made >= least * (1 - 1e-9)).all()
    assert (made <= least * 1.02).all()  # the ridge
    generator = inputs.generator(seed + 50)
    for size in (0.3, 1.0):
        noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        assert (cost(matrix + size * noise / 32**0.5, x, w) > made).all()


def test_of_diagonal_moments_the_transform_is_smoothing_and_a_hadamard():
    generator = inputs.generator(7)
    sizes = torch.exp(2 * torch.rand(2, BLOCKS, 32, generator=generator, dtype=torch.float64))
    x, w = torch.diag_embed(sizes[0] ** 2), torch.diag_embed(sizes[1] ** 2)
    rows = balanced_transform(x, w, generator).square().sum(-1)  # of R R.T, Hadamard or not
    expected = sizes[1] / sizes[0]
    expected = 32 * expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(rows, expected, rtol=0.02, atol=0)  # the ridge


def test_the_error_of_rounding_is_less_than_behind_a_hadamard():
    """What the balance is for: outputs of one block from rounded inputs and rounded weights."""
    x, weight = correlated(400, 3), correlated(200, 103)
    made = balanced_transform(second_moments(x), second_moments(weight), inputs.generator(3))
    errors = []
    for matrix in (made, hadamard(32).expand(BLOCKS, -1, -1)):
        rotation = BlockRotation.rounded(matrix)
        a, w = rotation.apply(x).float(), rotation.fold(weight).float()
        rounded = [dequantize(quantize(v, rule=ScaleRule.EVEN)).double() for v in (a, w)]
        exact = x @ weight.T
        errors.append(float((rounded[0] @ rounded[1].T - exact).norm() / exact.norm()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("which", ["activations", "weights", "both"])
def test_unused_channels_and_blocks_keep_the_matrix_invertible(which):
    x, w = moments(5)
    for moment in (x, w)[which == "weights" : 1 + (which != "activations")]:
        moment[0] = 0
        moment[1, 3:] = moment[1, :, 3:] = 0
        moment[2] *= 1e-30
    matrix = balanced_transform(x, w, inputs.generator(0))
    assert torch.isfinite(matrix).all()
    values = torch.linalg.svdvals(BlockRotation.rounded(matrix).matrix.double())
    assert (values[:, 0] / values[:, -1]).max() < 32 / RIDGE < MAX_CONDITION


def test_the_norm_is_that_of_an_orthogonal_matrix_whatever_the_scale():
    x, w = moments(6)
    plain = balanced_transform(x, w, inputs.generator(1))
    scaled = balanced_transform(x * 1e12, w * 1e-9, inputs.generator(1))
    assert torch.allclose(plain.square().sum((1, 2)), torch.full((BLOCKS,), 32.0).double())
    torch.testing.assert_close(plain, scaled, rtol=1e-6, atol=1e-9)


def test_the_generator_draws_the_signs_alone():
    x, w = moments(8)
    one, two = (balanced_transform(x, w, inputs.generator(seed)) for seed in (1, 2))
    assert not torch.equal(one, two)
    torch.testing.assert_close(one @ one.mT, two @ two.mT)
    rotated = one @ random_orthogonal(32, inputs.generator(3))
    torch.testing.assert_close(cost(rotated, x, w), cost(one, x, w))
