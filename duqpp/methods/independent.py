"""Quantize one decoder block: smooth, build transforms, fold and round the weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.calibration.hessian import HessianAccumulator, transform_second_moment
from duqpp.calibration.smoothing import (
    per_repeated_channel,
    per_source_channel,
    representable,
    smoothing_scales,
)
from duqpp.calibration.statistics import InputStatistics, draw_sample
from duqpp.checkpoint.layout import Layout, convert_block
from duqpp.config import QuantizeConfig
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, dequantize
from duqpp.methods.group import (
    SAMPLE_TOKENS,
    GroupPlan,
    GroupReport,
    fill_linear,
    group_generator,
    group_outputs,
    named,
    observed,
    plan_group,
    plan_weights,
    quantize_weights,
    report_group,
    report_rows,
)
from duqpp.models.llama import (
    BlockInputs,
    check_finite,
    head_dim,
    is_whole,
    layer_prefix,
    quantized_groups,
)
from duqpp.ops import quantize
from duqpp.rotation import BlockRotation, InputTransform
from duqpp.rotation.basis import hadamard, random_orthogonal
from duqpp.rotation.construct import duquant_transform, outlier_aware


def layout_of(config: QuantizeConfig, provenance: dict[str, Any]) -> Layout:
    """The checkpoint layout that a configuration leads to."""
    per_block = config.rotation == "per-block"
    rotated = config.method != "rtn" or (per_block and config.effective_smooth_alpha > 0)
    return Layout(
        method=config.method,
        rotation=config.rotation.replace("-", "_") if rotated else "none",
        permuted=config.method == "duquant",
        weight_rule=config.weight_rule,
        activation_rule=config.activation_rule,
        skip=tuple(dict.fromkeys(("lm_head", *config.skip))),
        provenance=provenance,
    )


def collect_statistics(
    block: nn.Module, index: int, inputs: BlockInputs, config: QuantizeConfig
) -> tuple[dict[str, InputStatistics], list[Tensor] | None]:
    """Run the float block over its inputs.

    Returns: statistics by group name, and the block's outputs if the next block reads those.
    """
    sample = draw_sample(inputs.tokens, SAMPLE_TOKENS, config.seed)
    wants_moment = config.gptq and config.hessian == "float"
    statistics = {}
    with ExitStack() as hooks:
        for group in quantized_groups(index, config.skip):
            reader = block.get_submodule(group.linears[0])
            name = f"{layer_prefix(index)}.{group.linears[0]}"
            statistics[group.name] = InputStatistics(
                name, reader.in_features, sample, second_moment=wants_moment
            )
            hooks.enter_context(observed(reader, statistics[group.name].update))
        if config.next_inputs == "float" or not statistics:
            return statistics, list(inputs.outputs(block, index))
        inputs.run_up_to(block, index, reader)  # groups are listed in the order of the forward pass
    return statistics, None


def quantize_block(
    block: nn.Module,
    index: int,
    config: QuantizeConfig,
    layout: Layout,
    model_config: Any,
    inputs: BlockInputs | None,
    statistics: dict[str, InputStatistics] | None,
    learned: Mapping[str, Tensor] | None = None,
) -> list[GroupReport]:
    """Replace the linears of a float block by quantized ones, in place.

    Args:
        inputs, statistics: from calibration; None for a method that reads no activations. Second
            moments are let go of once the Hessians are made of them.
        model_config: transformers configuration, for the attention heads.
        learned: rotations by group name, for the method learned.
    Returns: one report per linear group.
    Raises: InputError when a weight cannot be quantized; it names the linear.
    """
    groups = quantized_groups(index, config.skip)
    plans = {g.name: plan_group(block, g) for g in groups}
    samples = {name: s.samples() for name, s in (statistics or {}).items()}
    rows = report_rows(min(inputs.tokens, SAMPLE_TOKENS)) if inputs is not None else None
    exact = {name: group_outputs(plans[name], samples[name][rows]) for name in samples}
    smoothed_scales = _smooth(block, plans, statistics, config, model_config)
    for name, plan in plans.items():
        generator = group_generator(config.seed, f"{layer_prefix(index)}.{name}")
        with named(f"{layer_prefix(index)}.{name}"):
            plan.transform = (
                InputTransform(BlockRotation.rounded(learned[name]))
                if learned
                else _transform(
                    config, plan, samples.get(name), smoothed_scales.get(name), generator
                )
            )
    hessians = _hessians(block, index, config, plans, inputs, statistics)
    biases = {n: block.get_submodule(n).bias for g in groups for n in g.linears}
    convert_block(block, index, layout, device="cpu")
    reports = []
    for name, plan in plans.items():
        quantized = quantize_weights(plan, hessians.pop(name, None), config, index)
        for linear_name, rounded in quantized.items():
            linear = block.get_submodule(linear_name)
            fill_linear(linear, rounded.quantized, plan.transform, biases[linear_name])
        reports.append(
            report_group(index, plan, quantized, samples.get(name), rows, exact.get(name), config)
        )
    return reports


def quantize_linear(
    name: str, weight: Tensor, config: QuantizeConfig
) -> tuple[MXFP4Tensor, InputTransform]:
    """One linear by itself, as `quantize_block` does it, by a method that reads no activations.

    Args:
        name: in the model, such as "model.layers.3.mlp.up_proj".
        weight: floating point [N, K].
    Returns: the folded weight, and what the linear does to its input.
    Raises: InputError when the weight cannot be quantized; it names the linear.
    """
    check_finite(weight, f"{name}.weight")
    index, linear = name.removeprefix("model.layers.").split(".", 1)
    group = next(g for g in quantized_groups(int(index), config.skip) if linear in g.linears)
    plan = plan_weights(replace(group, linears=(linear,)), {linear: weight})
    generator = group_generator(config.seed, f"{layer_prefix(int(index))}.{group.name}")
    with named(f"{layer_prefix(int(index))}.{group.name}"):
        plan.transform = _transform(config, plan, None, None, generator)
    return quantize_weights(plan, None, config, int(index))[linear].quantized, plan.transform


def _smooth(
    block: nn.Module,
    plans: dict[str, GroupPlan],
    statistics: dict[str, InputStatistics] | None,
    config: QuantizeConfig,
    model_config: Any,
) -> dict[str, Tensor]:
    """Move channel scales from activations into weights.

    With one matrix per block the scales become part of it: they are returned by group name.
    Otherwise the producer of the input is divided by them, and the weights that read it multiplied.
    A group whose producer or members are in floating point is then left as it is.
    """
    alpha = config.effective_smooth_alpha
    if alpha == 0 or statistics is None:
        return {}
    folded = {}
    # Consumers before producers: v_proj and up_proj take up scales before they are smoothed.
    for name in sorted(plans, key=("o", "down", "qkv", "gate_up").index):
        plan = plans[name]
        activation = statistics[name].amax
        weight = torch.stack([w.abs().amax(0) for w in plan.weights.values()]).amax(0)
        if config.rotation == "per-block":
            folded[name] = smoothing_scales(activation, weight, alpha)
        elif is_whole(plan.group) and _can_absorb(plan.group.producer, plans):
            repeats = _repeats(name, model_config)
            activation = per_source_channel(activation, **repeats)
            weight = per_source_channel(weight, **repeats)
            scales = smoothing_scales(activation, weight, alpha)
            scales = _absorb(block, plan.group.producer, plans, scales)
            plan.scales = per_repeated_channel(scales, **repeats)
            for linear, w in plan.weights.items():
                plan.weights[linear] = (w * plan.scales).float()
    return folded


def _repeats(group: str, model_config: Any) -> dict[str, int]:
    """How value channels repeat in the group's input: only o_proj's do, under grouped queries."""
    if group != "o":
        return {"repeats": 1, "head_dim": 1}
    heads, kv_heads = model_config.num_attention_heads, model_config.num_key_value_heads
    return {"repeats": heads // kv_heads, "head_dim": head_dim(model_config)}


def _can_absorb(producer: str, plans: dict[str, GroupPlan]) -> bool:
    """A norm always can; a linear if it is quantized too, so that the scale rounds nothing."""
    is_linear = producer.endswith("_proj")
    return not is_linear or any(producer in plan.weights for plan in plans.values())


def _absorb(block: nn.Module, producer: str, plans: dict[str, GroupPlan], scales: Tensor) -> Tensor:
    """Divide the producer's output channels by scales; returns the scales that it represents."""
    module = block.get_submodule(producer)
    stored = module.bias if isinstance(module, nn.Linear) else module.weight
    if stored is not None:
        scales = representable(scales, stored)
        stored.data = (stored.double() / scales).to(stored.dtype)
    for plan in plans.values():
        if producer in plan.weights:
            plan.weights[producer] = (plan.weights[producer] / scales[:, None]).float()
    return scales


