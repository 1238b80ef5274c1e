"""Which batches train, at which rate, and when it has been seen enough."""

import math

import pytest
import torch
from torch import nn

from duqpp.errors import InputError
from duqpp.methods.refine.schedule import (
    EarlyStopping,
    LatentOptimizer,
    backward,
    batches_of_all,
    held_back,
    mean_loss,
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
    """Ranks with two batches that calibrate, one and one; and one that only refines, none, two."""
    counts = [(2, 1), (1, 0), (1, 2)][ranks.index]
    batches = batches_of_all(ranks, *counts)
    scale, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

    def loss(place: int) -> torch.Tensor:
        return (10.0 * ranks.index + place) * scale.sum()

    gradients = []
    for batch in batches:
        scale.grad = None
        backward(loss, batch, [scale, other], ranks)
        gradients.append(scale.grad.tolist())
    return {
        "batches": batches,
        "gradients": gradients,
        "unused": other.grad.tolist(),
        "loss": mean_loss(lambda place: loss(place).detach(), batches[1:], ranks),
    }


def test_ranks_train_on_the_batches_of_one_process_in_its_order(tmp_path):
    for own in together(3, _trained, tmp_path):
        assert own["batches"] == [(0, 0), (0, 1), (1, 0), (2, 0), (0, 2), (2, 1), (2, 2)]
        assert own["gradients"] == [[x, x] for x in (0.0, 1.0, 10.0, 20.0, 2.0, 21.0, 22.0)]
        assert own["unused"] == [0.0] * 3
        assert own["loss"] == pytest.approx(2 * (1 + 10 + 20 + 2 + 21 + 22) / 6)


def test_alone_the_batches_are_in_their_order():
    losses = torch.tensor([1.0, 4.0])
    assert mean_loss(lambda place: losses[place], batches_of_all(ALONE, 2), ALONE) == 2.5


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
