"""Weights in the order in which the lanes of a warp multiply them; csrc/format/weight_fragment.h.

A permutation of words of eight codes, and of scale bytes: the same sizes, nothing padded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from duqpp.format.mxfp4 import BLOCK_SIZE, MXFP4Tensor

TILE_ROWS = 16
SEGMENT_BLOCKS = 16


def to_fragments(weight: MXFP4Tensor) -> MXFP4Tensor:
    """A row-major weight [N, K] in fragment order.

    Raises: ValueError when N is not a multiple of 8.
    """
    return _by_tiles(weight, _codes_to_fragments, _scales_to_fragments)


def from_fragments(weight: MXFP4Tensor) -> MXFP4Tensor:
    """The inverse of `to_fragments`."""
    return _by_tiles(weight, _codes_from_fragments, _scales_from_fragments)


_Reorder = Callable[[Tensor], Tensor]


def _by_tiles(
    weight: MXFP4Tensor, reorder_codes: _Reorder, reorder_scales: _Reorder
) -> MXFP4Tensor:
    """Reorder the tiles of 16 rows, and the last one of 8, each in its own place."""
    rows, columns = weight.shape
    if rows % 8:
        raise ValueError(
            f"prepare_weight: weight must have a multiple of 8 rows on this device, got {rows}; "
            "pad the weight with zero rows"
        )
    whole = rows // TILE_ROWS * TILE_ROWS
    # Words of four bytes, [tiles, rows, blocks, 4, 4]; scales [tiles, rows, blocks].
    blocks = columns // BLOCK_SIZE
    codes = weight.codes.reshape(rows, blocks, 4, 4)
    scales = weight.scales.reshape(rows, blocks)

    def in_parts(tensor: Tensor, reorder: _Reorder) -> Tensor:
        parts = tensor[:whole].unflatten(0, (-1, TILE_ROWS)), tensor[whole:].unsqueeze(0)
        return torch.cat([reorder(part).flatten() for part in parts if part.numel()])

    return MXFP4Tensor(
        in_parts(codes, reorder_codes).view(weight.codes.shape),
        in_parts(scales, reorder_scales).view(weight.scales.shape),
    )


def _codes_to_fragments(codes: Tensor) -> Tensor:
    tiles, rows, blocks = codes.shape[:3]
    paired = blocks // 2 * 2

    def order(part: Tensor, in_pair: int) -> Tensor:
        # [tiles, half, r, pairs, block, q, 4] to [tiles, pairs, r, q, block, half, 4]
        split = part.reshape(tiles, rows // 8, 8, -1, in_pair, 4, 4)
        return split.permute(0, 3, 2, 5, 4, 1, 6).flatten(1)

    return torch.cat([order(codes[:, :, :paired], 2), order(codes[:, :, paired:], 1)], dim=1)


def _codes_from_fragments(codes: Tensor) -> Tensor:
    tiles, rows, blocks = codes.shape[:3]
    flat, paired = codes.flatten(1), blocks // 2 * 2

    def restore(part: Tensor, in_pair: int) -> Tensor:
        split = part.reshape(tiles, -1, 8, 4, in_pair, rows // 8, 4)
        return split.permute(0, 5, 2, 1, 4, 3, 6).reshape(tiles, rows, -1, 4, 4)

    end = rows * paired * 16
    return torch.cat([restore(flat[:, :end], 2), restore(flat[:, end:], 1)], dim=2)


def _scales_to_fragments(scales: Tensor) -> Tensor:
    segments = scales.split(SEGMENT_BLOCKS, dim=2)
    return torch.cat([segment.flatten(1) for segment in segments], dim=1)


def _scales_from_fragments(scales: Tensor) -> Tensor:
    tiles, rows, blocks = scales.shape
    sizes = [len(part) for part in torch.arange(blocks).split(SEGMENT_BLOCKS)]
    segments = scales.flatten(1).split([rows * size for size in sizes], dim=1)
    return torch.cat([part.reshape(tiles, rows, -1) for part in segments], dim=2)
