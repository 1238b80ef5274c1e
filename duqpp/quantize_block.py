"""Quantize one decoder block: smooth, build transforms, fold and round the weights."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.calibration.gptq import gptq
from duqpp.calibration.hessian import HessianAccumulator, transform_second_moment
from duqpp.calibration.smoothing import (
    per_repeated_channel,
    per_source_channel,
    representable,
    smoothing_scales,
)
from duqpp.calibration.statistics import InputStatistics, draw_sample
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, dequantize
from duqpp.models.layout import Layout, convert_block
from duqpp.models.llama import (
    BlockInputs,
    LinearGroup,
    head_dim,
    is_whole,
    layer_prefix,
    quantized_groups,
)
from duqpp.nn import MXFP4Linear
from duqpp.ops import quantize
from duqpp.rotation import BlockRotation, InputTransform
from duqpp.rotation.basis import hadamard, random_orthogonal
from duqpp.rotation.construct import duquant_transform, outlier_aware

SAMPLE_TOKENS = 1024  # random rows kept of each input, besides the rows of channel peaks
REPORT_ROWS = 256  # of them, on which the report's errors are measured


@dataclass(frozen=True)
class GroupReport:
    """What quantization did to one linear group.

    name: for instance "model.layers.3.qkv". Errors are relative: ||quantized - exact|| / ||exact||.
    weight_error: of the folded weights. activation_error_before, activation_error: of the input
    quantized as it is, and transformed. output_error: of the group's outputs. block_amax_before,
    block_amax: largest magnitude of each block of 32 channels among the samples, untransformed and
    transformed. The last five are None for a method that reads no activations.
    """

    name: str
    weight_error: float
    activation_error_before: float | None = None
    activation_error: float | None = None
    output_error: float | None = None
    block_amax_before: list[float] | None = None
    block_amax: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass
class _Plan:
    """One group on its way: weights in float32, what absorbs its smoothing, and its transform.

    weights: by name, with smoothing folded in. scales: float64 [K], what the group's input is
    divided by before it arrives (by the producer). transform: what the group itself does to it.
    """

    group: LinearGroup
    weights: dict[str, Tensor]
    scales: Tensor
    transform: InputTransform = field(default_factory=InputTransform)

    def apply(self, x: Tensor) -> Tensor:
        """From the float model's input of the group to what is quantized: [..., K]."""
        return self.transform.apply(x / self.scales.to(x.dtype))


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
            hooks.enter_context(_observed(reader, statistics[group.name].update))
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
) -> list[GroupReport]:
    """Replace the linears of a float block by quantized ones, in place.

    Args:
        inputs, statistics: from calibration; None for a method that reads no activations.
        model_config: transformers configuration, for the attention heads.
    Returns: one report per linear group.
    Raises: InputError when a weight cannot be quantized; it names the linear.
    """
    groups = quantized_groups(index, config.skip)
    plans = {g.name: _plan(block, g) for g in groups}
    samples = {name: s.samples() for name, s in (statistics or {}).items()}
    exact = {name: _outputs(plans[name], samples[name][:REPORT_ROWS]) for name in samples}
    smoothed_scales = _smooth(block, plans, statistics, config, model_config)
    for name, plan in plans.items():
        generator = _generator(config.seed, f"{layer_prefix(index)}.{name}")
        plan.transform = _transform(
            config, plan, samples.get(name), smoothed_scales.get(name), generator
        )
    hessians = _hessians(block, index, config, plans, inputs, statistics)
    biases = {n: block.get_submodule(n).bias for g in groups for n in g.linears}
    convert_block(block, index, layout, device="cpu")
    reports = []
    for name, plan in plans.items():
        quantized = _quantize_weights(plan, hessians.get(name), config, index)
        for linear_name, (weight, _) in quantized.items():
            linear = block.get_submodule(linear_name)
            _fill(linear, weight, plan.transform, biases[linear_name])
        reports.append(_report(index, plan, quantized, samples.get(name), exact.get(name), config))
    return reports


def _plan(block: nn.Module, group: LinearGroup) -> _Plan:
    weights = {n: block.get_submodule(n).weight.detach().float() for n in group.linears}
    channels = next(iter(weights.values())).shape[1]
    return _Plan(group, weights, torch.ones(channels, dtype=torch.float64))


