"""GPTQ's inner loop: round the 32 columns of a block in turn, each error changing those behind it.

Not among the public ops: it is what `duqpp.calibration.gptq` is made of. Here is its definition, in
torch, which the kernels equal byte for byte.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE, ScaleRule
from duqpp.format.e2m1 import decode_e2m1, encode_e2m1, pack_e2m1
from duqpp.format.e8m0 import decode_e8m0, inverse_scale
from duqpp.format.mxfp4 import block_scales


class GptqBlock(NamedTuple):
    """codes: uint8 [N, 16], two a byte. scales: uint8 [N].

    compensated: float32 [N, 32], what each value was rounded from. rounded: float32 [N, 32], what
    codes and scales mean.
    """

    codes: Tensor
    scales: Tensor
    compensated: Tensor
    rounded: Tensor


def gptq_block(values: Tensor, factor: Tensor | None, rule: ScaleRule) -> GptqBlock:
    """Round a block of 32 columns, of which column j is rounded from

        compensated_j = values_j - sum over i < j of (compensated_i - rounded_i) * factor[i, j].

    Terms are subtracted in the order of i, every product and every difference rounded to float32:
    no multiply-add is fused, so that each device computes the same bytes. Scales are chosen from
    `values`.

    Args:
        values: float32 [N, 32], finite.
        factor: float32 [32, 32], of which what is above the diagonal is read; None is zero, so that
            values are rounded to nearest.
        rule: how a block's exponent is chosen.
    """
    scales = block_scales(values, rule)
    scale, inverse = decode_e8m0(scales), inverse_scale(scales)
    # [32, N]: a column is contiguous. Not `contiguous`, which of one row makes no copy.
    columns = values.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    rounded = torch.empty_like(columns)
    for j in range(BLOCK_SIZE):
        codes[j] = encode_e2m1(columns[j] * inverse)
        rounded[j] = decode_e2m1(codes[j]) * scale
        if factor is not None:
            columns[j + 1 :] -= (columns[j] - rounded[j]) * factor[j, j + 1 :, None]
    packed = pack_e2m1(codes.T.contiguous())
    return GptqBlock(packed, scales, columns.T.contiguous(), rounded.T.contiguous())
