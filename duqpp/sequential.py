"""The method duqpp: a decoder block, group by group, each on what those before it made."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from duqpp.calibration.statistics import InputStatistics, draw_sample
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
    block: nn.Module,
    index: int,
    config: QuantizeConfig,
    layout: Layout,
    inputs: BlockInputs,
    float_inputs: Mapping[str, Tensor] | None = None,
) -> tuple[list[GroupReport], dict[str, Tensor]]:
    """Replace the linears of a float block by quantized ones, in place.

    A group's transform and Hessian come from the input that it will really get: that of the
    quantized stream, through the groups of this block that are quantized already. The whole input
    of one group, float32 [tokens, K], is in memory.

    Args:
        inputs: of the quantized stream.
        float_inputs: of the float model, from `group_inputs`, which `config.drift` aims at.
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
        hessian, drift = None, None
        if config.gptq:
            exact_x = None if float_inputs is None else float_inputs[group.name]
            hessian, drift = _second_moments(x, exact_x, plan, config)
            if drift is not None and not drift.isfinite().all():
                name = f"{layer_prefix(index)}.{group.linears[0]}"
                raise InputError(f"{name}: the float model's activations are not finite")
        quantized = quantize_weights(plan, hessian, config, index, drift)
        biases = {name: block.get_submodule(name).bias for name in group.linears}
        convert_group(block, group, layout, device="cpu")
        for name, weight in quantized.items():
            fill_linear(block.get_submodule(name), weight.quantized, plan.transform, biases[name])
            latents[name] = weight.latent
        reports.append(report_group(index, plan, quantized, samples, exact, config))
    return reports, latents


def group_inputs(
    block: nn.Module, index: int, config: QuantizeConfig, inputs: BlockInputs
) -> dict[str, Tensor]:
    """What each linear group of a float block reads: [tokens, K] in the block's dtype, by name."""
    groups = quantized_groups(index, config.skip)
    rows: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    with ExitStack() as stack:
        for group in groups:
            own = rows[group.name]

            def keep(x: Tensor, own: list[Tensor] = own) -> None:
                own.append(x.flatten(0, -2))

            stack.enter_context(observed(block.get_submodule(group.linears[0]), keep))
        for _ in inputs.outputs(block, index):
            pass
    return {name: torch.cat(own) for name, own in rows.items()}


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


def _second_moments(
    x: Tensor, exact: Tensor | None, plan: GroupPlan, config: QuantizeConfig
) -> tuple[Tensor, Tensor | None]:
    """H and C of `make_up_for_drift`, float32 [K, K], in the basis of the transformed input.

    Args:
        x: what the group gets, float32 [tokens, K]. exact: what the float model's gets, [tokens, K]
            in any dtype; None leaves C out.
    """
    hessian = torch.zeros(x.shape[1], x.shape[1])
    drift = None if exact is None else torch.zeros_like(hessian)
    for start in range(0, len(x), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        rotated = plan.transform.apply(x[rows])
        rounded = rotated
        if config.hessian == "quantized":
            rounded = dequantize(quantize(rotated, rule=config.activation_rule))
        hessian.addmm_(rounded.T, rounded)
        if exact is not None and drift is not None:
            drift.addmm_((plan.transform.apply(exact[rows].float()) - rotated).T, rounded)
    scale = 2.0 / len(x)
    return hessian.mul_(scale), None if drift is None else drift.mul_(scale)
