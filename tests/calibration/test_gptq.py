"""GPTQ: round-to-nearest where it must be, better where it can be, and a textbook in float64."""

import numpy as np
import pytest
import torch

from duqpp.calibration import gptq as module
from duqpp.calibration.gptq import Gptq, GptqResult
from duqpp.errors import InputError
from duqpp.format import MXFP4Tensor, ScaleRule, dequantize, quantize
from duqpp.format.e2m1 import unpack_e2m1
from tests import inputs, oracle
from tests.memory import peak_growth

RULES = list(ScaleRule)


def rounded(weight: torch.Tensor, H: torch.Tensor, *, rule: ScaleRule, **options) -> GptqResult:
    return Gptq.of(H, **options).round(weight, rule)


def gptq(*args, **options) -> MXFP4Tensor:
    return rounded(*args, **options).weight


def correlated(k: int, seed: int, rows: int = 4096) -> torch.Tensor:
    """A Hessian of activations that a few directions dominate: float32 [K, K]."""
    mix = inputs.gaussian(k // 4, k, seed) * 3
    x = inputs.gaussian(rows, k // 4, seed + 1) @ mix + inputs.gaussian(rows, k, seed + 2)
    return x.T @ x * (2 / rows)


def weighted_error(weight: torch.Tensor, quantized: MXFP4Tensor, H: torch.Tensor) -> float:
    """tr (W - Q) H (W - Q).T in float64."""
    difference = (weight - dequantize(quantized)).double()
    return float(torch.einsum("nk,kl,nl->", difference, H.double(), difference))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_a_diagonal_hessian_gives_round_to_nearest(rule, damping):
    for make in (inputs.outliers, inputs.grid_and_ties, inputs.zero_blocks):
        weight = make(40, 160, seed=1)
        weight = torch.where(weight == 0, 0.0, weight)  # no -0: adding a zero makes it 0
        H = torch.diag(torch.exp(inputs.gaussian(1, 160, seed=2)[0] * 2))
        quantized, nearest = (
            gptq(weight, H, rule=rule, damping=damping),
            quantize(weight, rule=rule),
        )
        oracle.assert_same(quantized.scales, nearest.scales, f"scales, {make.__name__}")
        oracle.assert_same(quantized.codes, nearest.codes, f"codes, {make.__name__}")


@pytest.mark.parametrize("rule", [ScaleRule.EVEN, ScaleRule.MSE])
@pytest.mark.parametrize("seed", range(4))
def test_a_correlated_hessian_lowers_the_weighted_error_by_a_margin(rule, seed):
    weight, H = inputs.gaussian(48, 128, seed), correlated(128, seed + 10)
    error = weighted_error(weight, gptq(weight, H, rule=rule, damping=0.01), H)
    nearest = weighted_error(weight, quantize(weight, rule=rule), H)
    assert error < 0.5 * nearest


def test_errors_reach_later_blocks_and_not_just_their_own():
    """H ties column 5 to column 40: what rounding 5 loses, 40 makes up for."""
    H = torch.eye(64)
    H[5, 40] = H[40, 5] = 0.9
    weight = torch.zeros(1, 64)
    weight[0, 0] = weight[0, 32] = 6.0  # both blocks have scale 1
    weight[0, 5], weight[0, 40] = 1.2, 2.0
    values = dequantize(gptq(weight, H, rule=ScaleRule.FLOOR, damping=1e-9))
    # 1.2 becomes 1.0; the best w[40] is then 2.0 + 0.9 * 0.2 = 2.18, which is still 2.
    assert (values[0, 5], values[0, 40]) == (1.0, 2.0)
    weight[0, 40] = 2.4
    values = dequantize(gptq(weight, H, rule=ScaleRule.FLOOR, damping=1e-9))
    # 2.4 + 0.18 = 2.58 passes the midpoint 2.5.
    assert (values[0, 5], values[0, 40]) == (1.0, 3.0)


def test_the_scale_of_a_block_is_chosen_when_it_is_reached():
    """Compensation makes the second block's only value larger, beyond the next power of two."""
    H = torch.eye(64)
    H[5, 40] = H[40, 5] = 0.9
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 5], weight[0, 40] = 6.0, 1.2, 3.9
    quantized = gptq(weight, H, rule=ScaleRule.FLOOR, damping=1e-9)
    assert quantize(weight, rule=ScaleRule.FLOOR).scales.tolist() == [[127, 126]]
    assert quantized.scales.tolist() == [[127, 127]]
    assert dequantize(quantized)[0, 40] == 4.0


def test_dead_columns_are_rounded_to_nearest_and_disturb_nothing():
    k, dead = 96, [0, 17, 40, 95]
    weight, H = inputs.gaussian(20, k, seed=3), correlated(k, seed=4)
    H[dead] = H[:, dead] = 0.0
    quantized = gptq(weight, H, rule=ScaleRule.EVEN, damping=0.01)
    nearest = oracle.round_block(weight.view(20, 3, 32), quantized.scales).reshape(20, k)
    oracle.assert_same(dequantize(quantized)[:, dead], nearest[:, dead], "dead columns")
    others = weight.clone()
    others[:, dead] = quantized_there = dequantize(quantized)[:, dead]
    same = gptq(others, H, rule=ScaleRule.EVEN, damping=0.01)
    held = (same.scales == quantized.scales).all(1)  # where those weights decided no scale
    assert held.sum() > 15
    assert torch.equal(dequantize(same)[held], dequantize(quantized)[held])
    assert quantized_there.any()


def test_dead_columns_do_not_enter_the_damping():
    """Damping is a fraction of the mean diagonal of the columns that are used."""
    k = 64
    weight, H = inputs.gaussian(20, k, seed=5), correlated(k, seed=6)
    padded_H = torch.zeros(2 * k, 2 * k)
    padded_H[:k, :k] = H
    padded = torch.cat((weight, inputs.gaussian(20, k, seed=7)), dim=1)
    alone = gptq(weight, H, rule=ScaleRule.EVEN, damping=0.5)
    beside = gptq(padded, padded_H, rule=ScaleRule.EVEN, damping=0.5)
    oracle.assert_same(beside.codes[:, : k // 2], alone.codes, "codes")
    nearest = quantize(padded[:, k:], rule=ScaleRule.EVEN)
    oracle.assert_same(beside.codes[:, k // 2 :], nearest.codes, "codes of dead blocks")
    oracle.assert_same(beside.scales[:, k // 32 :], nearest.scales, "scales of dead blocks")


def row_losses(weight: torch.Tensor, quantized: MXFP4Tensor, H: torch.Tensor) -> torch.Tensor:
    """(W - Q) H (W - Q).T of each row, float64 [N]; H damped by 0.01, dead columns like others."""
    live = H.diagonal() > 0
    mean = H.diagonal()[live].double().mean() if live.any() else 1.0
    damped = H.double() + torch.diag((0.01 + (~live).double()) * mean)
    difference = (weight - dequantize(quantized)).double()
    return torch.einsum("nk,kl,nl->n", difference, damped, difference)


@pytest.mark.parametrize("order", ["diagonal", "channels"])
@pytest.mark.parametrize("rank", [0, 1, 2, 7, 31, 48, 95, 96, 4096])
def test_no_row_is_worse_than_rounded_to_nearest(rank, order):
    """For Hessians of so many tokens: from none, through fewer than channels, to many.

    Independent channels are what makes column by column lose now and then: it has little to gain.
    """
    for seed, shape in enumerate((inputs.gaussian, inputs.outliers)):
        x = shape(rank, 96, seed) if rank else torch.zeros(1, 96)
        x[:, 3] = x[:, 70:80] = 0.0
        weight, H = inputs.gaussian(300, 96, seed + 1), x.T @ x * (2 / max(rank, 1))
        for rule in (ScaleRule.MSE, ScaleRule.EVEN):
            found = gptq(weight, H, rule=rule, damping=0.01, order=order)
            nearest = row_losses(weight, quantize(weight, rule=rule), H)
            assert (row_losses(weight, found, H) <= nearest * (1 + 1e-4)).all()


def test_a_row_that_is_rounded_to_nearest_says_so_in_what_it_was_rounded_from():
    x = inputs.gaussian(1, 96, 0)
    weight, H = inputs.gaussian(300, 96, 1), x.T @ x
    found = rounded(weight, H, rule=ScaleRule.MSE, damping=0.01)
    own = (found.compensated == weight).all(1)
    assert 0 < own.sum() < 150, "both kinds of rows are there"
    nearest = quantize(weight, rule=ScaleRule.MSE)
    oracle.assert_same(found.weight.codes[own], nearest.codes[own], "codes")
    oracle.assert_same(found.weight.scales[own], nearest.scales[own], "scales")


@pytest.mark.parametrize(("rank", "share"), [(1, 0.1), (5, 0.2), (63, 0.8)])
def test_a_singular_hessian_is_damped(rank, share):
    x = inputs.gaussian(rank, 64, seed=rank)
    weight, H = inputs.gaussian(20, 64, seed=8), x.T @ x
    quantized = gptq(weight, H, rule=ScaleRule.EVEN, damping=0.01)
    nearest = weighted_error(weight, quantize(weight, rule=ScaleRule.EVEN), H)
    assert weighted_error(weight, quantized, H) < share * nearest


def test_damping_grows_tenfold_until_it_suffices():
    """A least eigenvalue of -0.05 needs damping above 0.05: 0.01 fails and 0.1 does not."""
    Q = torch.linalg.qr(inputs.gaussian(64, 64, seed=9).double()).Q
    eigenvalues = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
    eigenvalues[0] = -0.05
    H = (Q * eigenvalues) @ Q.T
    H = ((H + H.T) / 2).float()
    assert H.diagonal().mean() == pytest.approx(1, abs=0.02)
    weight = inputs.gaussian(20, 64, seed=10)
    fallen_back = gptq(weight, H, rule=ScaleRule.EVEN, damping=0.01)
    enough = gptq(weight, H, rule=ScaleRule.EVEN, damping=0.1)
    oracle.assert_same(fallen_back.codes, enough.codes, "codes with ten times the damping")
    oracle.assert_same(fallen_back.scales, enough.scales, "scales with ten times the damping")


def test_a_hessian_beyond_damping_is_an_error():
    with pytest.raises(InputError) as error:
        gptq(torch.ones(2, 32), -torch.eye(32), rule=ScaleRule.EVEN, damping=0.01)
    assert str(error.value) == (
        "GPTQ: the Hessian is not positive definite with damping up to 1000; "
        "give more calibration text"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (31, 31), (3, 9)])
def test_a_hessian_that_is_not_finite_is_an_error(value, place):
    H = torch.eye(32)
    H[place] = H[place[::-1]] = value
    with pytest.raises(InputError, match=r"^GPTQ: the Hessian has NaN or infinite values$"):
        gptq(torch.ones(2, 32), H, rule=ScaleRule.EVEN, damping=0.01)


def test_arguments_are_left_as_they_were():
    weight, H = inputs.gaussian(8, 64, seed=11), correlated(64, seed=12)
    H[3] = H[:, 3] = 0.0
    copies = weight.clone(), H.clone()
    quantized = gptq(weight, H, rule=ScaleRule.EVEN, damping=0.01)
    oracle.assert_same(weight, copies[0], "weight")
    oracle.assert_same(H, copies[1], "H")
    assert quantized.codes.shape == (8, 32)
    assert quantized.scales.shape == (8, 2)
    assert quantized.codes.dtype == quantized.scales.dtype == torch.uint8


def test_rows_are_independent():
    weight, H = inputs.gaussian(10, 96, seed=13), correlated(96, seed=14)
    together = gptq(weight, H, rule=ScaleRule.MSE, damping=0.01)
    for part in (slice(0, 3), slice(3, 10)):
        alone = gptq(weight[part], H, rule=ScaleRule.MSE, damping=0.01)
        same = unpack_e2m1(alone.codes) == unpack_e2m1(together.codes[part])
        assert same.float().mean() > 0.99  # another number of rows may sum in another order


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ["diagonal", "channels"])
def test_agrees_with_a_textbook(order, rule, seed):
    """Column by column with the explicit inverse of what is left of H, in float64.

    The textbook takes over each code that was chosen and checks it: it must be what its own value
    rounds to, give or take the rounding of a float32 computation. Rows that were rounded to nearest
    are not its own.
    """
    n, k, damping = 24, 96, 0.01
    weight, H = inputs.outliers(n, k, seed), correlated(k, seed + 20)
    H[:, 50] = H[50] = 0.0
    H[64:] *= 2  # the last block comes first in the order of the diagonal
    H[:, 64:] *= 2
    found = rounded(weight, H, rule=rule, damping=damping, order=order)
    own = ~(found.compensated == weight).all(1)
    weight, n = weight[own], int(own.sum())
    assert n >= 12
    codes = unpack_e2m1(found.weight.codes[own]).numpy()
    scales = found.weight.scales[own].numpy()

    W, H = weight.double().numpy().copy(), H.double().numpy()
    blocks = H.diagonal().reshape(-1, 32).sum(1).argsort()[::-1]
    assert blocks[0] == 2
    if order == "channels":
        blocks = np.arange(3)
    mean = np.diag(H)[np.diag(H) > 0].mean()
    H = H + np.eye(k) * damping * mean
    H[50, 50] += mean
    size = np.abs(W).max(1, keepdims=True)  # of a row: float32 errors are relative to it
    columns = (blocks[:, None] * 32 + np.arange(32)).ravel()
    W, H = W[:, columns], H[np.ix_(columns, columns)]
    codes, scales = codes[:, columns], scales[:, blocks]
    decided = 0
    for j in range(k):
        tolerance = size[:, 0] * 2.0**-18
        if j % 32 == 0:
            block = W[:, j : j + 32]
            check_scales(block, scales[:, j // 32], tolerance, rule)
        scale = oracle.decode_e8m0(scales[:, j // 32])
        value = oracle.E2M1_VALUES[codes[:, j]]
        below = oracle.E2M1_VALUES[oracle.encode_e2m1((W[:, j] - tolerance) / scale)]
        above = oracle.E2M1_VALUES[oracle.encode_e2m1((W[:, j] + tolerance) / scale)]
        assert ((below <= value) & (value <= above)).all(), (
            f"column {j}, rule {rule}, seed {seed}, order {order}"
        )
        decided += (below == above).sum()
        inverse = np.linalg.inv(H[j:, j:])
        error = (W[:, j] - value * scale) / inverse[0, 0]
        W[:, j:] -= np.outer(error, inverse[0])
    assert decided > 0.98 * n * k, "the tolerance must decide nearly every code"


def check_scales(block: np.ndarray, scales: np.ndarray, tolerance: np.ndarray, rule: ScaleRule):
    """Scales [N] are those of the float64 block [N, 32] under the rule, give or take tolerance."""
    amax = np.abs(block).max(1)
    if rule is ScaleRule.MSE:
        floor = oracle.scale_exponent(amax, "floor")
        assert ((floor == scales) | (floor + 1 == scales) | (floor - 1 == scales)).all()
        chosen = ((oracle.round_block(block, scales) - block) ** 2).sum(-1)
        for exponent in (floor, floor + 1):
            other = ((oracle.round_block(block, exponent) - block) ** 2).sum(-1)
            assert (chosen <= other + tolerance * np.abs(block).max(1) * 32).all()
        return
    least = oracle.scale_exponent(np.maximum(amax - tolerance, 0), rule.value)
    most = oracle.scale_exponent(amax + tolerance, rule.value)
    assert ((least <= scales) & (scales <= most)).all()


def test_errors_reach_all_columns_however_many():
    """More columns than are fed forward at a time: each of the last ones hears of the first."""
    k = module._COLUMNS_AT_A_TIME + 64
    weight, H = inputs.gaussian(8, k, seed=15), correlated(k, seed=16)
    found = rounded(weight, H, rule=ScaleRule.MSE, damping=0.01, order="channels")
    factor = factorized_by_hand(H, torch.arange(k), 0.01)[0]
    errors = (weight - dequantize(found.weight)).double() @ factor
    made = found.compensated - dequantize(found.weight)
    torch.testing.assert_close(made.double(), errors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_compensated_weight_is_what_was_rounded(rule):
    """Each value of it rounds to its code, and behind the first column it is not the weight."""
    weight, H = inputs.gaussian(16, 96, 1), correlated(96, 2)
    found = rounded(weight, H, rule=rule, damping=0.01)
    scale = torch.exp2(found.weight.scales.float() - 127).repeat_interleave(32, 1)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat((-grid, grid))
    nearest = ((found.compensated / scale)[..., None] - grid).abs().amin(-1)
    made = ((found.compensated - dequantize(found.weight)) / scale).abs()
    torch.testing.assert_close(made, nearest)
    first = 32 * int(H.diagonal().view(-1, 32).sum(1).argmax())
    assert torch.equal(found.compensated[:, first], weight[:, first])
    others = torch.arange(96) != first
    assert ((found.compensated - weight)[:, others] != 0).float().mean() > 0.99


def test_memory_is_one_matrix_in_float64_and_one_in_float32():
    """12 K^2 bytes beside the Hessian: 8 and 4. Copies that torch makes would be 8 each."""
    k = 512
    H, weight = correlated(k, seed=1, rows=256), inputs.gaussian(1, k, seed=2)
    grown = peak_growth(lambda: gptq(weight, H, rule=ScaleRule.EVEN, damping=0.01))
    assert 12 * k**2 <= grown < 13 * k**2


def factorized_by_hand(H: torch.Tensor, columns: torch.Tensor, damping: float):
    """F and D of H in an order, by separate matrices: float64 [K, K] and [K]."""
    damped = H[columns][:, columns].double()
    damped.diagonal().add_(damping * H.diagonal().double().mean())
    root = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return root / root.diagonal(), root.diagonal().square(), damped


def test_factors_are_those_of_separate_matrices():
    """Bit by bit: working in place changes no result."""
    H = correlated(96, seed=3)
    columns = torch.arange(96).flip(0)
    factor, pivots, _ = factorized_by_hand(H, columns, 0.01)
    made = module._factorized(H, columns, 0.01)
    oracle.assert_same(made[0], factor.float(), "F")
    oracle.assert_same(made[2], pivots.float(), "D")


def test_factors_are_those_of_the_damped_hessian():
    H, columns = correlated(96, seed=4), torch.arange(96).roll(32)
    factor, corners, pivots = (part.double() for part in module._factorized(H, columns, 0.01))
    damped = factorized_by_hand(H, columns, 0.01)[2]
    torch.testing.assert_close(
        (factor * pivots) @ factor.T, damped, rtol=0, atol=2e-6 * damped.max()
    )
    assert torch.equal(factor, factor.triu()) and (factor.diagonal() == 1).all()
    for index, corner in enumerate(corners):
        here = slice(32 * index, 32 * index + 32)
        torch.testing.assert_close(
            corner @ factor[here, here], torch.eye(32).double(), rtol=0, atol=1e-5
        )
