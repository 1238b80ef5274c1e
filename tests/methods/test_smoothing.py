"""Smoothing into producers: the float block computes the same function afterwards."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from duqpp.calibration.smoothing import representable
from duqpp.config import QuantizeConfig
from duqpp.methods.base import Block
from duqpp.methods.group import plan_group
from duqpp.methods.smoothing import smooth_into_producers
from duqpp.models.family import LinearGroup, Llama, Norm
from duqpp.models.source import open_source
from duqpp.models.stack import BlockInputs, DecoderStack
from tests import inputs
from tests.families import FAMILIES


@pytest.fixture
def stack_and_inputs(make_tiny):
    """``stack_and_inputs(model_type)``: a tiny model's decoder stack, and what block 0 reads."""

    def make(model_type: str) -> tuple[DecoderStack, BlockInputs]:
        stack = DecoderStack(open_source(str(make_tiny(model_type))))
        tokens = torch.randint(0, 300, (2, 40), generator=inputs.generator(1))
        return stack, stack.first_inputs(tokens)

    return make


def smoothed(block: Block, block_inputs: BlockInputs, alpha: float = 0.5) -> list[str]:
    """Smooth a block, its linears included. Returns: the groups that were."""
    method = QuantizeConfig(method="rtn", smooth_alpha=alpha).build_method()
    statistics, _ = method.observe(block, block_inputs)
    plans = {group.name: plan_group(block, group) for group in block.groups}
    smooth_into_producers(block, plans, statistics, alpha)
    for plan in plans.values():
        assert set(plan.weights) == set(plan.group.linears)
        for name, weight in plan.weights.items():
            block.module.get_submodule(name).weight.data = weight
    return [name for name, plan in plans.items() if (plan.scales != 1).any()]


def added(module: nn.Module, block_inputs: BlockInputs) -> Tensor:
    """What a block adds to its input: the residual would hide errors."""
    outputs = torch.cat(list(block_inputs.outputs(module, 0)))
    return outputs - torch.cat(block_inputs.hidden)


def assert_same_function(module: nn.Module, original: nn.Module, block_inputs) -> None:
    exact = added(original, block_inputs)
    error = (added(module, block_inputs) - exact).norm() / exact.norm()
    assert error < 1e-5


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("skip", [(), ("v_proj",), ("down_proj", "up_proj")])
def test_what_can_be_smoothed_is_and_the_function_stays(model_type, skip, stack_and_inputs):
    stack, block_inputs = stack_and_inputs(model_type)
    original = stack.block(0)
    block = Block.of(copy.deepcopy(original), 0, skip, stack.family)
    groups = smoothed(block, block_inputs)
    # A part of a group stays as it is, and what a linear in floating point makes.
    expected = {"v_proj": ["gate_up", "down"], "down_proj": ["qkv", "o"]}
    assert groups == expected.get(skip[0] if skip else "", ["qkv", "o", "gate_up", "down"])
    assert_same_function(block.module, original, block_inputs)


def test_a_group_without_a_producer_stays(stack_and_inputs):
    stack, block_inputs = stack_and_inputs("llama")
    original = stack.block(0)
    groups = tuple(
        replace(group, producer=None) if group.name == "o" else group
        for group in stack.family.groups(0)
    )
    block = Block(copy.deepcopy(original), 0, "model.layers.0", groups)
    assert smoothed(block, block_inputs) == ["qkv", "gate_up", "down"]
    assert_same_function(block.module, original, block_inputs)


class PlusOneNorm(nn.Module):
    """y = normalized(x) * (1 + weight), as in Gemma."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(norm.weight - 1), norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
        return normalized * (1 + self.weight)


@dataclass(frozen=True)
class PlusOne(Norm):
    """Such a norm as a producer."""

    def absorb(self, block: nn.Module, weights: dict[str, Tensor], scales: Tensor) -> Tensor:
        stored = block.get_submodule(self.name).weight
        scales = representable(scales, 1 + stored.detach())
        stored.data = ((1 + stored.double()) / scales - 1).to(stored.dtype)
        return scales


class Gemmalike(Llama):
    """A family that is yet to come."""

    def groups(self, index: int) -> tuple[LinearGroup, ...]:
        return tuple(
            replace(group, producer=PlusOne(group.producer.name))
            if isinstance(group.producer, Norm)
            else group
            for group in super().groups(index)
        )


def test_a_norm_with_another_equation_is_a_producer_of_its_own(stack_and_inputs):
    stack, block_inputs = stack_and_inputs("llama")
    original = stack.block(0)
    for name in ("input_layernorm", "post_attention_layernorm"):
        original.set_submodule(name, PlusOneNorm(original.get_submodule(name)))
    block = Block.of(copy.deepcopy(original), 0, (), Gemmalike(stack.config))
    assert len(smoothed(block, block_inputs)) == 4
    assert (block.module.input_layernorm.weight != original.input_layernorm.weight).any()
    assert_same_function(block.module, original, block_inputs)
