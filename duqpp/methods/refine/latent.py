"""Latent weights: float32 values that a linear rounds to MXFP4 in every forward pass.

Rounding has no gradient, so the backward pass takes it for the identity (straight-through). What
is trained decides which codes are chosen; the transform of the input stays as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duqpp.format import MXFP4Tensor, ScaleRule, dequantize
from duqpp.models.family import LinearGroup
from duqpp.nn import MXFP4Linear
from duqpp.ops import quantize
from duqpp.ops.reference import rotate_blocks
from duqpp.placement import HOST


class _RoundStraightThrough(torch.autograd.Function):
    """Forward: to MXFP4 and back. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: ScaleRule, dtype: torch.dtype) -> Tensor:
        return dequantize(quantize(x.contiguous(), rule=rule), dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.float(), None, None


def round_straight_through(
    x: Tensor, rule: ScaleRule, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of x float32 [..., K] in MXFP4; its gradient is that of the identity.

    Args: dtype: of the result, float32 or bfloat16, both of which hold the values as they are.
    """
    return _RoundStraightThrough.apply(x, rule, dtype)


def product_dtype(device: torch.device) -> torch.dtype:
    """What rounded weights and inputs are multiplied in.

    On GPUs bfloat16: it holds their values as they are, the sums are float32, and only the results
    and the gradients are rounded. What is trained stays float32 everywhere.
    """
    return torch.float32 if device.type == HOST.type else torch.bfloat16


class RoundedInput:
    """Rotates and rounds what the linears of a group read, once for all that read one tensor.

    Args:
        rotation: [32, 32] or [K/32, 32, 32]; or what gives it anew for each input.
        rule: scale rule of the input.
        readers: linears in the group. When the last one has read an input it is let go of, and
            the graph behind it with it.
        dtype: of what they read.
    """

    def __init__(
        self,
        rotation: Tensor | Callable[[], Tensor] | None,
        rule: ScaleRule,
        readers: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._rotation = rotation.detach().float() if isinstance(rotation, Tensor) else rotation
        self._rule, self.dtype = rule, dtype
        self._readers, self._reads = readers, 0
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] to `dtype` [..., K] with a straight-through gradient."""
        if self._last is None or self._last[0] is not x:
            y = x.float()
            if self._rotation is not None:
                given = isinstance(self._rotation, Tensor)
                y = rotate_blocks(y, self._rotation if given else self._rotation())
            self._last, self._reads = (x, round_straight_through(y, self._rule, self.dtype)), 0
        rounded = self._last[1]
        self._reads += 1
        if self._reads == self._readers:
            self._last = None
        return rounded


class LatentLinear(nn.Module):
    """In the place of an MXFP4Linear: the same function, with a weight that can be trained.

    Args:
        linear: what it stands for; it is kept aside, unchanged, and only its bias is read.
        latent: float32 [N, K], in the basis of the folded weight.
        rounded_input: shared by the linears of a group.
        rule: scale rule of the weight.
    """

    def __init__(
        self, linear: MXFP4Linear, latent: Tensor, rounded_input: RoundedInput, rule: ScaleRule
    ) -> None:
        super().__init__()
        self.latent = nn.Parameter(latent.to(linear.weight_packed.device, copy=True))
        self.rounded_input, self._rule = rounded_input, rule
        self._linear: tuple[MXFP4Linear, ...] = (linear,)  # in a tuple: it is no part of this
        self._bias = None if linear.bias is None else linear.bias.detach().float()

    @property
    def linear(self) -> MXFP4Linear:
        """What this stands for."""
        return self._linear[0]

    def forget_linear(self) -> None:
        """Let go of what this stands for, with its codes, where it will not be put back."""
        self._linear = ()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in the dtype of x."""
        rounded = self.rounded_input(x)
        y = F.linear(rounded, round_straight_through(self.latent, self._rule, rounded.dtype))
        return (y if self._bias is None else y + self._bias).to(x.dtype)


def to_latents(
    block: nn.Module,
    groups: Sequence[LinearGroup],
    latents: Mapping[str, Tensor],
    *,
    rule: ScaleRule,
) -> dict[str, nn.Parameter]:
    """Swap in a LatentLinear for every quantized linear of a decoder block.

    Args:
        groups: the quantized groups of the block. latents: float32 [N, K] by linear.
    Returns: what can be trained, by linear.
    """
    parameters = {}
    for group in groups:
        first = block.get_submodule(group.linears[0])
        dtype = product_dtype(first.weight_packed.device)
        rounded_input = RoundedInput(first.rotation, first.rule, len(group.linears), dtype)
        for name in group.linears:
            linear = LatentLinear(block.get_submodule(name), latents[name], rounded_input, rule)
            block.set_submodule(name, linear)
            parameters[name] = linear.latent
    return parameters


def to_codes(
    block: nn.Module, groups: Sequence[LinearGroup], weights: Mapping[str, MXFP4Tensor] | None
) -> None:
    """Undo `to_latents`: the quantized linears come back, with these weights or as they were.

    Args: weights: [N, K], row-major scales, by linear.
    """
    for group in groups:
        for name in group.linears:
            latent = block.get_submodule(name)
            if weights is not None:
                latent.linear.replace_weight(weights[name])
            block.set_submodule(name, latent.linear)
