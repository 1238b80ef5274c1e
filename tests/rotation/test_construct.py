"""The greedy outlier-aware rotation and DuQuant's permutation, by their properties."""

import pytest
import torch

from duqpp.rotation import construct
from duqpp.rotation.basis import hadamard, random_orthogonal
from duqpp.rotation.construct import (
    duquant_transform,
    greedy_rotation,
    outlier_aware,
    zigzag_permutation,
)
from tests import inputs, oracle

SIZE = 32**0.5


def planted(channel: int, *, row: int, rows: int = 48, size: float = 100.0) -> torch.Tensor:
    """Noise of at most 1, and one outlier: float32 [1, rows, 32]."""
    x = torch.rand(1, rows, 32, generator=inputs.generator(channel)) * 2 - 1
    x[0, row, channel] = size
    return x


def tail(rows: int, seed: int, groups: int = 1) -> torch.Tensor:
    """Samples with outlier channels, outlier tokens, and token-specific outliers."""
    x = torch.randn(groups, rows, 32, generator=inputs.generator(seed))
    x[:, :, seed % 32] *= 20
    x[:, seed % rows] *= 5
    place = torch.randint(0, rows, (groups,), generator=inputs.generator(seed + 1))
    for group, row in enumerate(place.tolist()):
        x[group, row, (seed * 7 + group) % 32] = 200.0
    return x


def peak_of(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of x R in each group, in float64 over all rows: [G]."""
    return (x.double() @ rotation).abs().amax((1, 2))


def one_step_matrix(seed: int) -> torch.Tensor:
    """M of the first step that a generator of this seed leads to, from the paper's definition."""
    mix = torch.block_diag(
        torch.ones(1, 1, dtype=torch.float64),
        random_orthogonal(31, inputs.generator(seed), count=1)[0],
    )
    return hadamard(32) @ mix


def swap(d: int) -> torch.Tensor:
    order = list(range(32))
    order[0], order[d] = d, 0
    return torch.eye(32, dtype=torch.float64)[order]


@pytest.mark.parametrize("channel", range(32))
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_one_step_lowers_the_peak_of_a_planted_outlier(channel, size):
    x = planted(channel, row=(channel * 11 + 5) % 48, size=size)
    result = greedy_rotation(x, inputs.generator(channel), max_steps=1)
    assert result.peak_before.tolist() == [100.0]
    assert result.steps.tolist() == [1]
    assert peak_of(x, result.rotation) < 75


@pytest.mark.parametrize("channel", range(32))
def test_one_step_spreads_the_channel_of_the_outlier_not_its_row(channel):
    """R_1 is E_d M E_d with d the channel; row numbers below 32 would pass for a channel."""
    row = (channel + 13) % 32
    x = planted(channel, row=row)
    result = greedy_rotation(x, inputs.generator(7), max_steps=1)
    M, E = one_step_matrix(7), swap(channel)
    assert (result.rotation[0] - E @ M @ E).abs().max() < 1e-14
    # What R~ Q spreads is even in place only, since Q mixes what R~ has spread.
    assert abs(result.rotation[0, channel, channel].abs() * SIZE - 1) < 1e-12
    assert (M[0] - 1 / SIZE).abs().max() > 0.05


def test_the_second_step_follows_the_outlier_to_its_new_channel():
    x = tail(64, seed=2)
    result = greedy_rotation(x, inputs.generator(17), max_steps=2)
    assert result.steps[0] == 2, "the test's own seed must lead to a second step"
    mix = random_orthogonal(31, inputs.generator(17), count=2)
    product = torch.eye(32, dtype=torch.float64)
    for Q in mix:
        d = int((x[0].double() @ product).abs().amax(0).argmax())
        Q = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), Q)
        product = product @ swap(d) @ hadamard(32) @ Q @ swap(d)
    assert (result.rotation[0] - product).abs().max() < 1e-12


def test_token_specific_outliers_that_a_mean_hides_are_reduced():
    """Opposite signs in two tokens for every outlier: the mean over samples is zero everywhere."""
    half = torch.rand(40, 32, generator=inputs.generator(5)) * 2 - 1
    for token, channel in enumerate((3, 3, 17, 30)):
        half[token, channel] = 150.0
    x = torch.cat((half, -half))[None]
    assert x.mean(1).abs().max() < 1e-6
    result = greedy_rotation(x, inputs.generator(0), max_steps=64)
    assert peak_of(x, result.rotation) < 0.4 * 150


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("groups", "rows"), [(1, 37), (1, 1500), (3, 700), (2, 5000)])
def test_peaks_are_those_of_all_rows(seed, groups, rows):
    """Whatever rows the search leaves out, its figures and its promise hold for all of them."""
    x = tail(rows, seed, groups)
    if seed >= 3:  # no outliers: nearly every row can hold the peak
        x = torch.randn(groups, rows, 32, generator=inputs.generator(seed))
    result = greedy_rotation(x, inputs.generator(seed), max_steps=24)
    before, after = peak_of(x, torch.eye(32, dtype=torch.float64)), peak_of(x, result.rotation)
    torch.testing.assert_close(result.peak_before.double(), before, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.peak_after.double(), after, rtol=1e-5, atol=0)
    assert (after <= before * (1 + 1e-6)).all(), "worse than no rotation"


