"""Smoothing of a decoder block: channel scales move from activations into weights."""

from collections.abc import Mapping

from torch import Tensor

from duqpp.calibration.smoothing import smoothing_scales
from duqpp.calibration.statistics import InputStatistics
from duqpp.methods.base import Block
from duqpp.methods.group import GroupPlan


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
    weights = {n: plan.weights.pop(n) for plan in plans.values() for n in plan.group.linears}
    # Against the order of the forward pass: a linear that makes the input of another group takes up
    # that group's scales before its own input is smoothed.
    for plan in reversed(list(plans.values())):
        group = plan.group
        plan.weights = {name: weights.pop(name) for name in group.linears}
        if group.producer is None or not group.is_whole:
            continue
        activation = group.per_source(statistics[group.name].amax)
        weight = group.per_source(plan.channel_amax())
        scales = smoothing_scales(activation, weight, alpha)
        absorbed = group.producer.absorb(block.module, weights, scales)
        if absorbed is not None:
            plan.scales = group.per_reader(absorbed)
            plan.weights = {n: (w * plan.scales).float() for n, w in plan.weights.items()}
