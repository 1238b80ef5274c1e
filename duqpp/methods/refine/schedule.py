"""How latents are trained: which batches, Adam in units of each weight's size, when to stop."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from duqpp.errors import InputError
from duqpp.placement import HOST
from duqpp.placement.ranks import Ranks

_HELD_SHARE = 16  # one batch in so many is held back, and decides which weights are kept
_WARM_UP_STEPS = 5
_LAST_RATE = 0.05  # of the first
# Training stops after so many checks in a row that are so much worse than the least loss. While the
# rate is high losses are often a few percent above that of the start, and the end still the best:
# stopped when two checks brought nothing new, 6 of SmolLM2-135M's 30 blocks stayed as they were.
_PATIENCE = 2
_WORSE = 1.1
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch names Adam's

Snapshot = TypeVar("Snapshot")


def held_back(batches: int) -> range:
    """Which batches are not trained on, the last ones; those before `start` are.

    Raises: InputError when there are fewer than two batches.
    """
    if batches < 2:
        raise InputError("training needs more calibration text: one batch to train, one to check")
    return range(batches - max(1, batches // _HELD_SHARE), batches)


class Batch(NamedTuple):
    """A batch of a job. rank: which has it. place: among that rank's batches."""

    rank: int
    place: int


def batches_of_all(ranks: Ranks, *counts: int) -> list[Batch]:
    """The batches of all ranks, in the order in which one process would have them.

    Args: counts: how many of each kind this rank has, in order: those that calibrate come before
        those that only refine, and of either kind each rank has a run.
    """
    batches, of_all = [], ranks.all(counts)
    for kind in range(len(counts)):
        for rank, own in enumerate(of_all):
            before = sum(own[:kind])
            batches += [Batch(rank, before + place) for place in range(own[kind])]
    return batches


def mean_loss(loss: Callable[[int], Tensor], batches: Sequence[Batch], ranks: Ranks) -> float:
    """The mean loss over batches, each measured by the rank that has it."""
    own = [float(loss(batch.place)) for batch in batches if batch.rank == ranks.index]
    return sum(chain(*ranks.all(own))) / len(batches)


def backward(
    loss: Callable[[int], Tensor],
    batch: Batch,
    parameters: Iterable[nn.Parameter],
    ranks: Ranks,
) -> None:
    """Let each parameter have the gradient of the loss of a batch, from the rank that has that.

    So each step is, bit by bit, the one that a single process makes, while the other ranks wait.
    """
    if batch.rank == ranks.index:
        loss(batch.place).backward()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        ranks.broadcast_(parameter.grad, batch.rank)


def shuffled(count: int, generator: torch.Generator) -> list[int]:
    """The numbers below `count` in a random order, drawn on the generator's device."""
    order: list[int] = torch.randperm(count, generator=generator, device=generator.device).tolist()
    return order


class EarlyStopping(Generic[Snapshot]):
    """Keeps what had the least loss on held-back batches, and says when to look no further.

    first, least: the loss of the start, and the least so far. best: what was kept of the state that
    had it, None where that is the start. stale: checks in a row that were clearly worse.

    Args:
        loss: of the current state on the held-back batches.
        snapshot: what to keep of the current state.
    """

    def __init__(self, loss: Callable[[], float], snapshot: Callable[[], Snapshot]) -> None:
        self._loss, self._snapshot = loss, snapshot
        self.first = self.least = self._measured()
        self.best: Snapshot | None = None
        self.stale = 0

    def check(self) -> bool:
        """Measure the current state. Returns: whether it is worth to go on."""
        found = self._measured()
        if found < self.least:
            self.least, self.best, self.stale = found, self._snapshot(), 0
        elif found <= _WORSE * self.least:
            self.stale = 0
        else:  # NaN too
            self.stale += 1
        return self.stale < _PATIENCE

    def _measured(self) -> float:
        with torch.no_grad():
            return self._loss()


class LatentOptimizer:
    """Adam whose rate for each weight is a fraction of that weight's root mean square.

    done: steps so far, which an optimizer that goes on where another one stopped is told.

    Args:
        parameters: latents. rate: the fraction, for the first steps. steps: how many there will be.
        betas: Adam's. sizes: of each parameter what its rate is a fraction of; None for its root
            mean square.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        rate: float,
        steps: int,
        betas: tuple[float, float] = (0.9, 0.95),
        sizes: Sequence[float] | None = None,
    ) -> None:
        latents, self._steps, self.done = list(parameters), steps, 0
        sizes = [root_mean_square(p) for p in latents] if sizes is None else sizes
        self._rates = {p: rate * size for p, size in zip(latents, sizes, strict=True)}
        # One for each, so that a parameter takes its gradient while others still wait for theirs.
        self._adam = {p: torch.optim.Adam([p], betas=betas) for p in latents}

    def step(self) -> None:
        """Apply the gradients and clear them."""
        for parameter in self._adam:
            self.apply(parameter)
        self.done += 1

    def apply(self, parameter: nn.Parameter) -> None:
        """Do the part of `step` that is one parameter's."""
        adam = self._adam[parameter]
        adam.param_groups[0]["lr"] = self._rates[parameter] * _share_of_rate(self.done, self._steps)
        adam.step()
        adam.zero_grad()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Adam's two of a parameter that has had a step; float32 in its shape."""
        state = self._adam[parameter].state[parameter]
        return {name: state[name] for name in MOMENTS}

    def restore(self, parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> None:
        """Go on from the moments of a parameter after `done` steps."""
        # Adam keeps its count of steps on the host.
        steps = torch.tensor(float(self.done), dtype=torch.float32, device=HOST)
        own = {name: moments[name].to(parameter.device, copy=True) for name in MOMENTS}
        self._adam[parameter].state[parameter] = {"step": steps} | own


def root_mean_square(weight: Tensor) -> float:
    """Of all values of a weight."""
    return float(weight.detach().square().mean().sqrt())


def _share_of_rate(step: int, steps: int) -> float:
    warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
    return warm_up * (_LAST_RATE + (1 - _LAST_RATE) * cosine)
