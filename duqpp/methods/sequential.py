"""The method duqpp: a decoder block, group by group, each on what those before it made."""

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from duqpp.calibration.hessian import ProductSum
from duqpp.calibration.silent import silent_channels, with_silent_excited
from duqpp.calibration.statistics import draw_sample, overflow_of_input
from duqpp.checkpoint.shard import Progress
from duqpp.errors import InputError
from duqpp.format import dequantize
from duqpp.methods import costs
from duqpp.methods.base import (
    Block,
    BlockResult,
    Method,
    Needs,
    QuantizedModel,
    Streams,
    TrainedModel,
)
from duqpp.methods.costs import ROWS_AT_A_TIME, SAMPLE_TOKENS
from duqpp.methods.group import (
    Drift,
    GroupPlan,
    block_amax,
    group_generator,
    group_outputs,
    named,
    observed,
    plan_group,
    quantize_weights,
    replace_linears,
    report_group,
    report_rows,
)
from duqpp.methods.options import SequentialOptions
from duqpp.methods.refine.blocks import CHECKS, refine_block
from duqpp.methods.refine.distill import CHECK_STEPS, EPOCHS, distill
from duqpp.methods.reports import GroupReport
from duqpp.models.family import LinearGroup
from duqpp.models.stack import BlockInputs
from duqpp.models.standing import Known, standing_in
from duqpp.ops import quantize
from duqpp.placement.ranks import Ranks
from duqpp.placement.stages import stage
from duqpp.rotation import BlockRotation, InputTransform
from duqpp.rotation.balance import balanced_transform, second_moments


class Sequential(Method):
    """A balanced transform for each block of 32 channels, GPTQ on what a linear will really get.

    A group's transform and Hessian come from the input that it will really get: that of the
    quantized stream, through the groups of this block that are quantized already. The whole input
    of one group, float32 [tokens, K], is in memory.
    """

    name = "duqpp"
    summary = (
        "ours: for each block of 32 channels the matrix that balances activations against weights, "
        "from their second moments"
    )
    Options = SequentialOptions
    options: SequentialOptions

    @property
    def needs(self) -> Needs:
        refines = self.options.refine != "none"
        return Needs(
            seed=True,
            inputs=True,
            float_stream=refines or self.options.drift > 0,
            refining=refines,
            whole_model=self.options.refine == "distill",
        )

    def stages(self, shape: costs.BlockShape, text: costs.Text | None) -> list[costs.Cost]:
        if text is None:
            return super().stages(shape, text)
        options = self.options
        stages = costs.sequential(
            shape,
            text,
            gptq=options.gptq,
            drift=options.drift > 0,
            float_stream=self.needs.float_stream,
            float_outputs=options.next_inputs == "float",
            latents=options.refine != "none",
        )
        if options.refine != "none":
            stages.append(costs.refined_block(shape, text, checks=CHECKS))
            stages.append(costs.quantized_pass(shape, text))
        return stages

    def training(
        self, model: costs.ModelShape, text: costs.Text, *, on_host: bool
    ) -> costs.Training:
        return costs.distilled(model, text, epochs=EPOCHS, check_steps=CHECK_STEPS, on_host=on_host)

    def quantize(self, block: Block, streams: Streams) -> BlockResult:
        inputs, outputs, targets, float_inputs = streams.inputs, None, None, None
        if inputs is None:
            raise InputError("duqpp calibrates on activations, and there are none")
        if self.options.next_inputs == "float":
            with stage("float pass"):
                outputs = list(inputs.outputs(block.module, block.index))
        calibrating = inputs
        if streams.exact is not None:
            calibrating = inputs.first(streams.calibrating)
            observed_batches = streams.calibrating if self.options.drift else 0
            targets, float_inputs = run_float_block(block, streams.exact, observed_batches)
        found = self.quantize_groups(block, calibrating, float_inputs)
        refined, latents = None, found.latents
        if self.options.refine != "none" and targets is not None:
            generator = group_generator(self.options.seed, f"{block.name}.refine")
            refined, latents = refine_block(
                block,
                latents,
                inputs,
                targets,
                self.options.weight_rule,
                generator,
                calibrating=streams.calibrating,
            )
        elif outputs is None:
            outputs = _outputs_of_block(block, inputs, found.known)
        if not self.needs.whole_model:
            latents = {}
        return BlockResult(found.reports, refined, latents, outputs, targets)

    def train(self, model: QuantizedModel, state: Path, progress: Progress) -> TrainedModel:
        generator = group_generator(self.options.seed, "distill")
        return distill(model, self.options.weight_rule, state, generator, progress)

    def quantize_groups(
        self,
        block: Block,
        inputs: BlockInputs,
        float_inputs: dict[str, Tensor] | None = None,
    ) -> "QuantizedGroups":
        """Replace the linears of a float block by quantized ones, in place, group after group.

        Args:
            inputs: of the quantized stream.
            float_inputs: of the float model, from `run_float_block`, which `drift` aims at; None or
                empty for nothing to make up for. Each is taken out when its group is quantized.
        Raises: InputError when an input is not finite, or a weight cannot be quantized.
        """
        done = QuantizedGroups()
        for group in block.groups:
            exact = float_inputs.pop(group.name) if float_inputs else None
            self._quantize_group(block, group, inputs, exact, done)
        return done

    def _quantize_group(
        self,
        block: Block,
        group: LinearGroup,
        inputs: BlockInputs,
        float_input: Tensor | None,
        done: "QuantizedGroups",
    ) -> None:
        """Replace the linears of the next group, and add what was done to `done`."""
        plan = plan_group(block, group)
        x = _group_input(block, group.linears[0], inputs, done.known)
        ranks, parts = inputs.placement.ranks, _parts(inputs)
        samples = _report_sample(x, self.options.seed, ranks)
        exact = group_outputs(plan, samples)
        with stage("statistics"):
            amax = ranks.max_(_channel_amax(x))
            plan.silent = silent_channels(amax)
        with named(plan.name):
            generator = group_generator(self.options.seed, plan.name)
            plan.transform = _transform(x, parts, plan, generator, ranks)
            hessian, drift, amax_after = _observe(x, float_input, parts, plan, self.options, ranks)
        del float_input
        read = x.to(inputs.placement.storage, inputs.hidden[0].dtype) if group.returns else None
        del x
        weights = quantize_weights(plan, self.options, hessian, drift, ranks)
        del hessian, drift
        replace_linears(block, plan, weights, self.layout())
        if group.returns is not None and read is not None:
            outputs = _outputs_of_linear(block, group.linears[0], inputs, read)
            done.known[group.owner] = Known(outputs, group.returns)
        if self.options.refine != "none":
            done.latents.update({name: weight.latent for name, weight in weights.items()})
        every = torch.arange(len(samples), device=samples.device)
        rule = self.options.activation_rule
        report = report_group(plan, weights, samples, every, exact, rule)
        before, after = (block_amax(channels[None]) for channels in (amax, amax_after))
        done.reports.append(replace(report, block_amax_before=before, block_amax=after))


