"""Which channels are silent, and that neither H nor the drift forgets their weights."""

import pytest
import torch

from duqpp.calibration.silent import (
    excite_silent,
    silent_channels,
    with_silent_excited,
    without_silent,
)
from duqpp.rotation import BlockRotation, InputTransform
from tests import inputs


def transform(seed: int) -> InputTransform:
    """Rotations that are not orthogonal, one for each of two blocks, behind a permutation."""
    generator = inputs.generator(seed)
    matrix = torch.eye(32) + 0.1 * torch.randn(2, 32, 32, generator=generator)
    return InputTransform(
        BlockRotation(matrix.bfloat16()),
        permutation=torch.randperm(64, generator=generator).int(),
    )


def test_a_channel_is_silent_next_to_the_median_of_those_in_use():
    amax = torch.ones(64)
    amax[[3, 40]] = 0.0
    amax[5], amax[6], amax[7] = 1e-4, 1e-2, 1e6  # an outlier makes no other channel silent
    assert silent_channels(amax).tolist() == [3, 5, 40]
    assert silent_channels(torch.ones(64)).tolist() == []
    assert silent_channels(torch.zeros(64)).tolist() == list(range(64))
    amax[8:] = 0.0
    assert silent_channels(amax).tolist() == [3, 5, *range(8, 64)], "most of them"


@pytest.mark.parametrize("silent", [[7], [0, 1, 40], list(range(32, 64))])
def test_a_silent_direction_is_excited_and_others_are_not(silent):
    """An error of the folded weight costs what it does to the silent channels' weights."""
    turn, chosen = transform(1), torch.tensor(silent)
    x = inputs.gaussian(200, 64, seed=2)
    x[:, chosen] = 0.0
    H = turn.apply(x).T @ turn.apply(x) / 200
    excited = H.clone()
    excite_silent(excited, chosen, turn.apply)
    live = [c for c in range(64) if c not in silent]
    of_channels = turn.fold(torch.eye(64)).float()  # row c: weight 1 of channel c, folded
    cost = torch.einsum("ck,kl,cl->c", of_channels, excited - H, of_channels)
    assert (cost[chosen] > 0.1 * H.diagonal().mean()).all()
    torch.testing.assert_close(cost[live], torch.zeros(len(live)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("silent", [[7], [0, 1, 40], list(range(64))])
def test_a_change_keeps_silent_channels_and_moves_the_others_as_before(silent):
    turn = transform(3)
    change = inputs.gaussian(5, 64, seed=4)
    kept = without_silent(change, torch.tensor(silent), turn.apply, turn.fold)
    back = turn.apply(torch.eye(64)).T  # from folded weights to those of the channels
    expected = change @ back
    expected[:, silent] = 0.0
    torch.testing.assert_close(kept @ back, expected, atol=1e-4, rtol=1e-4)


def test_moments_of_silent_channels_are_a_share_of_their_blocks_mean():
    moments = torch.eye(32, dtype=torch.float64).repeat(3, 1, 1)
    moments[2] = 0.0
    silent = torch.tensor([4, 33, *range(64, 96)])
    moments[0, 4, 4] = moments[1, 1, 1] = 0.0
    excited = with_silent_excited(moments, silent)
    assert excited[0, 4, 4] == excited[1, 1, 1] == 0.5 * 31 / 32
    excited[0, 4, 4] = excited[1, 1, 1] = 0.0
    assert torch.equal(excited, moments), "a silent block stays, and so do other channels"
