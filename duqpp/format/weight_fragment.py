"""Weights in the order in which the lanes of a warp multiply them; csrc/format/weight_fragment.h.

A permutation of words of eight codes, and of scale bytes, nothing padded; and behind the scales a
byte for each row, its largest exponent, which float8_e4m3fn values of the row are aligned to.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from duqpp.format.e8m0 import NAN_SCALE
from duqpp.format.mxfp4 import BLOCK_SIZE, MXFP4Tensor

TILE_ROWS = 16
SEGMENT_BLOCKS = 16
_LEAST_ALIGNED = 7  # as in csrc/format/expand.h: with it a row's power of two is a normal float32


def prepared_scales_size(rows: int, columns: int) -> int:
    """Bytes of the scales of a weight [rows, columns] in fragment order, row exponents included."""
    return rows * (columns // BLOCK_SIZE) + rows


def row_exponents(scales: Tensor) -> Tensor:
    """What rows of scales uint8 [N, K/32] are aligned to: uint8 [N]. A NaN has no say."""
    return torch.where(scales == NAN_SCALE, 0, scales).amax(-1).clamp_(min=_LEAST_ALIGNED)


def to_fragments(weight: MXFP4Tensor) -> MXFP4Tensor:
    """A row-major weight [N, K] in fragment order: scales uint8 [`prepared_scales_size`].

    Raises: ValueError when N is not a multiple of 8.
    """
    rows, columns = weight.shape
    if rows % 8:
        raise ValueError(
            f"prepare_weight: weight must have a multiple of 8 rows on this device, got {rows}; "
            "pad the weight with zero rows"
        )
    codes, scales = _in_words(weight.codes), weight.scales.reshape(rows, columns // BLOCK_SIZE)
    in_order = _by_tiles(codes, _codes_to_fragments), _by_tiles(scales, _scales_to_fragments)
    scales = torch.cat([in_order[1], row_exponents(scales)])
    return MXFP4Tensor(in_order[0].view(weight.codes.shape), scales)


def from_fragments(weight: MXFP4Tensor) -> MXFP4Tensor:
    """The inverse of `to_fragments`."""
    rows, columns = weight.shape
    scales = weight.scales[:-rows].view(rows, columns // BLOCK_SIZE)
    codes = _by_tiles(_in_words(weight.codes), _codes_from_fragments).view(weight.codes.shape)
    return MXFP4Tensor(codes, _by_tiles(scales, _scales_from_fragments).view(scales.shape))


def _in_words(codes: Tensor) -> Tensor:
    """Codes [rows, K/2] as words of four bytes: [rows, blocks, 4, 4]."""
    return codes.reshape(len(codes), codes.shape[1] * 2 // BLOCK_SIZE, 4, 4)


def _by_tiles(tensor: Tensor, reorder: Callable[[Tensor], Tensor]) -> Tensor:
    """Reorder the tiles of 16 rows [tiles, 16, ...], and the last one of 8: their bytes in turn."""
    whole = len(tensor) // TILE_ROWS * TILE_ROWS
    parts = tensor[:whole].unflatten(0, (-1, TILE_ROWS)), tensor[whole:].unsqueeze(0)
    return torch.cat([reorder(part).flatten() for part in parts if part.numel()])


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
