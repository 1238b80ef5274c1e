"""The optimizer of latent weights: Adam in units of each weight's own size, on a cosine."""

import math
from collections.abc import Iterable

import torch
from torch import nn

_BETAS = (0.9, 0.95)
_WARM_UP_STEPS = 5
_LAST_RATE = 0.05  # of the first


class LatentOptimizer:
    """Adam whose rate for each weight is a fraction of that weight's root mean square.

    Args:
        parameters: latents. rate: the fraction, for the first steps. steps: how many there will be.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, rate: float, steps: int) -> None:
        groups = [
            {"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())}
            for p in parameters
        ]
        self.adam = torch.optim.Adam(groups, betas=_BETAS)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda step: _share_of_rate(step, steps)
        )

    def step(self) -> None:
        """Apply the gradients and clear them."""
        self.adam.step()
        self.adam.zero_grad()
        self._schedule.step()


def _share_of_rate(step: int, steps: int) -> float:
    warm_up = min(1.0, (step + 1) / _WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
    return warm_up * (_LAST_RATE + (1 - _LAST_RATE) * cosine)
