"""rotate_blocks: x R for each block of 32, in whatever shape x has."""

import pytest
import torch

from duqpp.ops.reference import rotate_blocks
from tests import inputs, oracle


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Of at most 8, so that sums of 32 products are exact in float64 in any order."""
    return torch.randint(-8, 9, shape, generator=inputs.generator(seed)).double()


@pytest.mark.parametrize("shape", [(32,), (5, 96), (2, 3, 64), (0, 32)])
@pytest.mark.parametrize("per_block", [False, True])
def test_rotate_blocks_of_any_shape(shape, per_block):
    blocks = shape[-1] // 32
    x = integers(*shape, seed=0)
    rotation = integers(blocks, 32, 32, seed=1) if per_block else integers(32, 32, seed=1)
    expected = torch.empty(shape, dtype=torch.float64)
    for block in range(blocks):
        columns = slice(32 * block, 32 * block + 32)
        expected[..., columns] = x[..., columns] @ (rotation[block] if per_block else rotation)
    oracle.assert_same(rotate_blocks(x, rotation), expected, f"x R, {shape}")
