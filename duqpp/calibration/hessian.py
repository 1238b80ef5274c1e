"""The GPTQ Hessian of a linear group, in the basis that its weights are quantized in."""

from collections.abc import Callable

import torch
from torch import Tensor

from duqpp.placement import HOST
from duqpp.placement.ranks import ALONE, Ranks

_PART = 2**24  # elements of a product that are in memory at a time


def transform_second_moment(gram: Tensor, tokens: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """H = 2 / tokens * T.T (x.T x) T for a linear map T on rows: float32 [K, K].

    Args:
        gram: x.T x, float32 [K, K], accumulated over `tokens` rows of x in the model's basis.
        apply: x -> x T for rows [n, K].
    """
    half = apply(gram)  # gram T
    return apply(half.T.contiguous()).mul_(2.0 / tokens)


class ProductSum:
    """The sum over tokens of x.T y, of all ranks' tokens.

    Products of a batch are in float32, and their sum in float64: rounded to float32, it is the same
    however the batches are shared out, but where it lies at a tie.

    tokens: how many there are; of all ranks, once the sum is taken.

    Args: channels: K. device: where the rows will be.
    """

    def __init__(self, channels: int, device: torch.device = HOST) -> None:
        self._sum = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self._part = max(1, _PART // channels)
        self.tokens = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in a batch: x, y float32 [n, K]."""
        for start in range(0, len(self._sum), self._part):
            rows = slice(start, start + self._part)
            self._sum[rows] += x[:, rows].T @ y
        self.tokens += len(x)

    def take(self, ranks: Ranks = ALONE) -> Tensor:
        """The sum, float32 [K, K], which is let go of here. Every rank asks for it at once."""
        total, self._sum = ranks.sum_(self._sum), self._sum[:0]
        self.tokens = sum(ranks.all(self.tokens))
        return total.float()

    def mean(self, ranks: Ranks = ALONE) -> Tensor:
        """`take`, as the mean over tokens of 2 x.T y: with y = x the Hessian."""
        return self.take(ranks).mul_(2.0 / self.tokens)
