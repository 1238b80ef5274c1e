"""One linear group on its way to MXFP4: its plan, its rounded weights, its report."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from duqpp.calibration.drift import making_up_for_drift
from duqpp.calibration.gptq import Gptq
from duqpp.calibration.silent import excite_silent, without_silent
from duqpp.checkpoint.layout import Layout, convert_group
from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize
from duqpp.methods.base import Block
from duqpp.methods.costs import REPORT_ROWS, WEIGHTS_AT_A_TIME
from duqpp.methods.options import Options
from duqpp.methods.reports import GroupReport
from duqpp.models.family import LinearGroup
from duqpp.nn import MXFP4Linear
from duqpp.ops import quantize
from duqpp.placement import HOST, host_generator
from duqpp.placement.ranks import ALONE, Ranks
from duqpp.placement.stages import stage
from duqpp.rotation import InputTransform


@dataclass
class GroupPlan:
    """One group on its way: weights in float32, what absorbs its smoothing, and its transform.

    block: name of its decoder block. weights: by name in it, with smoothing folded in. scales:
    float64 [K], what the group's input is divided by before it arrives (by the producer).
    transform: what the group itself does to it. silent: int64, the channels of the input that
    calibration does not excite; None where nothing was observed.
    """

    block: str
    group: LinearGroup
    weights: dict[str, Tensor]
    scales: Tensor
    transform: InputTransform = field(default_factory=InputTransform)
    silent: Tensor | None = None

    @property
    def name(self) -> str:
        """In the model, as "model.layers.3.qkv"."""
        return f"{self.block}.{self.group.name}"

    @property
    def first_linear(self) -> str:
        """The first linear's name in the model."""
        return f"{self.block}.{self.group.linears[0]}"

    def channel_amax(self) -> Tensor:
        """The largest magnitude in each input channel of the weights: float32 [K]."""
        return torch.stack([w.abs().amax(0) for w in self.weights.values()]).amax(0)

    def apply(self, x: Tensor) -> Tensor:
        """From the float model's input of the group to what is quantized: [..., K]."""
        return self.transform.apply(x / self.scales.to(x.dtype))


def plan_group(block: Block, group: LinearGroup) -> GroupPlan:
    """The plan of a group of a float block, before anything is smoothed."""
    weights = {name: block.module.get_submodule(name).weight for name in group.linears}
    return plan_weights(block.name, group, weights)


def plan_weights(block: str, group: LinearGroup, weights: Mapping[str, Tensor]) -> GroupPlan:
    """`plan_group` of these weights, floating point [N, K] by linear."""
    own = {name: weight.detach().float() for name, weight in weights.items()}
    first = own[group.linears[0]]
    scales = torch.ones(first.shape[1], dtype=torch.float64, device=first.device)
    return GroupPlan(block, group, own, scales)


class Drift(NamedTuple):
    """sums: float32 [K, K], C of `making_up_for_drift`. share: of it that is made up for."""

    sums: Tensor
    share: float


class RoundedWeight(NamedTuple):
    """A folded weight [N, K]: quantized, exact, and what its codes were rounded from.

    exact, latent: float32. Without GPTQ they are the same.
    """

    quantized: MXFP4Tensor
    exact: Tensor
    latent: Tensor


