"""Plain torch on any device: the meaning of each op, which every other backend must equal."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize, quantize

OPS = ("rotate_quantize", "mxfp4_gemm")


class ReferenceBackend:
    """The backend that is always there: see `duqpp.ops.dispatch.Backend` for the contract."""

    name = "reference"

    def unavailable_reason(self, op: str, device: torch.device) -> str | None:
        return None if op in OPS else f"no op named {op}"

    def scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return rows, columns // BLOCK_SIZE

    def weight_scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return rows, columns // BLOCK_SIZE

    def rotate_quantize(self, x: Tensor, rotation: Tensor | None, rule: ScaleRule) -> MXFP4Tensor:
        rotated = x.float() if rotation is None else rotate_blocks(x.float(), rotation.float())
        return quantize(rotated, rule=rule)

    def rmsnorm_rotate_quantize(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        epsilon: float,
        rotation: Tensor | None,
        rule: ScaleRule,
    ) -> MXFP4Tensor:
        dtype, x = x.dtype, x.float()
        normed = x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        if norm_weight is not None:
            normed = normed * norm_weight.float()
        return self.rotate_quantize(normed.to(dtype), rotation, rule)

    def silu_mul_rotate_quantize(
        self, gate: Tensor, up: Tensor, rotation: Tensor | None, rule: ScaleRule
    ) -> MXFP4Tensor:
        activated = silu(gate.float()) * up.float()
        return self.rotate_quantize(activated.to(gate.dtype), rotation, rule)

    def prepare_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        return weight

    def restore_weight(self, weight: MXFP4Tensor) -> MXFP4Tensor:
        return weight

    def mxfp4_gemm(
        self, a: MXFP4Tensor, b: MXFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        # Products of E2M1 values and power-of-two scales are exact in float32; only the sum rounds.
        product = dequantize(a) @ dequantize(b).T
        return (product if bias is None else product + bias.float()).to(out_dtype)

    def mxfp4_linear(
        self,
        x: Tensor,
        rotation: Tensor | None,
        rule: ScaleRule,
        weight: MXFP4Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        return self.mxfp4_gemm(self.rotate_quantize(x, rotation, rule), weight, bias, x.dtype)


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