@pytest.mark.parametrize("channel", [0, 5, 31])
def test_an_outlier_among_many_rows_of_larger_norm_is_found(channel):
    """Its row has less norm than each of 5000 others, and by far the largest value."""
    x = torch.randint(0, 2, (1, 5000, 32), generator=inputs.generator(0)) * 2.0 - 1  # norm 5.7
    x[0, 4321] = 0
    x[0, 4321, channel] = 5.5
    result = greedy_rotation(x, inputs.generator(1), max_steps=64)
    assert result.peak_before.tolist() == [5.5]
    assert peak_of(x, result.rotation) < 5


def test_rows_that_the_search_leaves_out_can_veto_its_result():
    """2500 rows of larger norm gain from a rotation; 20000 that are even as they are lose more."""
    x = torch.randint(0, 2, (1, 22500, 32), generator=inputs.generator(0)) * 2.0 - 1
    x[0, :2500] = 0.95
    x[0, :2500, 3] = 4.0
    steps = torch.stack([one_step_matrix(seed) for seed in range(16)])
    found = construct._search(construct._rows_that_may_peak(x), steps)
    assert found.peak_after < 4.0 < peak_of(x, found.rotation), "the test's own premise"
    result = greedy_rotation(x, inputs.generator(0), max_steps=16)
    assert peak_of(x, result.rotation) <= 4.0
    assert result.peak_after.tolist() == pytest.approx(peak_of(x, result.rotation).tolist())


def test_measuring_in_parts_changes_nothing(monkeypatch):
    x = tail(301, seed=1, groups=3)
    whole = greedy_rotation(x, inputs.generator(0), max_steps=9)
    monkeypatch.setattr(construct, "_ROWS_AT_A_TIME", 30)
    parts = greedy_rotation(x, inputs.generator(0), max_steps=9)
    oracle.assert_same(parts.rotation, whole.rotation, "rotation")
    torch.testing.assert_close(parts.peak_after, whole.peak_after)


def test_every_step_taken_pays_and_more_steps_never_hurt():
    x = tail(200, seed=6)
    last = float("inf")
    for max_steps in (1, 2, 4, 8, 16, 64):
        # Each length draws its own matrices, so that the first steps are the same.
        result = greedy_rotation(x, inputs.generator(2), max_steps=max_steps)
        assert result.steps <= max_steps
        last = min(last, float(peak_of(x, result.rotation)))
    assert last < 0.5 * float(x.abs().max())


def test_a_longer_search_keeps_the_best_prefix():
    x = construct._rows_that_may_peak(tail(200, seed=6))
    steps = torch.stack([one_step_matrix(seed) for seed in range(40)])
    peaks = [float(construct._search(x, steps[:n]).peak_after) for n in range(1, 41)]
    assert peaks == sorted(peaks, reverse=True)
    shortest = min(n for n in range(40) if peaks[n] == peaks[-1]) + 1
    assert construct._search(x, steps).steps.tolist() == [shortest]


def test_identity_is_kept_when_no_step_helps():
    """Rows that are already even: any rotation makes one entry larger."""
    x = torch.randint(0, 2, (1, 64, 32), generator=inputs.generator(0)) * 2.0 - 1
    result = greedy_rotation(x, inputs.generator(0), max_steps=8)
    assert result.steps.tolist() == [0]
    oracle.assert_same(result.rotation[0], torch.eye(32, dtype=torch.float64), "rotation")
    assert result.peak_after.tolist() == result.peak_before.tolist() == [1.0]


def test_the_result_is_orthogonal_to_1e_12():
    x = tail(300, seed=8, groups=4)
    result = greedy_rotation(x, inputs.generator(3))
    R = result.rotation
    assert R.dtype == torch.float64
    assert (R @ R.transpose(1, 2) - torch.eye(32)).abs().max() < 1e-12
    assert (result.steps > 0).all()


def test_seeded_and_independent_of_everything_else():
    x = tail(300, seed=9, groups=2)
    first = greedy_rotation(x, inputs.generator(4), max_steps=20)
    torch.randn(7)
    before, kept = torch.get_rng_state(), x.clone()
    again = greedy_rotation(x, inputs.generator(4), max_steps=20)
    oracle.assert_same(first.rotation, again.rotation, "rotation")
    oracle.assert_same(torch.get_rng_state(), before, "torch's own random state")
    oracle.assert_same(x, kept, "x")
    other = greedy_rotation(x, inputs.generator(5), max_steps=20)
    assert (first.rotation != other.rotation).any()


