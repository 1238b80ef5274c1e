"""MXFP4 tensors, and the quantize and dequantize that every backend must equal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duqpp.format.e2m1 import decode_packed_e2m1, encode_e2m1, pack_e2m1
from duqpp.format.e8m0 import NAN_SCALE, ScaleRule, decode_e8m0, inverse_scale, scale_exponent

BLOCK_SIZE = 32  # OCP MX v1.0, section 5.2: consecutive values along K that share a scale


@dataclass(frozen=True)
class MXFP4Tensor:
    """A tensor [..., K] in MXFP4.

    codes: uint8 [..., K/2], two E2M1 codes a byte, the even column in the low nibble.
    scales: uint8, E8M0. Row-major [..., K/32] here; a backend may keep them in the layout that its
        GEMM reads (see `duqpp.ops`).
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """The logical shape [..., K]."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    @property
    def device(self) -> torch.device:
        """Where codes and scales are."""
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored: uint8."""
        return self.codes.dtype


def quantize(x: Tensor, *, rule: ScaleRule) -> MXFP4Tensor:
    """Round each block of 32 values along the last dimension to MXFP4.

    ``codes = encode_e2m1(x * 2**(127 - e))`` with e from the block's amax under `rule`.
    A block that is all zero has e = 0 and codes of (signed) zeros. A block with an infinity or a
    NaN has e = 255, so that it dequantizes to NaN; its codes carry no meaning.

    Args:
        x: floating point [..., K], K a multiple of 32; computed in float32.
        rule: how amax becomes the exponent.
    Returns: MXFP4Tensor [..., K] with row-major scales.
    Raises: ValueError when K is not a multiple of 32.
    Source: OCP MX v1.0, section 6.3 (conversion).
    """
    if x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"quantize: K must be a multiple of {BLOCK_SIZE}, got {x.shape[-1]}")
    blocks = x.float().unflatten(-1, (-1, BLOCK_SIZE))  # [..., K/32, 32]
    scales = block_scales(blocks, rule)
    return MXFP4Tensor(pack_e2m1(encode_blocks(blocks, scales).flatten(-2)), scales)


def dequantize(tensor: MXFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of an MXFP4 tensor with row-major scales, [..., K]; float32 and bfloat16 are exact."""
    values = decode_packed_e2m1(tensor.codes).unflatten(-1, (-1, BLOCK_SIZE))
    return (values * decode_e8m0(tensor.scales)[..., None]).flatten(-2).to(dtype)


def block_scales(blocks: Tensor, rule: ScaleRule) -> Tensor:
    """The scale of each block under a rule: float32 [..., 32] to uint8 [...]."""
    if rule == ScaleRule.MSE:
        return _least_error_scales(blocks)
    return scale_exponent(block_amax(blocks), rule)


def block_amax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each block: float32 [..., 32] to [...]; NaN wins."""
    return blocks.abs().amax(-1)


def encode_blocks(blocks: Tensor, scales: Tensor) -> Tensor:
    """Unpacked codes uint8 [..., 32] of float32 blocks [..., 32] under scales uint8 [...]."""
    return encode_e2m1(blocks * inverse_scale(scales)[..., None])


def _least_error_scales(blocks: Tensor) -> Tensor:
    """Scales uint8 [...] under `ScaleRule.MSE`: floor, or floor + 1 where its error is smaller."""
    floor = scale_exponent(block_amax(blocks), ScaleRule.FLOOR)
    above = torch.where(floor == NAN_SCALE, floor, floor + 1)
    scaled = blocks * inverse_scale(floor)[..., None]
    low = _rounded(scaled).double()
    high = _rounded(scaled * 0.5).double() * 2
    # (high - scaled)**2 - (low - scaled)**2, factored: each term fits 33 bits, so that the sum is
    # exact in any order, and equal errors are seen to be equal.
    change = ((high - low) * (high + low - 2 * scaled.double())).sum(-1)
    return torch.where(change < 0, above, floor)


def _rounded(scaled: Tensor) -> Tensor:
    """The E2M1 values nearest to float32 [..., 32]."""
    return decode_packed_e2m1(pack_e2m1(encode_e2m1(scaled)))
