"""Channels that calibration leaves silent: what GPTQ and the drift must not do to their weights.

GPTQ moves the error of a weight into directions that H says cost nothing. A direction that no
calibration token excites costs nothing there, but other text may excite it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE

_SILENT = 2.0**-10  # of the median channel's largest magnitude
# Energy of a silent direction in H, over the mean of all. On a tiny model, in the bases of
# hadamard, duquant, duquant++ and duqpp, with 1 or 16 silent channels of each 32 or a silent block:
# without any, GPTQ cost the silent channels' weights up to 5 times what rounding to nearest costs
# them, with 0.4 up to 1.25 times, with 1 up to 1.02, with 2 up to 1. The outputs' error rose with 2
# from 0.096 to 0.112 at most, and with 4 to 0.122, where rounding to nearest gave 0.124.
_SHARE = 1.5
# Second moment of a silent channel, over the mean of its block, where a basis is balanced. Without
# any, that basis cost the weights of partly silent blocks 0.42 to 0.44 of their size, with 0.3
# 0.13, with 1 0.11; the outputs' error went from 0.106 and 0.094 to 0.107 and 0.108 with 1.
_MOMENT = 0.5
_ROWS_AT_A_TIME = 1024


def silent_channels(amax: Tensor) -> Tensor:
    """Indices, int64, of the channels that calibration excites not at all, or next to nothing.

    Args: amax: float [K], the largest magnitude of each channel.
    """
    used = amax[amax > 0]
    if not len(used):
        return torch.arange(len(amax), device=amax.device)
    return (amax <= _SILENT * used.median()).nonzero().flatten()


def directions(
    silent: Tensor, channels: int, apply: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Part by part, silent channels and what a 1 in each alone becomes: int64 [n], float32 [n, K].

    Args: silent: int64. channels: K. apply: the input transform, x -> x T for rows float32 [n, K].
    """
    for part in silent.split(_ROWS_AT_A_TIME):
        rows = torch.zeros(len(part), channels, dtype=torch.float32, device=part.device)
        rows[torch.arange(len(part), device=part.device), part] = 1.0
        yield part, apply(rows)


def excite_silent(hessian: Tensor, silent: Tensor, apply: Callable[[Tensor], Tensor]) -> None:
    """Add to H, in place, a token for each silent channel that excites it alone.

    Args: hessian: float32 [K, K], in the basis that `apply` leads to. silent, apply: as above.
    """
    energy = _SHARE * hessian.diagonal().double().mean().float()
    for _, rows in directions(silent, len(hessian), apply):
        rows = rows / rows.norm(dim=1, keepdim=True)
        hessian.addmm_(rows.T * energy, rows)


def with_silent_excited(moments: Tensor, silent: Tensor) -> Tensor:
    """Second moments of blocks, [K/32, 32, 32], as if each silent channel had its block's mean.

    Args: silent: int64, indices of channels.
    """
    means = moments.diagonal(dim1=1, dim2=2).mean(1)  # [K/32]
    block, channel = silent // BLOCK_SIZE, silent % BLOCK_SIZE
    excited = moments.clone()
    excited[block, channel, channel] += _MOMENT * means[block]
    return excited


def without_silent(
    change: Tensor,
    silent: Tensor,
    apply: Callable[[Tensor], Tensor],
    fold: Callable[[Tensor], Tensor],
) -> Tensor:
    """A change of folded weights, float32 [N, K], without what it does to silent channels.

    Args: silent, apply: as above. fold: W -> W T^-T for W [N, K], the weights' side of `apply`.
    """
    moved = torch.zeros_like(change)
    for part, rows in directions(silent, change.shape[1], apply):
        moved[:, part] = change @ rows.T
    return change - fold(moved).float()