def test_groups_do_not_touch_each_other():
    """Each block's result is the one that it gets alone."""
    x = tail(300, seed=10, groups=3)
    together = greedy_rotation(x, inputs.generator(6), max_steps=12)
    for group in range(3):
        alone = greedy_rotation(x[group : group + 1], inputs.generator(6), max_steps=12)
        assert (together.rotation[group] - alone.rotation[0]).abs().max() < 1e-12
        assert together.steps[group] == alone.steps[0]


def test_all_zero_samples_are_left_alone():
    result = greedy_rotation(torch.zeros(1, 5, 32), inputs.generator(0), max_steps=3)
    assert result.peak_after.tolist() == [0.0]
    assert result.rotation.isfinite().all()


def test_the_number_of_torch_threads_is_restored():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        greedy_rotation(tail(50, seed=0), inputs.generator(0), max_steps=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("per_block", [False, True])
def test_outlier_aware_sees_activations_as_blocks(per_block):
    """[n, K] with an outlier in block 2: what that block needs is what it gets."""
    x = inputs.gaussian(100, 96, seed=11).clamp(-2, 2)
    x[41, 64 + 9] = 80.0
    R = outlier_aware(x, inputs.generator(8), per_block=per_block, max_steps=16)
    assert R.shape == ((3, 32, 32) if per_block else (32, 32))
    blocks = x.view(100, 3, 32).transpose(0, 1).double()
    after = (blocks @ R).abs().amax((1, 2))
    assert after[2] < 45
    if per_block:
        alone = greedy_rotation(blocks.float(), inputs.generator(8), max_steps=16)
        assert (alone.rotation - R).abs().max() < 1e-12
    else:
        rows = greedy_rotation(x.view(1, -1, 32), inputs.generator(8), max_steps=16)
        assert (rows.rotation[0] - R).abs().max() < 1e-12


# DuQuant: rotation, zigzag permutation, rotation.


@pytest.mark.parametrize("blocks", [1, 2, 3, 18, 64])
def test_zigzag_is_a_permutation_with_one_channel_of_each_stretch_in_each_block(blocks):
    k = 32 * blocks
    amax = torch.rand(k, generator=inputs.generator(blocks))
    permutation = zigzag_permutation(amax)
    assert permutation.dtype == torch.int32
    assert sorted(permutation.tolist()) == list(range(k))
    rank = amax.argsort(descending=True).argsort()
    stretch = (rank[permutation.long()] // blocks).view(blocks, 32)
    assert (stretch.sort(1).values == torch.arange(32)).all()


def test_zigzag_goes_forwards_then_backwards():
    # Ranks 0, 1, 2 go to blocks 0, 1, 2; ranks 3, 4, 5 to blocks 2, 1, 0; and so on.
    permutation = zigzag_permutation(torch.arange(96, 0, -1).float()).view(3, 32)
    assert permutation[0, :4].tolist() == [0, 5, 6, 11]
    assert permutation[1, :4].tolist() == [1, 4, 7, 10]
    assert permutation[2, :4].tolist() == [2, 3, 8, 9]


def test_zigzag_balances_blocks():
    amax = torch.rand(256, generator=inputs.generator(1)).pow(8)  # a few large channels
    sums = amax[zigzag_permutation(amax).long()].view(8, 32).sum(1)
    plain = amax.view(8, 32).sum(1)
    assert sums.max() - sums.min() < 0.25 * (plain.max() - plain.min())


def test_zigzag_with_equal_channels_is_stable():
    first, again = (zigzag_permutation(torch.ones(64)) for _ in range(2))
    oracle.assert_same(first, again, "permutation")
    assert sorted(first.tolist()) == list(range(64))


@pytest.mark.parametrize("per_block", [False, True])
def test_duquant_permutes_what_it_has_rotated(per_block):
    x = inputs.outliers(200, 96, seed=12)
    transform = duquant_transform(x, inputs.generator(9), per_block=per_block, max_steps=8)
    shape = (3, 32, 32) if per_block else (32, 32)
    for part in (transform.pre_rotation, transform.rotation):
        assert part.matrix.shape == shape
        assert part.matrix.dtype == torch.bfloat16
    rotated = transform.pre_rotation.apply(x)
    expected = zigzag_permutation(rotated.abs().amax(0))
    oracle.assert_same(transform.permutation, expected, "permutation")
    generator = inputs.generator(9)
    options = {"per_block": per_block, "max_steps": 8}
    first = outlier_aware(x, generator, **options)
    second = outlier_aware(rotated[:, expected.long()], generator, **options)
    oracle.assert_same(transform.pre_rotation.matrix, first.bfloat16(), "first rotation")
    oracle.assert_same(transform.rotation.matrix, second.bfloat16(), "second rotation")
    again = duquant_transform(x, inputs.generator(9), per_block=per_block, max_steps=8)
    oracle.assert_same(again.rotation.matrix, transform.rotation.matrix, "seeded")
    assert transform.apply(x).abs().max() < 0.6 * x.abs().max()
