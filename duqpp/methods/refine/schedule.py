"""How latents are trained: which batches, Adam in units of each weight's size, when to stop."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

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

Snapshot = TypeVar("Snapshot")


def held_back(batches: int) -> range:
    """Which batches are not trained on, the last ones; those before `start` are.

    Raises: InputError when there are fewer than two batches.
    """
    if batches < 2:
        raise InputError("training needs more calibration text: one batch to train, one to check")
    return range(batches - max(1, batches // _HELD_SHARE), batches)


def mean_loss(losses: Sequence[float], ranks: Ranks) -> float:
    """The mean over the batches of all ranks, each of which has the losses of its own."""
    parts = ranks.all((sum(losses), len(losses)))
    return sum(part for part, _ in parts) / sum(batches for _, batches in parts)


def mean_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks, batches: int) -> None:
    """Let each parameter have the mean gradient over ranks, of which so many have had a batch."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        ranks.sum_(parameter.grad).div_(batches)


def steps_of(own: Sequence[int], ranks: Ranks) -> list[tuple[int | None, int]]:
    """In each step every rank has one of its batches, until it has none left.

    Args: own: this rank's batches, in their order.
    Returns: by step the batch, or None, and how many ranks have one: there are as many steps as the
        rank with the most batches has.
    """
    counts = ranks.all(len(own))
    having = [sum(count > step for count in counts) for step in range(max(counts))]
    batches: list[int | None] = [*own, *[None] * (len(having) - len(own))]
    return list(zip(batches, having, strict=True))


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

    Args:
        parameters: latents. rate: the fraction, for the first steps. steps: how many there will be.
        betas: Adam's. relative: False takes rate as it is.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        rate: float,
        steps: int,
        betas: tuple[float, float] = (0.9, 0.95),
        relative: bool = True,
    ) -> None:
        self._parameters, self._steps = list(parameters), steps
        units = [
            float(p.detach().square().mean().sqrt()) if relative else 1.0 for p in self._parameters
        ]
        groups = [
            {"params": [p], "lr": rate * unit}
            for p, unit in zip(self._parameters, units, strict=True)
        ]
        self.adam = torch.optim.Adam(groups, betas=betas)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda step: _share_of_rate(step, steps)
        )

    def step(self) -> None:
        """Apply the gradients and clear them."""
        self.adam.step()
        self.adam.zero_grad()
        self._schedule.step()

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs besides the latents themselves; float32."""
        tensors = {
            "steps": torch.tensor(
                float(self._schedule.last_epoch), dtype=torch.float32, device=HOST
            )
        }
        for index, parameter in enumerate(self._parameters):
            for name, value in self.adam.state.get(parameter, {}).items():
                tensors[f"{name}.{index}"] = value
        return tensors

    def restore(self, state: dict[str, Tensor]) -> int:
        """Go on from a state. Returns: how many steps that had done."""
        steps = int(state["steps"])
        for index, parameter in enumerate(self._parameters):
            names = ("step", "exp_avg", "exp_avg_sq")
            own = {n: state[f"{n}.{index}"] for n in names}
            # Adam keeps its count of steps on the host.
            self.adam.state[parameter] = {
                n: t.clone() if n == "step" else t.to(parameter.device, copy=True)
                for n, t in own.items()
            }
        self._schedule.last_epoch = steps
        for group, base in zip(self.adam.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = base * _share_of_rate(steps, self._steps)
        return steps


def _share_of_rate(step: int, steps: int) -> float:
    warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
    return warm_up * (_LAST_RATE + (1 - _LAST_RATE) * cosine)
