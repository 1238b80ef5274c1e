"""The method duqpp: a decoder block, group by group, each on what those before it made."""

import torch
from torch import Tensor, nn

from duqpp.calibration.hessian import HessianAccumulator
from duqpp.calibration.statistics import InputStatistics, draw_sample
from duqpp.config import QuantizeConfig
from duqpp.format import dequantize
from duqpp.models.layout import Layout, convert_group
from duqpp.models.llama import BlockInputs, layer_prefix, quantized_groups
from duqpp.ops import quantize
from duqpp.quantize_group import (
    REPORT_ROWS,
    SAMPLE_TOKENS,
    GroupPlan,
    GroupReport,
    fill_linear,
    group_generator,
    group_outputs,
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
        x, samples = _group_input(block, index, reader, group.linears[0], inputs, config)
        exact = group_outputs(plan, samples[:REPORT_ROWS])
        generator = group_generator(config.seed, f"{layer_prefix(index)}.{group.name}")
        weights = torch.cat(list(plan.weights.values()))  # [sum N, K]
        matrix = balanced_transform(second_moments(x), second_moments(weights), generator)
        plan.transform = InputTransform(BlockRotation.rounded(matrix))
        quantized = quantize_weights(plan, _hessian(x, plan, config), config, index)
        biases = {name: block.get_submodule(name).bias for name in group.linears}
        convert_group(block, group, layout, device="cpu")
        for name, weight in quantized.items():
            fill_linear(block.get_submodule(name), weight.quantized, plan.transform, biases[name])
            latents[name] = weight.latent
        reports.append(report_group(index, plan, quantized, samples, exact, config))
    return reports, latents


def _group_input(
    block: nn.Module,
    index: int,
    reader: nn.Module,
    name: str,
    inputs: BlockInputs,
    config: QuantizeConfig,
) -> tuple[Tensor, Tensor]:
    """What a linear reads: every row float32 [tokens, K], and the sample that reports are of."""
    rows: list[Tensor] = []
    statistics = InputStatistics(
        f"{layer_prefix(index)}.{name}",
        reader.in_features,
        draw_sample(inputs.tokens, SAMPLE_TOKENS, config.seed),
        second_moment=False,
    )

    def update(x: Tensor) -> None:
        statistics.update(x)
        rows.append(x.flatten(0, -2).float())

    with observed(reader, update):
        inputs.run_up_to(block, index, reader)
    return torch.cat(rows), statistics.samples()


def _hessian(x: Tensor, plan: GroupPlan, config: QuantizeConfig) -> Tensor | None:
    """The GPTQ Hessian of the transformed input, rounded or not; None where GPTQ is off."""
    if not config.gptq:
        return None
    accumulator = HessianAccumulator(x.shape[1])
    for part in x.split(_ROWS_AT_A_TIME):
        rotated = plan.transform.apply(part)
        if config.hessian == "quantized":
            rotated = dequantize(quantize(rotated, rule=config.activation_rule))
        accumulator.update(rotated)
    return accumulator.hessian()
