"""The weights of a linear group, one after another in memory, so that one product serves all."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from duqpp.format import MXFP4Tensor


class Member(Protocol):
    """A linear whose weight can be joined."""

    def joinable(self) -> MXFP4Tensor | None:
        """Its prepared weight, where that may stand behind another one; else None."""

    def adopt(self, weight: MXFP4Tensor) -> None:
        """Take the same weight in other memory."""


class Joined:
    """Prepared weights of linears along N, each of which the linear has as a slice.

    weight: [N of all, K].
    """

    def __init__(self, weights: Sequence[MXFP4Tensor]) -> None:
        codes, scales = ([getattr(w, name) for w in weights] for name in ("codes", "scales"))
        self.weight = MXFP4Tensor(torch.cat(codes), torch.cat(scales))
        self._firsts: dict[tuple[int, int], int] = {}
        self._rows = [weight.codes.shape[0] for weight in weights]
        first = 0
        for rows in self._rows:
            part = self.part(first, rows)
            self._firsts[part.codes.data_ptr(), part.scales.data_ptr()] = first
            first += rows

    def part(self, first: int, rows: int) -> MXFP4Tensor:
        codes, scales = self.weight.codes, self.weight.scales
        return MXFP4Tensor(codes.narrow(0, first, rows), scales.narrow(0, first, rows))

    def first_of(self, codes: Tensor, scales: Tensor) -> int | None:
        """The first row of a linear that still has its slice; else None."""
        return self._firsts.get((codes.data_ptr(), scales.data_ptr()))

    def split(self, product: Tensor) -> dict[int, Tensor]:
        """The columns [..., N] of each linear, by its first row."""
        return dict(zip(self._firsts.values(), product.split(self._rows, -1), strict=True))


def join(linears: Sequence[Member]) -> Joined | None:
    """Join the weights of linears that read one input; None, and nothing is done, if one cannot."""
    weights = [weight for linear in linears if (weight := linear.joinable()) is not None]
    if len(weights) < max(2, len(linears)):
        return None
    joined, first = Joined(weights), 0
    for linear, weight in zip(linears, weights, strict=True):
        rows = weight.codes.shape[0]
        linear.adopt(joined.part(first, rows))
        first += rows
    return joined
