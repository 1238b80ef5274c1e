"""E8M0, the block scale of MXFP4, and the rules that choose it from a block's amax.

A byte e means 2**(e - 127); 255 is NaN. Source: OCP MX v1.0, section 5.4.1.
"""

import enum

import torch
from torch import Tensor

NAN_SCALE = 255
_INFINITY_BITS = 0x7F800000


class ScaleRule(enum.StrEnum):
    """How the largest magnitude of a block becomes its exponent.

    floor: 2**(floor(log2 amax) - 2), amax/scale in [4, 8); OCP MX v1.0 section 6.3, torchao FLOOR.
    even: amax is rounded to E2M1 precision first, amax/scale in [3.5, 7); compressed-tensors.
    ceil: 2**ceil(log2(amax / 6)), amax/scale in (3, 6], never saturates; FlashInfer, torchao RCEIL.
    mse: per block the better of the floor exponent and the next one, by squared error.
    """

    FLOOR = "floor"
    EVEN = "even"
    CEIL = "ceil"
    MSE = "mse"


# Added to the bits of a float32 amax so that its exponent field steps up where the rule says:
# the significand reaches 1.75 (even: 2**23 - 0x600000), or just exceeds 1.5 (ceil: 2**22 - 1).
_ADDENDS = {ScaleRule.FLOOR: 0, ScaleRule.EVEN: 0x200000, ScaleRule.CEIL: 0x3FFFFF}


def scale_exponent(amax: Tensor, rule: ScaleRule) -> Tensor:
    """Biased exponent of a block: ``max(0, ((bits(amax) + ADD) >> 23) - 2)``, by integers alone.

    Args:
        amax: float32, non-negative, any shape; the largest magnitude of each block.
        rule: floor, even or ceil.
    Returns: uint8 of the same shape; 0 for amax 0, 255 for infinite or NaN amax, else at most 253.
    Raises: ValueError for `ScaleRule.MSE`, which needs the block's values and not just their amax.
    """
    if rule not in _ADDENDS:
        raise ValueError(f"scale_exponent: rule must be floor, even or ceil, got {rule}")
    bits = amax.view(torch.int32) & 0x7FFFFFFF
    exponent = (((bits + _ADDENDS[rule]) >> 23) - 2).clamp_(min=0)
    return exponent.masked_fill_(bits >= _INFINITY_BITS, NAN_SCALE).to(torch.uint8)


def decode_e8m0(scales: Tensor) -> Tensor:
    """Values of scale bytes: uint8 of any shape to float32; 0 is the subnormal 2**-127, 255 NaN."""
    exponent = scales.int()
    bits = (exponent << 23).masked_fill_(exponent == 0, 0x00400000)
    return bits.masked_fill_(exponent == NAN_SCALE, 0x7FC00000).view(torch.float32)


def inverse_scale(scales: Tensor) -> Tensor:
    """The exact factor 2**(127 - e) that brings a block onto the E2M1 grid.

    Args:
        scales: uint8, any shape, values up to 253; 254 and 255 give the factor of 253.
    Returns: float32 of the same shape, always a normal number.
    """
    return ((254 - scales.int().clamp(max=253)) << 23).view(torch.float32)
