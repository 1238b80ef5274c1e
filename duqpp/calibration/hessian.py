"""The GPTQ Hessian of a linear group, in the basis that its weights are quantized in."""

from collections.abc import Callable

import torch
from torch import Tensor

from duqpp.placement import HOST


def transform_second_moment(gram: Tensor, tokens: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """H = 2 / tokens * T.T (x.T x) T for a linear map T on rows: float32 [K, K].

    Args:
        gram: x.T x, float32 [K, K], accumulated over `tokens` rows of x in the model's basis.
        apply: x -> x T for rows [n, K].
    """
    half = apply(gram)  # gram T
    return apply(half.T.contiguous()).mul_(2.0 / tokens)


class HessianAccumulator:
    """H = mean over tokens of 2 x.T x, of rows that are in the rotated basis already.

    Args: channels: K. device: where the rows will be.
    """

    def __init__(self, channels: int, device: torch.device = HOST) -> None:
        self._gram = torch.zeros(channels, channels, dtype=torch.float32, device=device)
        self._tokens = 0

    def update(self, x: Tensor) -> None:
        """Take in the next rows: x float32 [n, K]."""
        self._gram.addmm_(x.T, x)
        self._tokens += len(x)

    def hessian(self) -> Tensor:
        """float32 [K, K]."""
        return self._gram * (2.0 / self._tokens)
