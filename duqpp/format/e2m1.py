"""E2M1, the 4-bit element of MXFP4: sign, two exponent bits, one mantissa bit.

A code is ``sign << 3 | index`` with the magnitude at ``index`` in {0, .5, 1, 1.5, 2, 3, 4, 6}.
Source: OCP MX v1.0, section 5.3.3.
"""

import torch
from torch import Tensor

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest E2M1 value: ties to the even code, magnitudes above 6 saturate.

    Args:
        x: float32, any shape. NaN has no code of its own (its block's scale says NaN).
    Returns: uint8 codes 0..15 of the same shape; -0.0 and what rounds to it keep the sign bit.
    """
    # The midpoints of the grid. A tie goes to the even code, so the comparisons alternate: a
    # midpoint above an even code stays down (>), above an odd one goes up (>=).
    magnitude = x.abs()
    codes = (magnitude > 0.25).to(torch.uint8)
    codes += magnitude >= 0.75
    codes += magnitude > 1.25
    codes += magnitude >= 1.75
    codes += magnitude > 2.5
    codes += magnitude >= 3.5
    codes += magnitude > 5.0
    return codes | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Values of codes: uint8 0..15 of any shape to float32."""
    return _VALUES.to(codes.device)[codes.int()]


def pack_e2m1(codes: Tensor) -> Tensor:
    """Two codes a byte, the even column in the low nibble: uint8 [..., K] to uint8 [..., K/2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The inverse of `pack_e2m1`: uint8 [..., K/2] to uint8 [..., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_packed_e2m1(packed: Tensor) -> Tensor:
    """Equals ``decode_e2m1(unpack_e2m1(packed))``: uint8 [..., K/2] to float32 [..., K]."""
    # One look-up a byte: both values of a byte travel as one 8-byte element.
    pairs = _BYTE_VALUES.to(packed.device).index_select(0, packed.reshape(-1).int())
    return pairs.view(torch.float32).view(*packed.shape[:-1], packed.shape[-1] * 2)


_MAGNITUDES = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float32, device="cpu")
_VALUES = torch.cat((_MAGNITUDES, -_MAGNITUDES))  # [16]
_BYTES = torch.arange(256, dtype=torch.uint8, device="cpu")
_BYTE_VALUES = _VALUES[unpack_e2m1(_BYTES[:, None]).int()].view(torch.float64).flatten()  # [256]