@contextmanager
def observed(module: nn.Module, update: Callable[[Tensor], Any]) -> Iterator[None]:
    """Call `update` with every input that the module gets."""
    handle = module.register_forward_pre_hook(lambda _, args: update(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of what is being quantized before an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def quantize_weights(
    plan: GroupPlan,
    options: Options,
    hessian: Tensor | None,
    drift: Drift | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, RoundedWeight]:
    """Folded weights of a group by name.

    Args:
        hessian: float32 [K, K] for GPTQ, which takes it over; None for rounding to nearest.
        drift: what GPTQ makes up for; None for nothing.
        ranks: those that have the same arguments, and share the rows of GPTQ.
    """
    parts = [_folded(plan, part) for part in _in_parts(plan)]
    if hessian is None:
        with stage("rounding"):
            rounded = [
                RoundedWeight(quantize(part, rule=options.weight_rule), part, part)
                for part in parts
            ]
    else:
        gptq, targets = _prepared(plan, parts, options, hessian, drift, ranks)
        del hessian, drift
        rounded = _by_gptq(gptq, parts, targets, options, ranks)
    return _by_linear(plan, rounded)


def _in_parts(plan: GroupPlan) -> list[Tensor]:
    """The weights of a group, all linears' rows in one, or rows of one linear in each."""
    weights = list(plan.weights.values())
    if sum(weight.numel() for weight in weights) <= WEIGHTS_AT_A_TIME:
        return [torch.cat(weights)]
    return [part for weight in weights for part in weight.split(_rows_at_a_time(weight))]


def _rows_at_a_time(weight: Tensor) -> int:
    rows: int = WEIGHTS_AT_A_TIME // weight.shape[1]
    return max(1, rows)


@stage("fold")
def _folded(plan: GroupPlan, weight: Tensor) -> Tensor:
    """Some rows of a group in the basis of its transformed input, float32 [n, K]."""
    exact = plan.transform.fold(weight).float()
    if not torch.isfinite(exact).all():
        raise InputError(f"{plan.first_linear}: folded weights overflow float32")
    return exact


def _prepared(
    plan: GroupPlan,
    parts: list[Tensor],
    options: Options,
    hessian: Tensor,
    drift: Drift | None,
    ranks: Ranks,
) -> tuple[Gptq, list[Tensor]]:
    """What GPTQ makes of a group's Hessian, and this rank's rows of each part that it rounds."""
    if _has_silent(plan):
        excite_silent(hessian, plan.silent, plan.transform.apply)
    targets = [part[ranks.share(len(part))] for part in parts]
    if drift is not None:
        targets = _drift_targets(plan, targets, hessian, drift)
    with named(plan.first_linear):
        return Gptq.of(hessian, damping=options.damping, order=options.block_order), targets


def _by_gptq(
    gptq: Gptq, parts: list[Tensor], targets: list[Tensor], options: Options, ranks: Ranks
) -> list[RoundedWeight]:
    """The folded parts of a group's weights by GPTQ."""
    rounded = []
    for exact, target in zip(parts, targets, strict=True):
        made = gptq.round(target, options.weight_rule)
        codes, scales = ranks.gather(made.weight.codes), ranks.gather(made.weight.scales)
        latent = ranks.gather(made.compensated)
        rounded.append(RoundedWeight(MXFP4Tensor(codes, scales), exact, latent))
    return rounded


def _by_linear(plan: GroupPlan, parts: list[RoundedWeight]) -> dict[str, RoundedWeight]:
    """What `_in_parts` has taken apart, or together, by linear."""
    rows = {name: len(weight) for name, weight in plan.weights.items()}
    if len(parts) == 1:
        return dict(zip(rows, _split(parts[0], list(rows.values())), strict=True))
    made, left = {}, iter(parts)
    for name, count in rows.items():
        own = [next(left)]
        while sum(len(part.exact) for part in own) < count:
            own.append(next(left))
        made[name] = _joined(own)
    return made


def _split(weight: RoundedWeight, rows: list[int]) -> list[RoundedWeight]:
    """A weight cut into so many rows each."""
    codes, scales = weight.quantized.codes.split(rows), weight.quantized.scales.split(rows)
    parts = zip(codes, scales, weight.exact.split(rows), weight.latent.split(rows), strict=True)
    return [RoundedWeight(MXFP4Tensor(c, s), exact, latent) for c, s, exact, latent in parts]


def _joined(parts: list[RoundedWeight]) -> RoundedWeight:
    """A weight of the rows of its parts."""
    codes = torch.cat([part.quantized.codes for part in parts])
    scales = torch.cat([part.quantized.scales for part in parts])
    exact = torch.cat([part.exact for part in parts])
    is_exact = all(part.latent is part.exact for part in parts)
    latent = exact if is_exact else torch.cat([part.latent for part in parts])
    return RoundedWeight(MXFP4Tensor(codes, scales), exact, latent)


def _has_silent(plan: GroupPlan) -> bool:
    return plan.silent is not None and len(plan.silent) > 0


@stage("drift")
def _drift_targets(
    plan: GroupPlan, weights: list[Tensor], hessian: Tensor, drift: Drift
) -> list[Tensor]:
    """What GPTQ rounds, float32 [n, K] each: folded weights that make up for the drift.

    It changes nothing of silent channels, which are excited in the Hessian.
    """
    rows = sum(len(weight) for weight in plan.weights.values())
    made_up = making_up_for_drift(hessian, drift.sums, share=drift.share, rows=rows)
    if not _has_silent(plan):
        return [made_up(weight) for weight in weights]

    def target(exact: Tensor) -> Tensor:
        change = made_up(exact) - exact
        return exact + without_silent(
            change, plan.silent, plan.transform.apply, plan.transform.fold
        )

    return [target(weight) for weight in weights]


@stage("packing")
def replace_linears(
    block: Block, plan: GroupPlan, weights: Mapping[str, RoundedWeight], layout: Layout
) -> None:
    """Swap in the quantized linears of a group, with their values; each owns its storage."""
    biases = {name: block.module.get_submodule(name).bias for name in plan.group.linears}
    convert_group(block.module, plan.group, layout)
    for name, weight in weights.items():
        _fill_linear(
            block.module.get_submodule(name), weight.quantized, plan.transform, biases[name]
        )


def _fill_linear(
    linear: MXFP4Linear, weight: MXFP4Tensor, transform: InputTransform, bias: Tensor | None
) -> None:
    """Give a converted linear its values."""
    values = {
        "weight_packed": weight.codes,
        "weight_scale": weight.scales,
        "rotation": transform.rotation and transform.rotation.matrix,
        "pre_rotation": transform.pre_rotation and transform.pre_rotation.matrix,
        "permutation": transform.permutation,
        "bias": None if bias is None else bias.detach(),
    }
    for name, value in values.items():
        if value is not None:
            getattr(linear, name).data = value.clone()
    linear.prepare()


def report_rows(sampled: int) -> Tensor:
    """Which of the rows that were sampled, in the order of the text, a report's errors are of.

    They are spread evenly, so that the errors are those of the whole calibration text.

    Args: sampled: how many rows there are.
    Returns: int64 [min(REPORT_ROWS, sampled)], ascending.
    """
    spread = torch.linspace(
        0, sampled - 1, min(REPORT_ROWS, sampled), dtype=torch.float32, device=HOST
    )
    return spread.round().long()


@stage("report")
def group_outputs(plan: GroupPlan, x: Tensor) -> Tensor:
    """Exact outputs of a group, float32 [n, sum N], before anything is changed."""
    return torch.cat([x @ weight.T for weight in plan.weights.values()], 1)


@stage("report")
def report_group(
    plan: GroupPlan,
    weights: Mapping[str, RoundedWeight],
    samples: Tensor | None,
    rows: Tensor | None,
    exact_output: Tensor | None,
    rule: ScaleRule,
) -> GroupReport:
    """What quantization has done to a group.

    Args:
        samples: float32 [n, K], inputs as the float block has them; None for a method that reads no
            activations. rows: int64, those of them that the errors are measured on.
        exact_output: float32 [len(rows), sum N], of these rows. rule: scale rule of the inputs.
    """
    if samples is None or rows is None or exact_output is None:
        errors = [_norms(weight, exact) for weight, exact in _dequantized(weights.values())]
        return GroupReport(plan.name, _relative(errors))
    transformed = plan.apply(samples)
    before, x = samples[rows], transformed[rows]
    rounded = dequantize(quantize(x, rule=rule))
    plain = dequantize(quantize(before, rule=rule))
    errors, output_errors, done = [], [], 0
    for weight, exact in _dequantized(weights.values()):
        own = slice(done, done := done + len(weight))
        errors.append(_norms(weight, exact))
        output_errors.append(_norms(rounded @ weight.T, exact_output[:, own]))
    return GroupReport(
        plan.name,
        _relative(errors),
        activation_error_before=_relative([_norms(plain, before)]),
        activation_error=_relative([_norms(rounded, x)]),
        output_error=_relative(output_errors),
        block_amax_before=block_amax(samples),
        block_amax=block_amax(transformed),
    )


def _dequantized(weights: Iterable[RoundedWeight]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rounded and exact weights, float32 [n, K], as many rows at a time as are folded together."""
    for weight in weights:
        rows, quantized = _rows_at_a_time(weight.exact), weight.quantized
        whole = (quantized.codes, quantized.scales, weight.exact)
        for codes, scales, exact in zip(*(tensor.split(rows) for tensor in whole), strict=True):
            yield dequantize(MXFP4Tensor(codes, scales)), exact


def block_amax(x: Tensor) -> list[float]:
    """Largest magnitude of each block of 32 channels of x [n, K], to four digits."""
    amax = x.abs().amax(0).view(-1, BLOCK_SIZE).amax(1)
    return [float(f"{value:.4g}") for value in amax.to(HOST).tolist()]


def _norms(value: Tensor, exact: Tensor) -> Tensor:
    """||value - exact|| and ||exact||, float32 [2]."""
    return torch.stack(((value - exact).norm(), exact.norm()))


def _relative(norms: list[Tensor]) -> float:
    """||value - exact|| / ||exact|| of the whole, whose parts have these `_norms`."""
    error, size = torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)
    return float(error / size.clamp(min=1e-30))


def group_generator(seed: int, name: str) -> torch.Generator:
    """A generator for one linear group, the same whichever groups came before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return host_generator(int.from_bytes(digest[:7], "little"))
