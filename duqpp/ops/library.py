"""The ops in torch's dispatcher (namespace `duqpp`): fake implementations and autograd rules.

Tensors cross as plain codes and scales, so that torch.compile, CUDA graphs and C++ see ordinary
tensors. Arguments are checked in `duqpp.ops`, before these are called.
"""

from typing import Any

import torch
from torch import Tensor

from duqpp.format import MXFP4Tensor, ScaleRule, dequantize
from duqpp.ops.backend import Backend
from duqpp.ops.dispatch import select, select_shapes
from duqpp.ops.reference import rotate_blocks

_PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack  # how many trace, fake, count
_transforms = torch._C._functorch.peek_interpreter_stack  # of torch.func


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors may go straight to its backend, past torch's dispatcher.

    So it may where nothing watches: plain tensors with values, no gradient asked for, and nothing
    that traces, fakes or transforms. The dispatcher and its Python wrappers take some 30
    microseconds a call, which is what a small product takes.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() or _transforms() is not None:
        return False
    gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN or tensor.is_meta or (gradients and tensor.requires_grad)
        ):
            return False
    return True


@torch.library.custom_op("duqpp::rotate_quantize", mutates_args=())
def rotate_quantize(
    x: Tensor, rotation: Tensor | None, rule: str, backend: str
) -> tuple[Tensor, Tensor]:
    """x [M, K] to codes uint8 [M, K/2] and scales uint8."""
    chosen = select("rotate_quantize", x.device, backend)
    quantized = chosen.rotate_quantize(x, rotation, ScaleRule(rule))
    return quantized.codes, quantized.scales


