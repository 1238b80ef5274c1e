"""The method duqpp: a decoder block, group by group, each on what those before it made."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from duqpp.calibration.hessian import HessianAccumulator
from duqpp.calibration.statistics import draw_sample
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import dequantize
from duqpp.models.layout import Layout, convert_group
from duqpp.models.llama import BlockInputs, layer_prefix, quantized_groups
from duqpp.ops import quantize
from duqpp.quantize_group import (
    REPORT_ROWS,
    SAMPLE_TOKENS,
    GroupPlan,
    GroupReport,
    block_amax,
    fill_linear,
    group_generator,
    group_outputs,
    named,
    observed,
    plan_group,
    quantize_weights,
    report_group,
)
from duqpp.rotation import BlockRotation, InputTransform
from duqpp.rotation.balance import balanced_transform, second_moments

_ROWS_AT_A_TIME = 2048  # of a group's input, transformed and rounded for the Hessian


def quantize_sequentially(
    block: nn.Module, index: int, config: QuantizeConfig, layout: Layout, inputs: BlockInputs
) -> tuple[list[GroupReport], dict[str, Tensor]]:
    """Replace the linears of a float block by quantized ones, in place.

    A group's transform and Hessian come from the input that it will really get: that of the
    quantized stream, through the groups of this block that are quantized already. The whole input
    of one group, float32 [tokens, K], is in memory.

    Returns: one report per linear group; and by linear what its codes were rounded from, float32
        [N, K], for refinement.
    Raises: InputError when an input is not finite, or a weight cannot be quantized.
    """
    reports, latents = [], {}
    for group in quantized_groups(index, config.skip):
        plan = plan_group(block, group)
        reader = block.get_submodule(group.linears[0])
        x = _group_input(block, index, reader, group.linears[0], inputs)
        samples = x[draw_sample(len(x), SAMPLE_TOKENS, config.seed)[:REPORT_ROWS]]
        exact = group_outputs(plan, samples)
        with named(f"{layer_prefix(index)}.{group.name}"):
            generator = group_generator(config.seed, f"{layer_prefix(index)}.{group.name}")
            plan.transform = _transform(x, torch.cat(list(plan.weights.values())), generator)
        hessian, amax = _observe(x, plan, config)
        del x
        quantized = quantize_weights(plan, hessian, config, index)
        del hessian
        biases = {name: block.get_submodule(name).bias for name in group.linears}
        convert_group(block, group, layout, device="cpu")
        for name, weight in quantized.items():
            fill_linear(block.get_submodule(name), weight.quantized, plan.transform, biases[name])
            latents[name] = weight.latent
        report = report_group(index, plan, quantized, samples, exact, config)
        before, after = (block_amax(channels) for channels in amax)
        reports.append(replace(report, block_amax_before=before, block_amax=after))
    return reports, latents


def _group_input(
    block: nn.Module, index: int, reader: nn.Module, name: str, inputs: BlockInputs
) -> Tensor:
    """What a linear reads, every row: float32 [tokens, K]. Raises: InputError for NaN, infinity."""
    x, filled = torch.empty(inputs.tokens, reader.in_features), 0

    def update(batch: Tensor) -> None:
        nonlocal filled
        rows = batch.flatten(0, -2)
        x[filled : filled + len(rows)] = rows
        filled += len(rows)

    with observed(reader, update):
        inputs.run_up_to(block, index, reader)
    if not torch.isfinite(torch.stack(x.aminmax())).all():
        raise InputError(
            f"the input of {layer_prefix(index)}.{name} has NaN or infinite values in calibration"
        )
    return x


def _transform(x: Tensor, weights: Tensor, generator: torch.Generator) -> InputTransform:
    """What balances a group's input [tokens, K] with its weights [sum N, K], as it is stored."""
    activation_moments, weight_moments = second_moments(x), second_moments(weights)
    for name, moments in (("input", activation_moments), ("weights", weight_moments)):
        if not torch.isfinite(moments).all():
            raise InputError(f"the squares of its {name} overflow float32")
    matrix = balanced_transform(activation_moments, weight_moments, generator)
    return InputTransform(BlockRotation.rounded(matrix))


def _observe(
    x: Tensor, plan: GroupPlan, config: QuantizeConfig
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """Go once through a group's input [tokens, K] as it is quantized.

    Returns: the GPTQ Hessian of the transformed input, rounded or not, None where GPTQ is off; and
        the largest magnitude of each channel, [1, K], untransformed and transformed.
    """
    accumulator = HessianAccumulator(x.shape[1]) if config.gptq else None
    before, after = torch.zeros(1, x.shape[1]), torch.zeros(1, x.shape[1])
    for part in x.split(_ROWS_AT_A_TIME):
        rotated = plan.transform.apply(part)
        before = torch.maximum(before, part.abs().amax(0))
        after = torch.maximum(after, rotated.abs().amax(0))
        if accumulator is not None:
            if config.hessian == "quantized":
                rotated = dequantize(quantize(rotated, rule=config.activation_rule))
            accumulator.update(rotated)
    return None if accumulator is None else accumulator.hessian(), (before, after)
