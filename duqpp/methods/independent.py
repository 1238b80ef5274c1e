"""Methods that fit each linear group of a decoder block by itself, to its float inputs."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from duqpp.calibration.hessian import ProductSum, transform_second_moment
from duqpp.calibration.silent import silent_channels
from duqpp.calibration.statistics import InputStatistics, draw_sample
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, dequantize
from duqpp.methods import costs
from duqpp.methods.base import Block, BlockResult, Method, Needs, Streams
from duqpp.methods.costs import SAMPLE_TOKENS
from duqpp.methods.group import (
    GroupPlan,
    group_generator,
    group_outputs,
    named,
    observed,
    plan_group,
    plan_weights,
    quantize_weights,
    replace_linears,
    report_group,
    report_rows,
)
from duqpp.methods.options import Options
from duqpp.methods.reports import GroupReport
from duqpp.methods.smoothing import smooth_into_producers, smoothed_per_block
from duqpp.models.family import LinearGroup
from duqpp.models.stack import BlockInputs
from duqpp.ops import quantize
from duqpp.placement.stages import stage
from duqpp.rotation import BlockRotation, InputTransform


@dataclass(frozen=True)
class GroupInput:
    """What a group's transform is made for.

    blocks: K / 32. samples: of inputs, float32 [n, K]; None for a method that reads none. scales:
    float64 [K], what a producer divides them by. folded_scales: float64 [K], smoothing that becomes
    part of the transform; None for none. generator: the group's own.
    """

    blocks: int
    samples: Tensor | None
    scales: Tensor
    folded_scales: Tensor | None
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        """Where the transform belongs."""
        return self.scales.device

    def x(self) -> Tensor:
        """The samples, smoothed: a copy, for as long as the transform is made."""
        if self.samples is None:
            raise ValueError("there are no samples")
        x = self.samples / self.scales.float()
        return x if self.folded_scales is None else x.div_(self.folded_scales.float())


class Independent(Method):
    """A transform for each group, made at once, and weights rounded to nearest or by GPTQ.

    fitted: whether the transforms are made from activations. random: whether from random numbers.
    """

    fitted: ClassVar[bool] = False
    random: ClassVar[bool] = False
    options: Options

    @property
    def needs(self) -> Needs:
        inputs = self.fitted or self.options.gptq or self.options.smooth_alpha > 0
        return Needs(seed=inputs or self.random, inputs=inputs)

    @property
    def per_block(self) -> bool:
        """Whether each block of 32 channels has a matrix of its own."""
        return self.options.rotation == "per-block"

    @abstractmethod
    def transforms(
        self, block: Block, groups: Mapping[str, GroupInput], inputs: BlockInputs | None
    ) -> dict[str, InputTransform]:
        """The input transforms of a block's groups by name, rounded to bfloat16 as stored."""

    def stages(self, shape: costs.BlockShape, text: costs.Text | None) -> list[costs.Cost]:
        options = self.options
        return costs.independent(
            shape,
            text,
            rotated=self.rotated,
            gptq=options.gptq,
            float_hessian=options.hessian == "float",
            smoothed=options.smooth_alpha > 0,
            float_outputs=options.next_inputs == "float",
            search=self.search_steps,
        )

    @property
    def search_steps(self) -> int:
        """Steps of a greedy search for each group's transform, for `stages`."""
        return 0

    def quantize(self, block: Block, streams: Streams) -> BlockResult:
        statistics, outputs = self.observe(block, streams.inputs)
        plans = {group.name: plan_group(block, group) for group in block.groups}
        for name, own in statistics.items():
            plans[name].silent = silent_channels(own.amax)
        samples = {name: own.samples() for name, own in statistics.items()}
        ranks, tokens = streams.ranks, [own.tokens for own in statistics.values()]
        rows = report_rows(min(tokens[0], SAMPLE_TOKENS)) if tokens else None
        exact = {name: group_outputs(plans[name], samples[name][rows]) for name in samples}
        folded = self._smooth(block, plans, statistics)
        groups = {
            name: self._group_input(plan, samples.get(name), folded.get(name))
            for name, plan in plans.items()
        }
        with stage("transform"):
            made = self.transforms(block, groups, streams.inputs)
        for name, transform in made.items():
            plans[name].transform = transform
        hessians = self._hessians(block, plans, streams.inputs, statistics)
        del groups, statistics  # which have the samples, too

        def quantized(name: str) -> GroupReport:
            """Everything of a group is let go of with it."""
            plan, rule = plans.pop(name), self.options.activation_rule
            weights = quantize_weights(plan, self.options, hessians.pop(name, None), ranks=ranks)
            replace_linears(block, plan, weights, self.layout())
            return report_group(plan, weights, samples.pop(name, None), rows, exact.get(name), rule)

        return BlockResult([quantized(name) for name in list(plans)], outputs=outputs)

    @stage("float pass")
    def observe(
        self, block: Block, inputs: BlockInputs | None
    ) -> tuple[dict[str, InputStatistics], list[Tensor] | None]:
        """Run the float block over its inputs.

        Returns: statistics by group name, of the tokens of all ranks, empty without inputs; and the
            block's outputs if the next block reads those.
        """
        if inputs is None:
            return {}, None
        ranks, outputs = inputs.placement.ranks, None
        before, tokens = ranks.place(inputs.tokens)
        sample = draw_sample(tokens, SAMPLE_TOKENS, self.options.seed)
        wants_moment = self.options.gptq and self.options.hessian == "float"
        statistics = {}
        with ExitStack() as hooks:
            for group in block.groups:
                reader = block.module.get_submodule(group.linears[0])
                statistics[group.name] = InputStatistics(
                    f"{block.name}.{group.linears[0]}",
                    reader.in_features,
                    sample,
                    second_moment=wants_moment,
                    before=before,
                    device=reader.weight.device,
                )
                hooks.enter_context(observed(reader, statistics[group.name].update))
            if self.options.next_inputs == "float" or not statistics:
                outputs = list(inputs.outputs(block.module, block.index))
            else:  # groups are listed in the order of the forward pass
                inputs.run_up_to(block.module, block.index, reader)
        for own in statistics.values():
            own.merge(ranks)
        return statistics, outputs

    @stage("smoothing")
    def _smooth(
        self,
        block: Block,
        plans: Mapping[str, GroupPlan],
        statistics: Mapping[str, InputStatistics],
    ) -> dict[str, Tensor]:
        """Smooth the groups. Returns: the scales that become part of a group's transform."""
        alpha = self.options.smooth_alpha
        if alpha == 0 or not statistics:
            return {}
        if self.per_block:
            return smoothed_per_block(plans, statistics, alpha)
        smooth_into_producers(block, plans, statistics, alpha)
        return {}

    def _group_input(
        self, plan: GroupPlan, samples: Tensor | None, folded_scales: Tensor | None
    ) -> GroupInput:
        blocks = plan.scales.numel() // BLOCK_SIZE
        generator = group_generator(self.options.seed, plan.name)
        return GroupInput(blocks, samples, plan.scales, folded_scales, generator)

    @stage("hessian")
    def _hessians(
        self,
        block: Block,
        plans: Mapping[str, GroupPlan],
        inputs: BlockInputs | None,
        statistics: Mapping[str, InputStatistics],
    ) -> dict[str, Tensor]:
        """GPTQ Hessians by group name; `hessian="quantized"` takes one more pass over inputs."""
        if not self.options.gptq or inputs is None:
            return {}
        ranks = inputs.placement.ranks
        if self.options.hessian == "float":
            hessians = {}
            for name, plan in plans.items():
                own = statistics[name]
                hessians[name] = transform_second_moment(
                    own.take_gram(ranks), own.tokens, plan.apply
                )
            return hessians
        sums = {
            name: ProductSum(plan.scales.numel(), plan.scales.device, symmetric=True)
            for name, plan in plans.items()
        }

        def observe(plan: GroupPlan, products: ProductSum) -> Callable[[Tensor], None]:
            # The block's producers have absorbed the smoothing by now: only the transform is left.
            @stage("hessian")
            def update(x: Tensor) -> None:
                rotated = plan.transform.apply(x.flatten(0, -2).float())
                rounded = dequantize(quantize(rotated, rule=self.options.activation_rule))
                products.update(rounded, rounded)

            return update

        _take_smoothed_weights(block, plans.values())
        with ExitStack() as hooks:
            for name, plan in plans.items():
                reader = block.module.get_submodule(plan.group.linears[0])
                hooks.enter_context(observed(reader, observe(plan, sums[name])))
            with stage("float pass"):
                for _ in inputs.outputs(block.module, block.index):
                    pass
        return {name: products.mean(ranks) for name, products in sums.items()}


