"""The outlier-aware rotation of DuQuant++, built greedily from calibration activations.

Source: DuQuant++ (arXiv 2604.17789); the greedy step is DuQuant's (arXiv 2406.01721, section 3.2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE
from duqpp.rotation.basis import hadamard, random_orthogonal
from duqpp.rotation.block_rotation import BlockRotation, InputTransform
from duqpp.torch_state import single_thread

MAX_ROWS = 2048  # rows of 32 that one search keeps, see `_rows_that_may_peak`
_ROWS_AT_A_TIME = 2**16  # of x R when all rows are measured: 8 MB in float32


@dataclass(frozen=True)
class GreedyResult:
    """rotation: float64 [G, 32, 32]; peak_before, peak_after, steps (of the kept prefix): [G]."""

    rotation: Tensor
    peak_before: Tensor
    peak_after: Tensor
    steps: Tensor


def greedy_rotation(x: Tensor, generator: torch.Generator, *, max_steps: int = 256) -> GreedyResult:
    """Compose rotations that each spread the channel of the largest magnitude.

    Step k: d is the channel that holds the largest |X R_1 .. R_k-1|, and R_k = E_d M E_d, where E_d
    swaps channels 1 and d, and M = R~ Q spreads channel 1. R~ is orthogonal with a uniform first
    row, Q = diag(1, Q') with a fresh random orthogonal Q'. The prefix with the lowest peak is kept.

    Args:
        x: float32 [G, n, 32], n samples of G blocks that each get a rotation of their own.
        max_steps: longest prefix tried.
    Returns: GreedyResult.
    """
    mix = torch.zeros(
        max_steps, BLOCK_SIZE, BLOCK_SIZE, dtype=torch.float64, device=generator.device
    )
    mix[:, 0, 0] = 1.0
    mix[:, 1:, 1:] = random_orthogonal(BLOCK_SIZE - 1, generator, count=max_steps)
    steps = hadamard(BLOCK_SIZE, mix.device) @ mix  # [max_steps, 32, 32]

    with single_thread():
        found = _search(_rows_that_may_peak(x), steps.to(x.device))
    return _measured_on_all_rows(x, found)


def _search(x: Tensor, steps: Tensor) -> GreedyResult:
    """`greedy_rotation` over the rows x [G, m, 32] that count, with the matrices M of its steps."""
    groups = x.shape[0]
    identity = torch.eye(BLOCK_SIZE, dtype=torch.float64, device=x.device)
    rotation = identity.expand(groups, -1, -1)
    best = rotation.clone()
    peak, channel = _peak(x)
    peak_before, best_peak = peak, peak
    best_steps = torch.zeros(groups, dtype=torch.int64, device=x.device)
    for step, matrix in enumerate(steps, start=1):
        swapped = _swap_first(matrix, channel)  # [G, 32, 32]
        rotation = rotation @ swapped
        x = torch.bmm(x, swapped.to(x.dtype))
        peak, channel = _peak(x)
        better = peak < best_peak
        best[better] = rotation[better]
        best_peak = torch.minimum(peak, best_peak)
        best_steps[better] = step
    return GreedyResult(best, peak_before, best_peak, best_steps)


def outlier_aware(
    x: Tensor, generator: torch.Generator, *, per_block: bool, max_steps: int
) -> Tensor:
    """DuQuant++'s rotation for activations x float32 [n, K]: float64 [32, 32] or [K/32, 32, 32]."""
    samples = _as_groups(x, per_block=per_block)
    rotation = greedy_rotation(samples, generator, max_steps=max_steps).rotation
    return rotation if per_block else rotation[0]


def duquant_transform(
    x: Tensor, generator: torch.Generator, *, per_block: bool, max_steps: int
) -> InputTransform:
    """The original DuQuant at block size 32: rotation, zigzag permutation, rotation.

    Args: x: float32 [n, K] activations.
    Source: DuQuant (arXiv 2406.01721), section 3.
    """
    options = {"per_block": per_block, "max_steps": max_steps}
    first = BlockRotation.rounded(outlier_aware(x, generator, **options))
    rotated = first.apply(x)
    permutation = zigzag_permutation(rotated.abs().amax(0))
    second = outlier_aware(rotated[:, permutation.long()], generator, **options)
    return InputTransform(BlockRotation.rounded(second), first, permutation)


def zigzag_permutation(amax: Tensor) -> Tensor:
    """Deal channels, largest first, to the blocks in turn, forwards then backwards.

    Every block gets one channel of each stretch of K/32, so that no block holds many outliers.

    Args: amax: [K], largest magnitude of each channel.
    Returns: int32 [K], the source channel of each position.
    """
    blocks = amax.numel() // BLOCK_SIZE
    dealt = amax.argsort(descending=True, stable=True).view(BLOCK_SIZE, blocks)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.flatten().to(torch.int32)


def _as_groups(x: Tensor, *, per_block: bool) -> Tensor:
    """Activations [n, K] as the samples of each search: [1, n K/32, 32], or [K/32, n, 32]."""
    if per_block:
        return x.view(x.shape[0], -1, BLOCK_SIZE).transpose(0, 1)
    return x.reshape(1, -1, BLOCK_SIZE)


def _rows_that_may_peak(x: Tensor) -> Tensor:
    """The rows of x [G, n, 32] that can hold the peak under some rotation: [G, m, 32].

    A rotation keeps norms, so a row peaks at most at its norm, and the row of the largest norm at
    least at that norm / sqrt(32): rows with less norm than this never hold the peak. Of the others
    the `MAX_ROWS` of largest norm are kept, which bounds the time, and besides them the row that
    holds each channel's peak, so that the search starts from the outlier there is.
    """
    norms = x.norm(dim=-1)
    enough = (norms * BLOCK_SIZE**0.5 >= norms.amax(1, keepdim=True)).sum(1).max()
    kept = norms.topk(min(int(enough), MAX_ROWS), dim=1).indices
    if enough > MAX_ROWS:
        highest, lowest = x.max(1), x.min(1)
        above = highest.values >= -lowest.values
        kept = torch.cat((kept, torch.where(above, highest.indices, lowest.indices)), dim=1)
    return x.gather(1, kept[..., None].expand(-1, -1, BLOCK_SIZE))


def _measured_on_all_rows(x: Tensor, found: GreedyResult) -> GreedyResult:
    """The result with its peaks over every row of x [G, n, 32], not just those of the search.

    Where the rows left out make the rotation worse than none, none it is.
    """
    identity = torch.eye(BLOCK_SIZE, dtype=torch.float64, device=x.device)
    identity = identity.expand_as(found.rotation)
    before, after = _largest(x, identity), _largest(x, found.rotation)
    kept = after <= before
    return GreedyResult(
        torch.where(kept[:, None, None], found.rotation, identity),
        before,
        torch.minimum(after, before),
        torch.where(kept, found.steps, 0),
    )


def _largest(x: Tensor, rotation: Tensor) -> Tensor:
    """The largest magnitude of x R in each group, for x [G, n, 32] and R [G, 32, 32]: [G]."""
    parts = x.split(max(1, _ROWS_AT_A_TIME // len(x)), dim=1)
    return torch.stack([(p @ rotation.to(x.dtype)).abs().amax((1, 2)) for p in parts]).amax(0)


def _peak(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude of x [G, n, 32] in each group, and the channel that holds it: [G], [G]."""
    values, channels = x.abs().amax(1).max(1)
    return values, channels


def _swap_first(matrix: Tensor, channel: Tensor) -> Tensor:
    """E_d M E_d for M [32, 32] and each d of `channel` [G]: [G, 32, 32]."""
    groups = channel.numel()
    order = torch.arange(BLOCK_SIZE, device=channel.device).repeat(groups, 1)
    order[:, 0] = channel
    order[torch.arange(groups, device=channel.device), channel] = 0
    return matrix[order[:, :, None], order[:, None, :]]
