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
    assert prepared.scales.shape == (library.weight_scales_size(n, k, arch=80),)
    place = [library.fragment_nibble_offset(r, c, n, k) for r in range(n) for c in range(k)]
    actual = nibbles(prepared.codes.flatten())[place].view(n, k)
    oracle.assert_same(actual, nibbles(weight.codes), "codes")
    place = [library.fragment_scale_offset(r, b, n, k) for r in range(n) for b in range(k // 32)]
    oracle.assert_same(prepared.scales[place].view(n, -1), weight.scales, "scales")
    assert max(place) < n * (k // 32) == len(prepared.scales) - n


def test_behind_the_scales_is_what_each_row_is_aligned_to():
    """Its largest exponent but NaN; at least 7, so that 2**(e - 6) is a normal float32."""
    scales = torch.tensor([[3, 9, 4]] * 8).byte()
    scales[1], scales[2], scales[3, 1], scales[4] = 7, 0, 255, 255
    scales[5, 2], scales[6, 0] = 254, 200
    prepared = to_fragments(MXFP4Tensor(torch.zeros(8, 48).byte(), scales))
    assert prepared.scales[-8:].tolist() == [9, 7, 7, 7, 7, 254, 200, 9]


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