def _transform(
    config: QuantizeConfig,
    plan: GroupPlan,
    samples: Tensor | None,
    folded_scales: Tensor | None,
    generator: torch.Generator,
) -> InputTransform:
    """The input transform of one group, rounded to bfloat16 as it will be stored."""
    per_block = config.rotation == "per-block"
    blocks = plan.scales.numel() // BLOCK_SIZE
    x = None
    if samples is not None:
        x = samples / plan.scales.float()
        if folded_scales is not None:
            x = x / folded_scales.float()
    if config.method == "duquant":
        transform = duquant_transform(x, generator, per_block=per_block, max_steps=config.max_steps)
        if folded_scales is None:
            return transform
        first = transform.pre_rotation.matrix.double()
        first = BlockRotation.rounded(_scale_rows(first, folded_scales))
        return InputTransform(transform.rotation, first, transform.permutation)
    if config.method == "duquant++":
        matrix = outlier_aware(x, generator, per_block=per_block, max_steps=config.max_steps)
    elif config.method == "hadamard":
        matrix = hadamard(BLOCK_SIZE)
    elif config.method == "random":
        matrix = random_orthogonal(BLOCK_SIZE, generator, count=blocks if per_block else None)
    elif folded_scales is None:
        return InputTransform()
    else:
        matrix = torch.eye(BLOCK_SIZE, dtype=torch.float64)
    if folded_scales is not None:
        matrix = _scale_rows(matrix, folded_scales)
    elif per_block and matrix.dim() == 2:
        matrix = matrix.expand(blocks, -1, -1)
    return InputTransform(BlockRotation.rounded(matrix))