def _smooth(
    block: nn.Module,
    plans: dict[str, _Plan],
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


def _can_absorb(producer: str, plans: dict[str, _Plan]) -> bool:
    """A norm always can; a linear if it is quantized too, so that the scale rounds nothing."""
    is_linear = producer.endswith("_proj")
    return not is_linear or any(producer in plan.weights for plan in plans.values())


def _absorb(block: nn.Module, producer: str, plans: dict[str, _Plan], scales: Tensor) -> Tensor:
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
    plan: _Plan,
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
    plans: dict[str, _Plan],
    inputs: BlockInputs | None,
    statistics: dict[str, InputStatistics] | None,
) -> dict[str, Tensor]:
    """GPTQ Hessians by group name; `hessian="quantized"` takes one more pass over the inputs."""
    if not config.gptq:
        return {}
    if config.hessian == "float":
        return {
            name: transform_second_moment(
                statistics[name].gram, statistics[name].tokens, plan.apply
            )
            for name, plan in plans.items()
        }
    accumulators = {name: HessianAccumulator(p.scales.numel()) for name, p in plans.items()}

    def observe(plan: _Plan, accumulator: HessianAccumulator):
        # The block's producers have absorbed the smoothing by now: only the transform is left.
        def update(x: Tensor) -> None:
            rotated = plan.transform.apply(x.flatten(0, -2).float())
            accumulator.update(dequantize(quantize(rotated, rule=config.activation_rule)))

        return update

    with ExitStack() as hooks, _smoothed_weights(block, plans):
        for name, plan in plans.items():
            reader = block.get_submodule(plan.group.linears[0])
            hooks.enter_context(_observed(reader, observe(plan, accumulators[name])))
        for _ in inputs.outputs(block, index):
            pass
    return {name: accumulator.hessian() for name, accumulator in accumulators.items()}


@contextmanager
def _smoothed_weights(block: nn.Module, plans: dict[str, _Plan]) -> Iterator[None]:
    """The float block with smoothing in its linears too, so that it computes the same function."""
    for plan in plans.values():
        for name, weight in plan.weights.items():
            linear = block.get_submodule(name)
            linear.weight.data = weight.to(linear.weight.dtype)
    yield


@contextmanager
def _observed(module: nn.Module, update: Any) -> Iterator[None]:
    """Call `update` with every input that the module gets."""
    handle = module.register_forward_pre_hook(lambda _, args: update(args[0]))
    try:
        yield
    finally:
        handle.remove()


def _quantize_weights(
    plan: _Plan, hessian: Tensor | None, config: QuantizeConfig, index: int
) -> dict[str, tuple[MXFP4Tensor, Tensor]]:
    """Folded weights of a group, quantized and exact, by name."""
    names = list(plan.weights)
    exact = plan.transform.fold(torch.cat([plan.weights[n] for n in names])).float()  # [sum N, K]
    if not torch.isfinite(exact).all():
        raise InputError(f"{layer_prefix(index)}.{names[0]}: folded weights overflow float32")
    if hessian is None:
        quantized = quantize(exact, rule=config.weight_rule)
    else:
        try:
            quantized = gptq(exact, hessian, rule=config.weight_rule, damping=config.damping)
        except InputError as error:
            raise InputError(f"{layer_prefix(index)}.{names[0]}: {error}") from error
    rows = [plan.weights[n].shape[0] for n in names]
    parts = zip(
        names,
        quantized.codes.split(rows),
        quantized.scales.split(rows),
        exact.split(rows),
        strict=True,
    )
    return {name: (MXFP4Tensor(codes, scales), w) for name, codes, scales, w in parts}


def _fill(
    linear: MXFP4Linear, weight: MXFP4Tensor, transform: InputTransform, bias: Tensor | None
) -> None:
    """Give a converted linear its values; each linear owns its storage."""
    linear.weight_packed.data = weight.codes.clone()
    linear.weight_scale.data = weight.scales.clone()
    if transform.rotation is not None:
        linear.rotation.data = transform.rotation.matrix.clone()
    if transform.pre_rotation is not None:
        linear.pre_rotation.data = transform.pre_rotation.matrix.clone()
        linear.permutation.data = transform.permutation.clone()
    if bias is not None:
        linear.bias.data = bias.detach().clone()
    linear.prepare()


def _outputs(plan: _Plan, x: Tensor) -> Tensor:
    """Exact outputs of a group, float32 [n, sum N], before anything is changed."""
    return x @ torch.cat(list(plan.weights.values())).T


def _report(
    index: int,
    plan: _Plan,
    quantized: dict[str, tuple[MXFP4Tensor, Tensor]],
    samples: Tensor | None,
    exact_output: Tensor | None,
    config: QuantizeConfig,
) -> GroupReport:
    name = f"{layer_prefix(index)}.{plan.group.name}"
    weight = torch.cat([dequantize(q) for q, _ in quantized.values()])
    weight_error = _relative(weight, torch.cat([w for _, w in quantized.values()]))
    if samples is None:
        return GroupReport(name, weight_error)
    transformed = plan.apply(samples)
    before, x = samples[:REPORT_ROWS], transformed[:REPORT_ROWS]
    rounded = dequantize(quantize(x, rule=config.activation_rule))
    plain = dequantize(quantize(before, rule=config.activation_rule))
    return GroupReport(
        name,
        weight_error,
        activation_error_before=_relative(plain, before),
        activation_error=_relative(rounded, x),
        output_error=_relative(rounded @ weight.T, exact_output),
        block_amax_before=_block_amax(samples),
        block_amax=_block_amax(transformed),
    )


def _block_amax(x: Tensor) -> list[float]:
    amax = x.abs().amax(0).view(-1, BLOCK_SIZE).amax(1)
    return [float(f"{value:.4g}") for value in amax.tolist()]


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm().clamp(min=1e-30))


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator for one linear group, the same whichever groups came before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
