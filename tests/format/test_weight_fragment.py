"""Fragment order in Python is that of the C++ header, and is undone by its inverse."""

import pytest
import torch

from duqpp.format import MXFP4Tensor
from duqpp.format.weight_fragment import SEGMENT_BLOCKS, from_fragments, to_fragments
from tests import inputs, oracle
from tests.cuda.library import extension

SHAPES = [(8, 32), (16, 64), (24, 96), (40, 544), (48, 1024), (56, 1120)]


def random_weight(n: int, k: int) -> MXFP4Tensor:
    generator = inputs.generator(n + k)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator).byte()
    return MXFP4Tensor(codes, torch.randint(0, 256, (n, k // 32), generator=generator).byte())


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_fragment_order_is_that_of_the_header(n, k):
    library, weight = extension(), random_weight(n, k)
    prepared = to_fragments(weight)
    assert prepared.codes.shape == weight.codes.shape
    assert prepared.scales.shape == weight.scales.shape
    place = [library.fragment_nibble_offset(r, c, n, k) for r in range(n) for c in range(k)]
    actual = nibbles(prepared.codes.flatten())[place].view(n, k)
    oracle.assert_same(actual, nibbles(weight.codes), "codes")
    place = [library.fragment_scale_offset(r, b, n, k) for r in range(n) for b in range(k // 32)]
    oracle.assert_same(prepared.scales.flatten()[place].view(n, -1), weight.scales, "scales")


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_inverse_restores_every_byte(n, k):
    weight = random_weight(n, k)
    restored = from_fragments(to_fragments(weight))
    oracle.assert_same(restored.codes, weight.codes, "codes")
    oracle.assert_same(restored.scales, weight.scales, "scales")


def test_a_segment_is_what_sums_are_divided_into():
    # The scale of block 16 of a tile follows all of the first segment's.
    assert extension().fragment_scale_offset(0, SEGMENT_BLOCKS, 16, 1024) == 16 * SEGMENT_BLOCKS


def test_rows_that_fill_no_half_tile_are_refused():
    with pytest.raises(ValueError, match="multiple of 8 rows on this device, got 12"):
        to_fragments(MXFP4Tensor(*inputs.mxfp4_operand(12, 32, seed=1)))
