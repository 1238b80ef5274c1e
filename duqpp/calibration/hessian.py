"""The GPTQ Hessian of a linear group, in the basis that its weights are quantized in."""

from collections.abc import Callable

import torch
from torch import Tensor

from duqpp.placement import HOST
from duqpp.placement.ranks import ALONE, Ranks

PART = 2**24  # elements of a product that are in memory at a time
# Columns of a symmetric product that are computed at once. On one core with AVX2 and 2048 rows, of
# 128 to 512 columns 192 and 256 took the least time: 0.73 of the whole product's for K = 576, 0.65
# for 1536.
PANEL = 256


def transform_second_moment(gram: Tensor, tokens: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """H = 2 / tokens * T.T (x.T x) T for a linear map T on rows: float32 [K, K].

    Args:
        gram: x.T x, float32 [K, K], accumulated over `tokens` rows of x in the model's basis.
        apply: x -> x T for rows [n, K].
    """
    half = apply(gram)  # gram T
    del gram  # which nobody else may have
    turned = half.T.contiguous()
    del half
    return apply(turned).mul_(2.0 / tokens)


class ProductSum:
    """The sum over tokens of x.T y, of all ranks' tokens.

    Products of a batch are in float32, and their sum in float64: rounded to float32, it is the same
    however the batches are shared out, but where it lies at a tie.

    tokens: how many there are; of all ranks, once the sum is taken.

    Args:
        channels: K. device: where the rows will be.
        symmetric: whether y is x, and what is below the diagonal need not be computed.
    """

    def __init__(
        self, channels: int, device: torch.device = HOST, *, symmetric: bool = False
    ) -> None:
        self._sum = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        part = max(1, PART // channels)
        self._part = min(part, PANEL) if symmetric else part
        self._symmetric = symmetric
        self.tokens = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in a batch: x, y float32 [n, K]."""
        for start in range(0, len(self._sum), self._part):
            rows = slice(start, start + self._part)
            columns = slice(start if self._symmetric else 0, None)
            self._sum[rows, columns] += x[:, rows].T @ y[:, columns]
        self.tokens += len(x)

    def take(self, ranks: Ranks = ALONE) -> Tensor:
        """The sum, float32 [K, K], which is let go of here. Every rank asks for it at once."""
        total, self._sum = ranks.sum_(self._sum), self._sum.new_empty(0)
        self.tokens = sum(ranks.all(self.tokens))
        result = total.float()
        return self._mirrored(result) if self._symmetric else result

    def _mirrored(self, total: Tensor) -> Tensor:
        """With what is above the diagonal below it, too, in place."""
        for start in range(0, len(total), self._part):
            rows = slice(start, start + self._part)
            total[rows, :start] = total[:start, rows].T
        return total

    def mean(self, ranks: Ranks = ALONE) -> Tensor:
        """`take`, as the mean over tokens of 2 x.T y: with y = x the Hessian."""
        return self.take(ranks).mul_(2.0 / self.tokens)
