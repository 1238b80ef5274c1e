"""One linear group on its way to MXFP4: its plan, its rounded weights, its report."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from duqpp.calibration.drift import make_up_for_drift
from duqpp.calibration.gptq import Gptq
from duqpp.calibration.silent import excite_silent, without_silent
from duqpp.checkpoint.layout import Layout, convert_group
from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, ScaleRule, dequantize
from duqpp.methods.base import Block
from duqpp.methods.options import Options
from duqpp.methods.reports import GroupReport
from duqpp.models.family import LinearGroup
from duqpp.nn import MXFP4Linear
from duqpp.ops import quantize
from duqpp.placement import HOST, host_generator
from duqpp.placement.ranks import ALONE, Ranks
from duqpp.placement.stages import stage
from duqpp.rotation import InputTransform

# Of a group, that are folded and rounded together: at most some 15 GB in float64 and beside it. All
# of a group's up to LLaMA-3 70B; the rows of a wider group are taken in parts, linear by linear.
WEIGHTS_AT_A_TIME = 2**29
REPORT_ROWS = 256  # of them, spread evenly, on which the report's errors are measured


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
    """sums: float32 [K, K], C of `make_up_for_drift`. share: of it that is made up for."""

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
    gptq = None
    if hessian is not None:
        if _has_silent(plan):
            excite_silent(hessian, plan.silent, plan.transform.apply)
        with named(plan.first_linear):
            gptq = Gptq.of(hessian, damping=options.damping, order=options.block_order)

    def rounded(weight: Tensor) -> RoundedWeight:
        with stage("fold"):
            exact = plan.transform.fold(weight).float()
        if not torch.isfinite(exact).all():
            raise InputError(f"{plan.first_linear}: folded weights overflow float32")
        if gptq is None or hessian is None:
            with stage("rounding"):
                return RoundedWeight(quantize(exact, rule=options.weight_rule), exact, exact)
        own = exact[ranks.share(len(exact))]
        target = own if drift is None else _drift_target(plan, own, hessian, drift)
        result = gptq.round(target, options.weight_rule)
        codes, scales = ranks.gather(result.weight.codes), ranks.gather(result.weight.scales)
        return RoundedWeight(MXFP4Tensor(codes, scales), exact, ranks.gather(result.compensated))

    weights = list(plan.weights.values())
    if sum(weight.numel() for weight in weights) <= WEIGHTS_AT_A_TIME:
        parts = _split(rounded(torch.cat(weights)), [len(weight) for weight in weights])
    else:
        rows = max(1, WEIGHTS_AT_A_TIME // weights[0].shape[1])
        parts = [_joined([rounded(part) for part in weight.split(rows)]) for weight in weights]
    return dict(zip(plan.weights, parts, strict=True))


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
def _drift_target(plan: GroupPlan, exact: Tensor, hessian: Tensor, drift: Drift) -> Tensor:
    """What GPTQ rounds, float32 [N, K]: folded weights that make up for the drift.

    It changes nothing of silent channels, which are excited in the Hessian.
    """
    target = make_up_for_drift(exact, hessian, drift.sums, share=drift.share)
    if not _has_silent(plan):
        return target
    change = target - exact
    return exact + without_silent(change, plan.silent, plan.transform.apply, plan.transform.fold)


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
    return x @ torch.cat(list(plan.weights.values())).T


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
    weight = torch.cat([dequantize(w.quantized) for w in weights.values()])
    weight_error = _relative(weight, torch.cat([w.exact for w in weights.values()]))
    if samples is None or rows is None or exact_output is None:
        return GroupReport(plan.name, weight_error)
    transformed = plan.apply(samples)
    before, x = samples[rows], transformed[rows]
    rounded = dequantize(quantize(x, rule=rule))
    plain = dequantize(quantize(before, rule=rule))
    return GroupReport(
        plan.name,
        weight_error,
        activation_error_before=_relative(plain, before),
        activation_error=_relative(rounded, x),
        output_error=_relative(rounded @ weight.T, exact_output),
        block_amax_before=block_amax(samples),
        block_amax=block_amax(transformed),
    )


def block_amax(x: Tensor) -> list[float]:
    """Largest magnitude of each block of 32 channels of x [n, K], to four digits."""
    amax = x.abs().amax(0).view(-1, BLOCK_SIZE).amax(1)
    return [float(f"{value:.4g}") for value in amax.to(HOST).tolist()]


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm().clamp(min=1e-30))


def group_generator(seed: int, name: str) -> torch.Generator:
    """A generator for one linear group, the same whichever groups came before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return host_generator(int.from_bytes(digest[:7], "little"))
