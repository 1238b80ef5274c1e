"""Plain torch on any device: the meaning of each op, which every other backend must equal."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, dequantize, quantize
from duqpp.ops.backend import Backend, Quantization, RMSNorm, SiluMul


class ReferenceBackend(Backend):
    """The backend that is always there."""

    name = "reference"

    def mxfp4_gemm(
        self, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        # Products of E2M1 values and power-of-two scales are exact in float32; only the sum rounds.
        product = dequantize(a) @ dequantize(b).T
        return (product if bias is None else product + bias.float()).to(out_dtype)

    def _unavailable(self, device: torch.device) -> str | None:
        return None

    def run_quantization(self, asked: Quantization) -> MXFP4Tensor:
        x = _before_rotation(asked.x, asked.prologue).float()
        rotated = x if asked.rotation is None else rotate_blocks(x, asked.rotation.float())
        return quantize(rotated, rule=asked.rule)


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
