"""LatentLinear: the function of the linear that it stands for, and straight-through gradients."""

import copy

import pytest
import torch
from torch import nn

import duqpp.methods.refine.latent as module
from duqpp.format import ScaleRule, dequantize, quantize
from duqpp.methods.refine.latent import LatentLinear, RoundedInput, to_codes, to_latents
from duqpp.models.family import LinearGroup
from duqpp.nn import MXFP4Linear, share_input
from duqpp.rotation import BlockRotation
from duqpp.rotation.basis import random_orthogonal
from tests import inputs, oracle
from tests.nn.test_model import CountOps

PAIR = LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")


class Owner(nn.Module):
    def __init__(self, *linears: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linears

    def forward(self, x):
        return self.gate_proj(x) * self.up_proj(x)


def quantized_linear(n: int, k: int, seed: int, matrix: torch.Tensor, *, bias: bool) -> MXFP4Linear:
    linear = MXFP4Linear(
        k, n, bias=bias, rule=ScaleRule.EVEN, rotation=tuple(matrix.shape), dtype=torch.float32
    )
    weight = quantize(inputs.gaussian(n, k, seed), rule=ScaleRule.MSE)
    linear.weight_packed.data, linear.weight_scale.data = weight.codes, weight.scales
    linear.rotation.data = matrix
    if bias:
        linear.bias.data = inputs.gaussian(1, n, seed + 1)[0]
    linear.prepare()
    return linear


def make_block(seed: int = 0, *, bias: bool = True) -> nn.Module:
    """A module with two quantized linears that share their input, as a decoder block has them."""
    matrix = random_orthogonal(32, inputs.generator(seed), count=3)
    matrix = BlockRotation.rounded(matrix).matrix
    block = nn.Module()
    block.mlp = Owner(*(quantized_linear(48, 96, seed + s, matrix, bias=bias) for s in (1, 5)))
    share_input(block.mlp, [block.mlp.gate_proj, block.mlp.up_proj])
    return block


def latents_of(block: nn.Module) -> dict[str, torch.Tensor]:
    return {name: dequantize(block.get_submodule(name).weight) for name in PAIR.linears}


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_quantized_linear_does(bias):
    block = make_block(bias=bias)
    x = inputs.gaussian(40, 96, 9)
    with torch.no_grad():
        expected = block.mlp(x)
        to_latents(block, [PAIR], latents_of(block), rule=ScaleRule.MSE)
        torch.testing.assert_close(block.mlp(x), expected, rtol=1e-4, atol=1e-4)


def test_gradients_pass_rounding_as_if_it_were_not_there():
    block = make_block()
    rotation = torch.block_diag(*block.mlp.gate_proj.rotation.float())
    parameters = to_latents(block, [PAIR], latents_of(block), rule=ScaleRule.MSE)
    linear = block.mlp.gate_proj
    x = inputs.gaussian(40, 96, 3).requires_grad_()
    out_gradient = inputs.gaussian(40, 48, 4)
    linear(x).backward(out_gradient)
    rounded = dequantize(quantize((x @ rotation).detach(), rule=ScaleRule.EVEN))
    torch.testing.assert_close(
        parameters["mlp.gate_proj"].grad, out_gradient.T @ rounded, rtol=1e-4, atol=1e-3
    )
    weight = dequantize(quantize(linear.latent.data, rule=ScaleRule.MSE))
    torch.testing.assert_close(x.grad, out_gradient @ weight @ rotation.T, rtol=1e-4, atol=1e-3)
    assert parameters["mlp.up_proj"].grad is None


def test_linears_of_a_group_round_their_input_once(monkeypatch):
    block = make_block()
    to_latents(block, [PAIR], latents_of(block), rule=ScaleRule.MSE)
    rounded_input = block.mlp.gate_proj.rounded_input
    assert block.mlp.up_proj.rounded_input is rounded_input
    x = inputs.gaussian(8, 96, 1)
    first = rounded_input(x)
    assert rounded_input(x) is first
    assert rounded_input(x) is not first, "both have read it: it is let go of"
    other = x.clone()
    second = rounded_input(other)
    assert second is not first
    assert rounded_input(other) is second, "another input is read from the start"
    assert rounded_input(other) is not second


def test_unchanged_latents_give_the_codes_back():
    block = make_block()
    before = copy.deepcopy(block.state_dict())
    x = inputs.gaussian(8, 96, 1)
    with torch.no_grad():
        expected = block.mlp(x)
    parameters = to_latents(block, [PAIR], latents_of(block), rule=ScaleRule.MSE)
    for latent in parameters.values():
        latent.data += 1.0
    to_codes(block, [PAIR], None)
    assert all(torch.equal(v, before[n]) for n, v in block.state_dict().items())
    with torch.no_grad(), CountOps() as ops:
        oracle.assert_same(block.mlp(x), expected, "output")
    assert ops.calls["rotate_quantize"] + ops.calls["mxfp4_linear"] == 1, "the input is shared"


def test_the_linears_come_back_with_new_codes():
    block = make_block()
    to_latents(block, [PAIR], latents_of(block), rule=ScaleRule.MSE)
    expected = quantize(inputs.gaussian(48, 96, 77), rule=ScaleRule.MSE)
    to_codes(block, [PAIR], {name: expected for name in PAIR.linears})
    oracle.assert_same(block.mlp.up_proj.weight.codes, expected.codes, "codes")
    oracle.assert_same(block.mlp.up_proj.weight.scales, expected.scales, "scales")
    assert isinstance(block.mlp.up_proj, MXFP4Linear)


def test_without_a_rotation_the_input_is_rounded_alone():
    x = inputs.gaussian(8, 96, 1)
    rounded = RoundedInput(None, ScaleRule.EVEN, 1)(x)
    oracle.assert_same(rounded, dequantize(quantize(x, rule=ScaleRule.EVEN)), "rounded")


def test_the_output_has_the_dtype_of_the_input():
    block = make_block()
    to_latents(block, [PAIR], latents_of(block), rule=ScaleRule.MSE)
    assert isinstance(block.mlp.gate_proj, LatentLinear)
    assert block.mlp(inputs.gaussian(4, 96, 1).bfloat16()).dtype == torch.bfloat16


def test_products_in_bfloat16_are_of_the_same_values(monkeypatch):
    """As on a GPU: only what a product gives is rounded, and gradients; latents stay float32."""
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(module, "product_dtype", lambda device, dtype=dtype: dtype)
        block = make_block()
        x = inputs.gaussian(40, 96, 3).requires_grad_()
        parameters = to_latents(block, [PAIR], latents_of(block), rule=ScaleRule.MSE)
        linear = block.mlp.gate_proj
        assert linear.rounded_input(x).dtype == dtype
        out = linear(x)
        out.backward(inputs.gaussian(40, 48, 4))
        assert out.dtype == x.dtype == parameters["mlp.gate_proj"].grad.dtype == torch.float32
        made.append((out.detach(), x.grad, parameters["mlp.gate_proj"].grad))
    for exact, rounded in zip(*made, strict=True):
        error = (rounded - exact).norm() / exact.norm()
        assert 0 < error < 2**-8


def test_only_the_host_multiplies_in_float32():
    devices = [torch.device(name) for name in ("cpu", "cuda", "cuda:1")]
    assert [module.product_dtype(d) for d in devices] == [torch.float32, *[torch.bfloat16] * 2]
