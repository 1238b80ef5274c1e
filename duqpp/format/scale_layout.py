"""The swizzled scale layout that block-scaled tensor cores (sm_100, 103, 120) read.

Scales of 128 rows x 4 blocks form a tile of 512 bytes; tiles run along K first. Inside a tile the
four blocks of a row are adjacent, and rows r, r+32, r+64, r+96 are adjacent 4-byte words. Rows are
padded to 128 and blocks to 4; padding bytes are 0, because the hardware reads them (255 is NaN).
Source: PTX ISA, tcgen05.mma block scaling; CUTLASS Sm1xxBlockScaledConfig<32>.
"""

from typing import TypeVar

import torch
from torch import Tensor

TILE_ROWS = 128
TILE_BLOCKS = 4
_TILE_BYTES = TILE_ROWS * TILE_BLOCKS

_Index = TypeVar("_Index", int, Tensor)


def swizzled_size(rows: int, blocks_per_row: int) -> int:
    """Bytes of the swizzled buffer for [rows, blocks_per_row] scales, padding included."""
    return -(-rows // TILE_ROWS) * -(-blocks_per_row // TILE_BLOCKS) * _TILE_BYTES


def swizzled_offset(row: _Index, block: _Index, blocks_per_row: int) -> _Index:
    """Byte offset of the scale of (row, block); ints, or int64 tensors that broadcast."""
    tile = (row >> 7) * -(-blocks_per_row // TILE_BLOCKS) + (block >> 2)
    return tile * _TILE_BYTES + (row & 31) * 16 + ((row >> 5) & 3) * 4 + (block & 3)


def swizzle_scales(scales: Tensor) -> Tensor:
    """Row-major scales, uint8 [rows, blocks], to the swizzled layout, uint8 [swizzled_size]."""
    rows, blocks = scales.shape
    swizzled = scales.new_zeros(swizzled_size(rows, blocks))
    swizzled[_offsets(rows, blocks, scales.device)] = scales
    return swizzled


def unswizzle_scales(swizzled: Tensor, rows: int, blocks_per_row: int) -> Tensor:
    """The inverse of `swizzle_scales`: uint8 [swizzled_size] to uint8 [rows, blocks_per_row].

    Raises: ValueError when the buffer does not have `swizzled_size` bytes.
    """
    expected = swizzled_size(rows, blocks_per_row)
    if swizzled.shape != (expected,):
        raise ValueError(
            f"unswizzle_scales: buffer must be [{expected}] for {rows} rows of {blocks_per_row} "
            f"blocks, got {list(swizzled.shape)}"
        )
    return swizzled[_offsets(rows, blocks_per_row, swizzled.device)]


def _offsets(rows: int, blocks_per_row: int, device: torch.device) -> Tensor:
    row = torch.arange(rows, device=device)[:, None]
    block = torch.arange(blocks_per_row, device=device)[None, :]
    return swizzled_offset(row, block, blocks_per_row)  # int64 [rows, blocks_per_row]
