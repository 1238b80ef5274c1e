"""Smoothing of a decoder block: channel scales move from activations into weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from duqpp.calibration.smoothing import (
    per_repeated_channel,
    per_source_channel,
    representable,
    smoothing_scales,
)
from duqpp.calibration.statistics import InputStatistics
from duqpp.methods.base import Block
from duqpp.methods.group import GroupPlan
from duqpp.models.family import head_dim, is_whole


def smoothed_per_block(
    plans: Mapping[str, GroupPlan], statistics: Mapping[str, InputStatistics], alpha: float
) -> dict[str, Tensor]:
    """Channel scales by group, float64 [K], for groups with one matrix per block of 32 channels.

    They become part of that matrix: no producer is touched.
    """
    return {
        name: smoothing_scales(statistics[name].amax, plan.channel_amax(), alpha)
        for name, plan in plans.items()
    }


def smooth_into_producers(
    block: Block,
    plans: Mapping[str, GroupPlan],
    statistics: Mapping[str, InputStatistics],
    alpha: float,
) -> None:
    """Divide the producer of each group's input by channel scales, and multiply its readers.

    A group whose producer or members are in floating point is left as it is.
    """
    # Consumers before producers: v_proj and up_proj take up scales before they are smoothed.
    for name in sorted(plans, key=("o", "down", "qkv", "gate_up").index):
        plan = plans[name]
        if not is_whole(plan.group) or not _can_absorb(plan.group.producer, plans):
            continue
        repeats = _repeats(name, block.config)
        activation = per_source_channel(statistics[name].amax, **repeats)
        weight = per_source_channel(plan.channel_amax(), **repeats)
        scales = smoothing_scales(activation, weight, alpha)
        scales = _absorb(block.module, plan.group.producer, plans, scales)
        plan.scales = per_repeated_channel(scales, **repeats)
        for linear, w in plan.weights.items():
            plan.weights[linear] = (w * plan.scales).float()


def _repeats(group: str, config: Any) -> dict[str, int]:
    """How value channels repeat in the group's input: only o_proj's do, under grouped queries."""
    if group != "o":
        return {"repeats": 1, "head_dim": 1}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return {"repeats": heads // kv_heads, "head_dim": head_dim(config)}


def _can_absorb(producer: str, plans: Mapping[str, GroupPlan]) -> bool:
    """A norm always can; a linear if it is quantized too, so that the scale rounds nothing."""
    is_linear = producer.endswith("_proj")
    return not is_linear or any(producer in plan.weights for plan in plans.values())


def _absorb(
    block: nn.Module, producer: str, plans: Mapping[str, GroupPlan], scales: Tensor
) -> Tensor:
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