def _scale_rows(matrix: Tensor, scales: Tensor) -> Tensor:
    """diag(1/s) R for each block: float64 [K/32, 32, 32]."""
    return matrix / scales.view(-1, BLOCK_SIZE, 1)


def _hessians(
    block: nn.Module,
    index: int,
    config: QuantizeConfig,
    plans: dict[str, GroupPlan],
    inputs: BlockInputs | None,
    statistics: dict[str, InputStatistics] | None,
) -> dict[str, Tensor]:
    """GPTQ Hessians by group name; `hessian="quantized"` takes one more pass over the inputs."""
    if not config.gptq:
        return {}
    if config.hessian == "float":
        hessians = {}
        for name, plan in plans.items():
            own = statistics[name]
            hessians[name] = transform_second_moment(own.gram, own.tokens, plan.apply)
            own.gram = None  # as large as the Hessian, and not read again
        return hessians
    accumulators = {name: HessianAccumulator(p.scales.numel()) for name, p in plans.items()}

    def observe(plan: GroupPlan, accumulator: HessianAccumulator) -> Callable[[Tensor], None]:
        # The block's producers have absorbed the smoothing by now: only the transform is left.
        def update(x: Tensor) -> None:
            rotated = plan.transform.apply(x.flatten(0, -2).float())
            accumulator.update(dequantize(quantize(rotated, rule=config.activation_rule)))

        return update

    with ExitStack() as hooks, _smoothed_weights(block, plans):
        for name, plan in plans.items():
            reader = block.get_submodule(plan.group.linears[0])
            hooks.enter_context(observed(reader, observe(plan, accumulators[name])))
        for _ in inputs.outputs(block, index):
            pass
    return {name: accumulator.hessian() for name, accumulator in accumulators.items()}


@contextmanager
def _smoothed_weights(block: nn.Module, plans: dict[str, GroupPlan]) -> Iterator[None]:
    """The float block with smoothing in its linears too, so that it computes the same function."""
    for plan in plans.values():
        for name, weight in plan.weights.items():
            linear = block.get_submodule(name)
            linear.weight.data = weight.to(linear.weight.dtype)
    yield
