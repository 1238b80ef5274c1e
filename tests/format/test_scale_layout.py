"""The swizzled scale layout, against loops over tiles that write it byte after byte."""

import pytest
import torch

from duqpp.format.scale_layout import (
    swizzle_scales,
    swizzled_offset,
    swizzled_size,
    unswizzle_scales,
)
from tests import inputs, oracle

ROWS = (*inputs.AWKWARD_ROWS, 32, 33, 257)
BLOCKS = (1, 3, 4, 5, 7, 8, 128, 129)


def random_scales(rows: int, blocks: int) -> torch.Tensor:
    # From 1, so that padding (0) is told from payload.
    return torch.randint(1, 256, (rows, blocks), generator=inputs.generator(rows + blocks)).byte()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_swizzle_equals_the_loops(rows, blocks):
    scales = random_scales(rows, blocks)
    swizzled = swizzle_scales(scales)
    expected = oracle.swizzle(scales)
    assert swizzled_size(rows, blocks) == expected.size
    oracle.assert_same(swizzled, expected, f"swizzle_scales {rows} x {blocks}")
    assert int((swizzled == 0).sum()) == expected.size - rows * blocks  # padding bytes are 0


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_unswizzle_inverts_swizzle_and_ignores_padding(rows, blocks):
    scales = random_scales(rows, blocks)
    swizzled = swizzle_scales(scales)
    swizzled[swizzled == 0] = 255
    oracle.assert_same(
        unswizzle_scales(swizzled, rows, blocks), scales, f"unswizzle_scales {rows} x {blocks}"
    )


@pytest.mark.parametrize("blocks", BLOCKS)
def test_offset_is_a_bijection_onto_its_image(blocks):
    rows = 257
    row, block = torch.arange(rows)[:, None], torch.arange(blocks)[None, :]
    offsets = swizzled_offset(row, block, blocks)
    assert offsets.dtype == torch.int64
    assert offsets.unique().numel() == rows * blocks
    assert offsets.min() == 0
    assert offsets.max() < swizzled_size(rows, blocks)
    for r, b in [(0, 0), (31, blocks - 1), (130, blocks // 2), (256, blocks - 1)]:
        assert swizzled_offset(r, b, blocks) == offsets[r, b].item()


@pytest.mark.parametrize(
    ("row", "block", "offset"),
    [
        (0, 1, 1),  # the four blocks of a row are adjacent
        (32, 0, 4),  # then the row 32 below
        (96, 3, 15),
        (1, 0, 16),
        (127, 3, 511),
        (0, 4, 512),  # the next tile is along K
        (128, 0, 1024),  # two tiles cover 5 blocks, then the next 128 rows
    ],
)
def test_worked_offsets(row, block, offset):
    assert swizzled_offset(row, block, 5) == offset


def test_offsets_beyond_32_bits():
    row, block, blocks = 2**26 + 77, 100, 448
    expected = ((row // 128) * 112 + 25) * 512 + (row % 32) * 16 + (row // 32 % 4) * 4
    assert expected > 2**32
    assert swizzled_offset(row, block, blocks) == expected
    assert swizzled_offset(torch.tensor(row), torch.tensor(block), blocks).item() == expected


def test_swizzle_of_a_transposed_tensor():
    scales = random_scales(40, 130)
    oracle.assert_same(swizzle_scales(scales.T), oracle.swizzle(scales.T), "transposed scales")


@pytest.mark.parametrize("size", [0, 511, 513, 1024])
def test_unswizzle_of_a_wrong_size(size):
    with pytest.raises(ValueError, match=r"^unswizzle_scales: .*512.*100.*3"):
        unswizzle_scales(torch.zeros(size, dtype=torch.uint8), 100, 3)