class GroupByGroup(Independent):
    """Methods that make each group's transform from that group alone."""

    @abstractmethod
    def transform(self, group: GroupInput) -> InputTransform:
        """The input transform of one group, rounded to bfloat16 as it will be stored."""

    def transforms(
        self, block: Block, groups: Mapping[str, GroupInput], inputs: BlockInputs | None
    ) -> dict[str, InputTransform]:
        made = {}
        for name, group in groups.items():
            with named(f"{block.name}.{name}"):
                made[name] = self.transform(group)
        return made

    def quantize_linear(
        self, block_name: str, group: LinearGroup, weight: Tensor
    ) -> tuple[MXFP4Tensor, InputTransform]:
        if self.needs.inputs:
            return super().quantize_linear(block_name, group, weight)
        (linear,) = group.linears
        plan = plan_weights(block_name, group, {linear: weight})
        with named(plan.name):
            plan.transform = self.transform(self._group_input(plan, None, None))
        return quantize_weights(plan, self.options, None)[linear].quantized, plan.transform


class OneMatrix(GroupByGroup):
    """Methods that multiply each block of a group's input by one matrix."""

    @abstractmethod
    def matrix(self, group: GroupInput) -> Tensor | None:
        """The matrix of one group, float64 [32, 32] or [K/32, 32, 32]; None is the identity."""

    def transform(self, group: GroupInput) -> InputTransform:
        matrix = self.matrix(group)
        if group.folded_scales is not None:
            if matrix is None:
                matrix = torch.eye(BLOCK_SIZE, dtype=torch.float64, device=group.device)
            matrix = scale_rows(matrix, group.folded_scales)
        if matrix is None:
            return InputTransform()
        if self.per_block and matrix.dim() == 2:
            matrix = matrix.expand(group.blocks, -1, -1)
        return InputTransform(BlockRotation.rounded(matrix))


def scale_rows(matrix: Tensor, scales: Tensor) -> Tensor:
    """diag(1/s) R for each block of 32: float64 [K/32, 32, 32].

    Args: matrix: R, [32, 32] or [K/32, 32, 32]. scales: s, float64 [K].
    """
    return matrix / scales.view(-1, BLOCK_SIZE, 1)


def _take_smoothed_weights(block: Block, plans: Iterable[GroupPlan]) -> None:
    """Give the float block's linears the smoothing of their weights, so that it computes the same
    function as before its producers were divided."""
    for plan in plans:
        for name, weight in plan.weights.items():
            linear = block.module.get_submodule(name)
            linear.weight.data = weight.to(linear.weight.dtype)