@dataclass
class QuantizedGroups:
    """The groups of a block that are quantized so far.

    reports: one for each. latents: by linear, what its codes were rounded from, float32 [N, K], for
    refinement. known: by name, the modules of the block that will compute nothing else than they
    have computed, until something in them is trained.
    """

    reports: list[GroupReport] = field(default_factory=list)
    latents: dict[str, Tensor] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)


@stage("float pass")
def run_float_block(
    block: Block, inputs: BlockInputs, observed_batches: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a float block over the batches, and keep what its linear groups read in the first ones.

    Returns: outputs, batch by batch; and by group, of the first `observed_batches`, what it reads:
        [tokens, K] in the block's dtype, in an empty mapping where there are none.
    """
    groups = block.groups if observed_batches else []
    rows: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    with ExitStack() as stack:
        for group in groups:
            own = rows[group.name]

            def keep(x: Tensor, own: list[Tensor] = own) -> None:
                own.append(x.flatten(0, -2))

            reader = block.module.get_submodule(group.linears[0])
            stack.enter_context(observed(reader, keep))
        outputs = list(inputs.first(observed_batches).outputs(block.module, block.index))
    outputs += inputs.after(observed_batches).outputs(block.module, block.index)
    return outputs, {name: torch.cat(own) for name, own in rows.items()}


@stage("quantized pass")
def _group_input(
    block: Block, name: str, inputs: BlockInputs, known: Mapping[str, Known]
) -> Tensor:
    """What a linear reads, every row: float32 [tokens, K]. Raises: InputError for NaN, infinity."""
    reader = block.module.get_submodule(name)
    x = torch.empty(
        inputs.tokens, reader.in_features, dtype=torch.float32, device=reader.weight.device
    )
    filled = 0

    def update(batch: Tensor) -> None:
        nonlocal filled
        rows = batch.flatten(0, -2)
        x[filled : filled + len(rows)] = rows
        filled += len(rows)

    with observed(reader, update), standing_in(block.module, known, inputs.placement.compute):
        inputs.run_up_to(block.module, block.index, reader)
    if not torch.isfinite(torch.stack(x.aminmax())).all():
        raise overflow_of_input(f"{block.name}.{name}", reader.weight.dtype)
    return x


@stage("quantized pass")
def _outputs_of_linear(block: Block, name: str, inputs: BlockInputs, read: Tensor) -> list[Tensor]:
    """What a linear gives for its input [tokens, K], batch by batch, where activations rest."""
    linear, outputs, placement = block.module.get_submodule(name), [], inputs.placement
    shapes = [hidden.shape[:2] for hidden in inputs.hidden]
    with torch.no_grad():
        for rows, shape in zip(read.split([s.numel() for s in shapes]), shapes, strict=True):
            x = rows.to(placement.compute).view(*shape, -1)
            outputs.append(linear(x).to(placement.storage))
    return outputs


@stage("quantized pass")
def _outputs_of_block(
    block: Block, inputs: BlockInputs, known: Mapping[str, Known]
) -> list[Tensor]:
    """What a quantized block gives, batch by batch."""
    with standing_in(block.module, known, inputs.placement.compute):
        return list(inputs.outputs(block.module, block.index))


def _parts(inputs: BlockInputs) -> list[int]:
    """How many tokens are summed up in float32 at a time: no part has those of two batches, so that
    it is the same however the batches are shared out over ranks."""
    batches = [hidden.shape[0] * hidden.shape[1] for hidden in inputs.hidden]
    return [
        min(ROWS_AT_A_TIME, tokens - start)
        for tokens in batches
        for start in range(0, tokens, ROWS_AT_A_TIME)
    ]


def _report_sample(x: Tensor, seed: int, ranks: Ranks) -> Tensor:
    """The rows of a group's input that its report is of, from all ranks' x [tokens, K]."""
    before, tokens = ranks.place(len(x))
    drawn = draw_sample(tokens, SAMPLE_TOKENS, seed)
    rows = drawn[report_rows(len(drawn))] - before
    own = rows[(rows >= 0) & (rows < len(x))]
    return ranks.gather(x[own.to(x.device)])


@stage("transform")
def _transform(
    x: Tensor, parts: list[int], plan: GroupPlan, generator: torch.Generator, ranks: Ranks
) -> InputTransform:
    """What balances a group's input x [tokens, K] with its weights, as it is stored."""
    weights = torch.cat(list(plan.weights.values()))
    activation_moments = ranks.sum_(second_moments(x, parts))
    weight_moments = second_moments(weights)
    for name, moments in (("input", activation_moments), ("weights", weight_moments)):
        if not torch.isfinite(moments).all():
            raise InputError(f"the squares of its {name} overflow float32")
    if plan.silent is not None and len(plan.silent):
        activation_moments = with_silent_excited(activation_moments, plan.silent)
    matrix = balanced_transform(activation_moments, weight_moments, generator)
    return InputTransform(BlockRotation.rounded(matrix))


def _channel_amax(x: Tensor) -> Tensor:
    """The largest magnitude of each channel of x [tokens, K], without a copy of x: [K]."""
    return torch.maximum(x.amax(0), -x.amin(0))


class _Observed(NamedTuple):
    """hessian, drift: H and C of `making_up_for_drift`, float32 [K, K], of the transformed input,
    rounded or not; None where GPTQ is off, and drift where it is not made up for.
    amax: the largest magnitude of each transformed channel, [K].
    """

    hessian: Tensor | None
    drift: Drift | None
    amax: Tensor


@stage("hessian")
def _observe(
    x: Tensor,
    exact: Tensor | None,
    parts: list[int],
    plan: GroupPlan,
    options: SequentialOptions,
    ranks: Ranks,
) -> _Observed:
    """Go once through a group's input x [tokens, K] as it is quantized.

    Args: exact: what the group reads in the float model, [tokens, K] in any dtype.
    """
    channels, device = x.shape[1], x.device
    hessians = ProductSum(channels, device, symmetric=True) if options.gptq else None
    drifts = ProductSum(channels, device) if options.gptq and exact is not None else None
    amax = x.new_zeros(channels)
    exact_parts = itertools.repeat(None) if exact is None else exact.split(parts)

    def take_in(rows: Tensor, exact_rows: Tensor | None) -> Tensor:
        rotated = plan.transform.apply(rows)
        if hessians is not None:
            rounded = rotated
            if options.hessian == "quantized":
                rounded = dequantize(quantize(rotated, rule=options.activation_rule))
            hessians.update(rounded, rounded)
            if exact_rows is not None and drifts is not None:
                change = plan.transform.apply(exact_rows.to(device).float()).sub_(rotated)
                drifts.update(change, rounded)
        return _channel_amax(rotated)

    for rows, exact_rows in zip(x.split(parts), exact_parts, strict=False):
        amax = torch.maximum(amax, take_in(rows, exact_rows))
    hessian, drift = (None if sums is None else sums.mean(ranks) for sums in (hessians, drifts))
    if drift is not None and not torch.stack(drift.aminmax()).isfinite().all():
        raise InputError("the float model's activations are not finite, or overflow float32")
    made_up = None if drift is None else Drift(drift, options.drift)
    return _Observed(hessian, made_up, ranks.max_(amax))
