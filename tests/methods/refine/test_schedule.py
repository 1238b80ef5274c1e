"""Which batches train, at which rate, and when it has been seen enough."""

import math

import pytest
import torch
from torch import nn

from duqpp.errors import InputError
from duqpp.methods.refine.schedule import (
    EarlyStopping,
    LatentOptimizer,
    held_back,
    mean_gradients,
    mean_loss,
    steps_of,
)
from duqpp.placement.ranks import ALONE, Ranks
from tests.ranks import together


@pytest.mark.parametrize(
    ("batches", "held"),
    [(2, 1), (3, 1), (16, 1), (31, 1), (32, 2), (47, 2), (48, 3), (160, 10)],
)
def test_a_sixteenth_of_the_batches_is_held_back_and_at_least_one(batches, held):
    assert held_back(batches) == range(batches - held, batches)


@pytest.mark.parametrize("batches", [0, 1])
def test_fewer_than_two_batches_are_too_few(batches):
    with pytest.raises(InputError, match="one batch to train, one to check"):
        held_back(batches)


def _trained(ranks: Ranks) -> dict[str, object]:
    """Ranks with three batches, one and none."""
    own = [[5, 3, 4], [8], []][ranks.index]
    steps = steps_of(own, ranks)
    gradients = []
    for batch, batches in steps:
        parameter = nn.Parameter(torch.zeros(2))
        if batch is not None:
            parameter.grad = torch.full((2,), float(batch))
        mean_gradients([parameter], ranks, batches)
        gradients.append(parameter.grad.tolist())
    return {
        "steps": steps,
        "gradients": gradients,
        "loss": mean_loss([float(batch) for batch in own], ranks),
    }


def test_ranks_step_together_until_the_last_one_has_no_batch_left(tmp_path):
    found = together(3, _trained, tmp_path)
    assert [own["steps"] for own in found] == [
        [(5, 2), (3, 1), (4, 1)],
        [(8, 2), (None, 1), (None, 1)],
        [(None, 2), (None, 1), (None, 1)],
    ]
    for own in found:
        assert own["gradients"] == [[6.5, 6.5], [3.0, 3.0], [4.0, 4.0]]
        assert own["loss"] == 20 / 4, "of batches, not of ranks"


def test_alone_each_batch_is_a_step():
    assert steps_of([2, 0, 1], ALONE) == [(2, 1), (0, 1), (1, 1)]
    assert mean_loss([1.0, 4.0], ALONE) == 2.5


STEPS = 40


def moves(parameter: nn.Parameter, optimizer: LatentOptimizer, steps: int = STEPS) -> list[float]:
    """How far the parameter goes in each step: while the gradient is 1, Adam goes its rate."""
    lengths = []
    for _ in range(steps):
        before = parameter.detach().double().clone()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        lengths.append(float((before - parameter.detach().double()).mean()))
    return lengths


def rate(step: int) -> float:
    """As a share of the first: five steps of warm-up, half a cosine down to a twentieth."""
    cosine = (1 + math.cos(math.pi * step / STEPS)) / 2
    return min((step + 1) / 5, 1) * (1 / 20 + 19 / 20 * cosine)


@pytest.mark.parametrize(("sizes", "unit"), [(None, 2.0), ([1.0], 1.0)])
def test_the_rate_rises_in_five_steps_and_falls_to_a_twentieth(sizes, unit):
    """In units of the weight's root mean square, or of the size that is given."""
    parameter = nn.Parameter(torch.tensor([2.0, -2.0, 2.0, -2.0]))
    optimizer = LatentOptimizer([parameter], rate=0.01, steps=STEPS, sizes=sizes)
    found = [length / (0.01 * unit) for length in moves(parameter, optimizer)]
    assert found == pytest.approx([rate(step) for step in range(STEPS)], rel=1e-3)
    assert found[0] == pytest.approx(0.2, rel=1e-2)
    assert found[-1] == pytest.approx(1 / 20, rel=0.05)


def test_an_optimizer_goes_on_at_the_rate_where_another_stopped():
    whole, first, second = (nn.Parameter(torch.full((4,), 2.0)) for _ in range(3))
    expected = moves(whole, LatentOptimizer([whole], rate=0.01, steps=STEPS))
    begun = LatentOptimizer([first], rate=0.01, steps=STEPS)
    moves(first, begun, 3)
    resumed = LatentOptimizer([second], rate=0.01, steps=STEPS)
    second.data = first.detach().clone()
    resumed.done = begun.done
    resumed.restore(second, begun.moments(first))
    assert moves(second, resumed, STEPS - 3) == pytest.approx(expected[3:], rel=1e-3)
    assert (begun.done, resumed.done) == (3, STEPS)


@pytest.mark.parametrize(
    ("losses", "checks", "least", "best"),
    [
        ([1.0, 0.9, 0.8, 0.7], 3, 0.7, 3),  # each better
        ([1.0, 1.2, 1.3, 0.1], 2, 1.0, None),  # two clearly worse than the start
        ([1.0, 1.2, 0.9, 1.2, 1.0, 0.1], 4, 0.9, 2),  # worse than the least, not than the start
        ([1.0, 1.09, 1.09, 1.0, 1.05, 0.9], 5, 0.9, 5),  # a little worse, for long; as good
        ([1.0, 1.2, 1.05, 1.2, 1.05, 1.2], 5, 1.0, None),  # never two in a row
        ([1.0, math.nan, 0.9, math.nan, math.inf, 0.1], 4, 0.9, 2),  # losses that are no numbers
    ],
)
def test_what_is_kept_and_when_it_ends(losses, checks, least, best):
    seen = []

    def loss() -> float:
        seen.append(losses[len(seen)])
        return seen[-1]

    stopping = EarlyStopping(loss, lambda: len(seen) - 1)
    made = 0
    while made < len(losses) - 1:
        made += 1
        if not stopping.check():
            break
    assert made == checks
    assert (stopping.first, stopping.least, stopping.best) == (losses[0], least, best)
