"""Plain torch on any device: the meaning of each op, which every other backend must equal."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, quantize
from duqpp.format.e2m1 import decode_packed_e2m1
from duqpp.format.e8m0 import decode_e8m0
from duqpp.ops.backend import Backend, Quantization, RMSNorm, SiluMul

SEGMENT_BLOCKS = 16  # what is summed by itself along K; kSegmentBlocks of csrc/format/block_sum.h
_SUMS_AT_A_TIME = 2**22  # of one block each: 16 MB


class ReferenceBackend(Backend):
    """The backend that is always there."""

    name = "reference"

    def mxfp4_gemm(
        self, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        rows = max(1, _SUMS_AT_A_TIME // (SEGMENT_BLOCKS * max(1, b.shape[0])))
        parts = zip(a.codes.split(rows), a.scales.split(rows), strict=True)
        products = [_sum_of_blocks(MXFP4Tensor(*part), b) for part in parts]
        product = torch.cat(products)
        return (product if bias is None else product + bias.float()).to(out_dtype)

    def _unavailable(self, device: torch.device) -> str | None:
        return None

    def run_quantization(self, asked: Quantization) -> MXFP4Tensor:
        x = _before_rotation(asked.x, asked.prologue).float()
        rotated = x if asked.rotation is None else rotate_blocks(x, asked.rotation.float())
        return quantize(rotated, rule=asked.rule)


def _sum_of_blocks(a: MXFP4Tensor, b: MXFP4Tensor) -> Tensor:
    """a [M, K] times b [N, K] transposed, float32 [M, N], in the order of csrc/format/block_sum.h.

    A block's dot product is a multiple of 1/4 below 2**11, and exact in float32; so it is with its
    scales in float64. That and a float32 sum are more than 53 bits apart only where the smaller one
    is far below half a unit of the larger one, so that rounding twice is rounding once.
    """
    # The MPS device has no float64: there, what over- or underflows float32 is not exact.
    wide = torch.float32 if a.codes.device.type == "mps" else torch.float64
    a_values, b_values = (_by_blocks(decode_packed_e2m1(x.codes)) for x in (a, b))
    a_scales, b_scales = (decode_e8m0(x.scales).T.to(wide) for x in (a, b))  # [K/32, M], [K/32, N]
    total = a_scales.new_zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    for start in range(0, len(a_values), SEGMENT_BLOCKS):
        blocks = range(start, min(start + SEGMENT_BLOCKS, len(a_values)))
        dots = a_values[start : blocks.stop] @ b_values[start : blocks.stop].mT
        segment = torch.zeros_like(total)
        for dot, block in zip(dots, blocks, strict=True):
            term = dot.to(wide) * (a_scales[block, :, None] * b_scales[block])
            segment = (segment + term).float()
        total += segment
    return total


def _by_blocks(values: Tensor) -> Tensor:
    """[rows, K] as [K/32, rows, 32]."""
    return values.unflatten(-1, (-1, BLOCK_SIZE)).transpose(0, 1)


def _before_rotation(x: Tensor, prologue: RMSNorm | SiluMul | None) -> Tensor:
    """What is rotated, in the dtype of x: computed in float32 and rounded once."""
    match prologue:
        case None:
            return x
        case SiluMul(up):
            return (silu(x.float()) * up.float()).to(x.dtype)
        case RMSNorm(weight, epsilon):
            wide = x.float()
            normed = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
            return (normed if weight is None else normed * weight.float()).to(x.dtype)


def rotate_blocks(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply each 32-wide block of x by a matrix from the right.

    Args:
        x: [..., K], K a multiple of 32.
        rotation: [32, 32] for every block, or [K/32, 32, 32]; dtype of x.
    Returns: [..., K], dtype of x.
    """
    if rotation.dim() == 2:
        return (x.unflatten(-1, (-1, BLOCK_SIZE)) @ rotation).flatten(-2)
    blocks = x.reshape(-1, rotation.shape[0], BLOCK_SIZE).transpose(0, 1)  # [K/32, M, 32]
    return torch.bmm(blocks, rotation).transpose(0, 1).reshape(x.shape)