@rotate_quantize.register_fake
def _(x: Tensor, rotation: Tensor | None, rule: str, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_quantized(x, select_shapes("rotate_quantize", x.device, backend))


def _empty_quantized(x: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    codes = x.new_empty((rows, columns // 2), dtype=torch.uint8)
    return codes, x.new_empty(backend.scales_shape(rows, columns), dtype=torch.uint8)


@torch.library.custom_op("duqpp::rmsnorm_rotate_quantize", mutates_args=())
def rmsnorm_rotate_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    rotation: Tensor | None,
    rule: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x [M, K] to codes uint8 [M, K/2] and scales uint8."""
    chosen = select("rotate_quantize", x.device, backend)
    quantized = chosen.rmsnorm_rotate_quantize(x, norm_weight, epsilon, rotation, ScaleRule(rule))
    return quantized.codes, quantized.scales


@rmsnorm_rotate_quantize.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    rotation: Tensor | None,
    rule: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(x, select_shapes("rotate_quantize", x.device, backend))


@torch.library.custom_op("duqpp::silu_mul_rotate_quantize", mutates_args=())
def silu_mul_rotate_quantize(
    gate: Tensor, up: Tensor, rotation: Tensor | None, rule: str, backend: str
) -> tuple[Tensor, Tensor]:
    """gate and up [M, K] to codes uint8 [M, K/2] and scales uint8."""
    chosen = select("rotate_quantize", gate.device, backend)
    quantized = chosen.silu_mul_rotate_quantize(gate, up, rotation, ScaleRule(rule))
    return quantized.codes, quantized.scales


@silu_mul_rotate_quantize.register_fake
def _(
    gate: Tensor, up: Tensor, rotation: Tensor | None, rule: str, backend: str
) -> tuple[Tensor, Tensor]:
    return _empty_quantized(gate, select_shapes("rotate_quantize", gate.device, backend))


@torch.library.custom_op("duqpp::prepare_weight", mutates_args=())
def prepare_weight(codes: Tensor, scales: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """A row-major weight in the layout that the backend's GEMM reads; never the tensors given."""
    prepared = select("mxfp4_gemm", codes.device, backend).prepare_weight(
        MXFP4Tensor(codes, scales)
    )
    # An op must not return its own arguments.
    return (
        prepared.codes.clone() if prepared.codes is codes else prepared.codes,
        prepared.scales.clone() if prepared.scales is scales else prepared.scales,
    )


@prepare_weight.register_fake
def _(codes: Tensor, scales: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    chosen = select_shapes("mxfp4_gemm", codes.device, backend)
    shape = chosen.weight_scales_shape(codes.shape[0], codes.shape[1] * 2)
    return torch.empty_like(codes), scales.new_empty(shape)


@torch.library.custom_op("duqpp::mxfp4_gemm", mutates_args=())
def mxfp4_gemm(
    a_codes: Tensor,
    a_scales: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """[M, K] times [N, K] transposed, plus bias [N], to [M, N]."""
    a, b = MXFP4Tensor(a_codes, a_scales), MXFP4Tensor(b_codes, b_scales)
    return select("mxfp4_gemm", a_codes.device, backend).mxfp4_gemm(a, b, bias, out_dtype)


@mxfp4_gemm.register_fake
def _(
    a_codes: Tensor,
    a_scales: Tensor,
    b_codes: Tensor,
    b_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return a_codes.new_empty((a_codes.shape[0], b_codes.shape[0]), dtype=out_dtype)


@torch.library.custom_op("duqpp::mxfp4_linear", mutates_args=())
def mxfp4_linear(
    x: Tensor,
    rotation: Tensor | None,
    rule: str,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    """rotate_quantize, then mxfp4_gemm, as one differentiable op: x [M, K] to [M, N]."""
    chosen = select("mxfp4_gemm", x.device, backend)
    weight = MXFP4Tensor(weight_codes, weight_scales)
    return chosen.mxfp4_linear(x, rotation, ScaleRule(rule), weight, bias)


@mxfp4_linear.register_fake
def _(
    x: Tensor,
    rotation: Tensor | None,
    rule: str,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    return x.new_empty((x.shape[0], weight_codes.shape[0]))


def _no_gradient(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    return (None,) * int(ctx.inputs)


def _save_arity(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.inputs = len(inputs)


# Codes and scales are integers: nothing flows back through them. A differentiable path is
# mxfp4_linear, which `duqpp.nn.MXFP4Linear` takes whenever gradients are asked for.
for _op in (
    rotate_quantize,
    rmsnorm_rotate_quantize,
    silu_mul_rotate_quantize,
    prepare_weight,
):
    _op.register_autograd(_no_gradient, setup_context=_save_arity)


def _gemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.bias_dtype else None
    return None, None, None, None, grad_bias, None, None


def _gemm_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    bias = inputs[4]
    ctx.bias_dtype = None if bias is None else bias.dtype


mxfp4_gemm.register_autograd(_gemm_backward, setup_context=_gemm_context)


@torch.library.custom_op("duqpp::mxfp4_linear_input_gradient", mutates_args=())
def mxfp4_linear_input_gradient(
    grad: Tensor,
    rotation: Tensor | None,
    weight_codes: Tensor,
    weight_scales: Tensor,
    backend: str,
) -> Tensor:
    """Straight-through gradient of mxfp4_linear: grad [M, N] times (W R.T) [N, K], to [M, K]."""
    chosen = select("mxfp4_gemm", grad.device, backend)
    weight = chosen.restore_weight(MXFP4Tensor(weight_codes, weight_scales))
    rotated = grad.float() @ dequantize(weight)
    if rotation is not None:
        rotated = rotate_blocks(rotated, rotation.float().transpose(-1, -2))
    return rotated.to(grad.dtype)


@mxfp4_linear_input_gradient.register_fake
def _(
    grad: Tensor,
    rotation: Tensor | None,
    weight_codes: Tensor,
    weight_scales: Tensor,
    backend: str,
) -> Tensor:
    return grad.new_empty((grad.shape[0], weight_codes.shape[1] * 2))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rotation, _, weight_codes, weight_scales, bias, ctx.backend = inputs
    ctx.save_for_backward(rotation, weight_codes, weight_scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = mxfp4_linear_input_gradient(grad, *ctx.saved_tensors, ctx.backend)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None


mxfp4_linear.register_autograd(_linear_backward, setup_context=_linear_context)
