"""The ops in torch's dispatcher (namespace `duqpp`): fake implementations and autograd rules.

Tensors cross as plain codes and scales, so that torch.compile, CUDA graphs and C++ see ordinary
tensors. Arguments are checked in `duqpp.ops`, before these are called.
"""

import torch
from torch import Tensor

from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize
from duqpp.ops.dispatch import select
from duqpp.ops.reference import rotate_blocks


@torch.library.custom_op("duqpp::rotate_quantize", mutates_args=())
def rotate_quantize(
    x: Tensor, rotation: Tensor | None, rule: str, backend: str
) -> tuple[Tensor, Tensor]:
    """x [M, K] to codes uint8 [M, K/2] and scales uint8."""
    chosen = select("rotate_quantize", x.device, backend)
    quantized = chosen.rotate_quantize(x, rotation, ScaleRule(rule))
    return quantized.codes, quantized.scales


@rotate_quantize.register_fake
def _(x, rotation, rule, backend):
    rows, columns = x.shape
    codes = x.new_empty((rows, columns // 2), dtype=torch.uint8)
    return codes, x.new_empty((rows, columns // BLOCK_SIZE), dtype=torch.uint8)


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
def _(a_codes, a_scales, b_codes, b_scales, bias, out_dtype, backend):
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
    codes, scales = rotate_quantize(x, rotation, rule, backend)
    return mxfp4_gemm(codes, scales, weight_codes, weight_scales, bias, x.dtype, backend)


@mxfp4_linear.register_fake
def _(x, rotation, rule, weight_codes, weight_scales, bias, backend):
    return x.new_empty((x.shape[0], weight_codes.shape[0]))


def _no_gradient(ctx, *grads):
    return (None,) * ctx.inputs


def _save_arity(ctx, inputs, output):
    ctx.inputs = len(inputs)


# Codes and scales are integers: nothing flows back through them. A differentiable path is
# mxfp4_linear, which `duqpp.nn.MXFP4Linear` takes whenever gradients are asked for.
rotate_quantize.register_autograd(_no_gradient, setup_context=_save_arity)


def _gemm_backward(ctx, grad):
    grad_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.bias_dtype else None
    return None, None, None, None, grad_bias, None, None


def _gemm_context(ctx, inputs, output):
    bias = inputs[4]
    ctx.bias_dtype = None if bias is None else bias.dtype


mxfp4_gemm.register_autograd(_gemm_backward, setup_context=_gemm_context)


@torch.library.custom_op("duqpp::mxfp4_linear_input_gradient", mutates_args=())
def mxfp4_linear_input_gradient(
    grad: Tensor, rotation: Tensor | None, weight_codes: Tensor, weight_scales: Tensor
) -> Tensor:
    """Straight-through gradient of mxfp4_linear: grad [M, N] times (W R.T) [N, K], to [M, K]."""
    rotated = grad.float() @ dequantize(MXFP4Tensor(weight_codes, weight_scales))
    if rotation is not None:
        rotated = rotate_blocks(rotated, rotation.float().transpose(-1, -2))
    return rotated.to(grad.dtype)


@mxfp4_linear_input_gradient.register_fake
def _(grad, rotation, weight_codes, weight_scales):
    return grad.new_empty((grad.shape[0], weight_codes.shape[1] * 2))


def _linear_context(ctx, inputs, output):
    _, rotation, _, weight_codes, weight_scales, bias, _ = inputs
    ctx.save_for_backward(rotation, weight_codes, weight_scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = mxfp4_linear_input_gradient(grad, *ctx.saved_tensors)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None


mxfp4_linear.register_autograd(_linear_backward, setup_context=_linear_context)
