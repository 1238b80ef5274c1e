"""The method duqpp: a decoder block, group by group, each on what those before it made."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from duqpp.calibration.statistics import draw_sample
from duqpp.checkpoint.layout import Layout, convert_group
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import dequantize
from duqpp.methods.group import (
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
    report_rows,
)
from duqpp.models.llama import BlockInputs, layer_prefix, quantized_groups
from duqpp.ops import quantize
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
        float_inputs: of the float model, from `run_float_block`, which `config.drift` aims at;
            None or empty for nothing to make up for.
    Returns: one report per linear group; and by linear what its codes were rounded from, float32
        [N, K], for refinement.
    Raises: InputError when an input is not finite, or a weight cannot be quantized.
    """
    reports, latents = [], {}
    for group in quantized_groups(index, config.skip):
        plan = plan_group(block, group)
        reader = block.get_submodule(group.linears[0])
        x = _group_input(block, index, reader, group.linears[0], inputs)
        drawn = draw_sample(len(x), SAMPLE_TOKENS, config.seed)
        samples = x[drawn[report_rows(len(drawn))]]
        exact = group_outputs(plan, samples)
        with named(f"{layer_prefix(index)}.{group.name}"):
            generator = group_generator(config.seed, f"{layer_prefix(index)}.{group.name}")
            plan.transform = _transform(x, torch.cat(list(plan.weights.values())), generator)
            exact_x = float_inputs[group.name] if float_inputs else None
            hessian, drift, amax = _observe(x, exact_x, plan, config)
        del x
        quantized = quantize_weights(plan, hessian, config, index, drift)
        del hessian, drift
        biases = {name: block.get_submodule(name).bias for name in group.linears}
        convert_group(block, group, layout, device="cpu")
        for name, weight in quantized.items():
            fill_linear(block.get_submodule(name), weight.quantized, plan.transform, biases[name])
            latents[name] = weight.latent
        every = torch.arange(len(samples))
        report = report_group(index, plan, quantized, samples, every, exact, config)
        before, after = (block_amax(channels) for channels in amax)
        reports.append(replace(report, block_amax_before=before, block_amax=after))
    return reports, latents


def run_float_block(
    block: nn.Module, index: int, config: QuantizeConfig, inputs: BlockInputs, observed_batches: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a float block over the batches, and keep what its linear groups read in the first ones.

    Returns: outputs, batch by batch; and by group, of the first `observed_batches`, what it reads:
        [tokens, K] in the block's dtype, in an empty mapping where there are none.
    """
    groups = quantized_groups(index, config.skip) if observed_batches else []
    rows: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    with ExitStack() as stack:
        for group in groups:
            own = rows[group.name]

            def keep(x: Tensor, own: list[Tensor] = own) -> None:
                own.append(x.flatten(0, -2))

            stack.enter_context(observed(block.get_submodule(group.linears[0]), keep))
        outputs = list(inputs.first(observed_batches).outputs(block, index))
    outputs += inputs.after(observed_batches).outputs(block, index)
    return outputs, {name: torch.cat(own) for name, own in rows.items()}


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


class _Observed(NamedTuple):
    """hessian, drift: float32 [K, K], H and C of `make_up_for_drift`, of the transformed input,
    rounded or not; None where GPTQ is off, and drift where it is not made up for.
    amax: the largest magnitude of each channel, [1, K], untransformed and transformed.
    """

    hessian: Tensor | None
    drift: Tensor | None
    amax: tuple[Tensor, Tensor]


def _observe(x: Tensor, exact: Tensor | None, plan: GroupPlan, config: QuantizeConfig) -> _Observed:
    """Go once through a group's input x [tokens, K] as it is quantized.

    Args: exact: what the group reads in the float model, [tokens, K] in any dtype.
    """
    channels = x.shape[1]
    hessian = torch.zeros(channels, channels) if config.gptq else None
    drift = torch.zeros(channels, channels) if config.gptq and exact is not None else None
    before, after = torch.zeros(1, channels), torch.zeros(1, channels)
    for start in range(0, len(x), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        rotated = plan.transform.apply(x[rows])
        before = torch.maximum(before, x[rows].abs().amax(0))
        after = torch.maximum(after, rotated.abs().amax(0))
        if hessian is None:
            continue
        rounded = rotated
        if config.hessian == "quantized":
            rounded = dequantize(quantize(rotated, rule=config.activation_rule))
        hessian.addmm_(rounded.T, rounded)
        if exact is not None and drift is not None:
            change = plan.transform.apply(exact[rows].float()) - rotated
            drift.addmm_(change.T, rounded)
    for sums in (hessian, drift):
        if sums is not None:
            sums.mul_(2.0 / len(x))
    if drift is not None and not torch.isfinite(drift).all():
        raise InputError("the float model's activations are not finite, or overflow float32")
    return _Observed(hessian, drift, (before, after))
