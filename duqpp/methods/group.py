"""One linear group on its way to MXFP4: its plan, its rounded weights, its report."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from duqpp.calibration.drift import make_up_for_drift
from duqpp.calibration.gptq import gptq
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import BLOCK_SIZE, MXFP4Tensor, dequantize
from duqpp.models.llama import LinearGroup, layer_prefix
from duqpp.nn import MXFP4Linear
from duqpp.ops import quantize
from duqpp.rotation import InputTransform

SAMPLE_TOKENS = 1024  # random rows kept of each input, besides the rows of channel peaks
_MEANS = ("weight_error", "activation_error_before", "activation_error", "output_error")
REPORT_ROWS = 256  # of them, spread evenly, on which the report's errors are measured


@dataclass(frozen=True)
class GroupReport:
    """What quantization did to one linear group.

    name: for instance "model.layers.3.qkv". Errors are relative: ||quantized - exact|| / ||exact||.
    weight_error: of the folded weights. activation_error_before, activation_error: of the input
    quantized as it is, and transformed. output_error: of the group's outputs. block_amax_before,
    block_amax: largest magnitude of each block of 32 channels, untransformed and transformed, among
    the samples, which hold that of each channel; by the method duqpp, among all tokens. The last
    five are None for a method that reads no activations.
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


def mean_errors(groups: list[GroupReport]) -> dict[str, float | None]:
    """Mean of each error over the groups; None for an error that the groups do not have."""
    means: dict[str, float | None] = {}
    for name in _MEANS:
        values = [getattr(g, name) for g in groups if getattr(g, name) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


@dataclass
class GroupPlan:
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


def plan_group(block: nn.Module, group: LinearGroup) -> GroupPlan:
    return plan_weights(group, {n: block.get_submodule(n).weight for n in group.linears})


def plan_weights(group: LinearGroup, weights: dict[str, Tensor]) -> GroupPlan:
    """The plan of a group with these weights, by name, before anything is smoothed."""
    weights = {name: weight.detach().float() for name, weight in weights.items()}
    channels = next(iter(weights.values())).shape[1]
    return GroupPlan(group, weights, torch.ones(channels, dtype=torch.float64))


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
    hessian: Tensor | None,
    config: QuantizeConfig,
    index: int,
    drift: Tensor | None = None,
) -> dict[str, RoundedWeight]:
    """Folded weights of a group by name.

    Args: hessian: float32 [K, K] for GPTQ, None for rounding to nearest. drift: float32 [K, K], C
        of `make_up_for_drift`, None for nothing to make up for.
    """
    names = list(plan.weights)
    exact = plan.transform.fold(torch.cat([plan.weights[n] for n in names])).float()  # [sum N, K]
    if not torch.isfinite(exact).all():
        raise InputError(f"{layer_prefix(index)}.{names[0]}: folded weights overflow float32")
    if hessian is None:
        quantized, latent = quantize(exact, rule=config.weight_rule), exact
    else:
        start = exact
        if drift is not None:
            start = make_up_for_drift(exact, hessian, drift, share=config.drift)
        with named(f"{layer_prefix(index)}.{names[0]}"):
            result = gptq(
                start,
                hessian,
                rule=config.weight_rule,
                damping=config.damping,
                order=config.block_order,
            )
        quantized, latent = result.weight, result.compensated
    rows = [plan.weights[n].shape[0] for n in names]
    parts = zip(
        names,
        quantized.codes.split(rows),
        quantized.scales.split(rows),
        exact.split(rows),
        latent.split(rows),
        strict=True,
    )
    return {
        name: RoundedWeight(MXFP4Tensor(codes, scales), w, rounded_from)
        for name, codes, scales, w, rounded_from in parts
    }


def fill_linear(
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


def report_rows(sampled: int) -> Tensor:
    """Which of the rows that were sampled, in the order of the text, a report's errors are of.

    They are spread evenly, so that the errors are those of the whole calibration text.

    Args: sampled: how many rows there are.
    Returns: int64 [min(REPORT_ROWS, sampled)], ascending.
    """
    return torch.linspace(0, sampled - 1, min(REPORT_ROWS, sampled)).round().long()


def group_outputs(plan: GroupPlan, x: Tensor) -> Tensor:
    """Exact outputs of a group, float32 [n, sum N], before anything is changed."""
    return x @ torch.cat(list(plan.weights.values())).T


def report_group(
    index: int,
    plan: GroupPlan,
    weights: dict[str, RoundedWeight],
    samples: Tensor | None,
    rows: Tensor | None,
    exact_output: Tensor | None,
    config: QuantizeConfig,
) -> GroupReport:
    """What quantization has done to a group.

    Args:
        samples: float32 [n, K], inputs as the float block has them; None for a method that reads no
            activations. rows: int64, those of them that the errors are measured on.
        exact_output: float32 [len(rows), sum N], of these rows.
    """
    name = f"{layer_prefix(index)}.{plan.group.name}"
    weight = torch.cat([dequantize(w.quantized) for w in weights.values()])
    weight_error = _relative(weight, torch.cat([w.exact for w in weights.values()]))
    if samples is None or rows is None:
        return GroupReport(name, weight_error)
    transformed = plan.apply(samples)
    before, x = samples[rows], transformed[rows]
    rounded = dequantize(quantize(x, rule=config.activation_rule))
    plain = dequantize(quantize(before, rule=config.activation_rule))
    return GroupReport(
        name,
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
    return [float(f"{value:.4g}") for value in amax.tolist()]


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm().clamp(min=1e-30))


def group_generator(seed: int, name: str) -> torch.Generator:
    """A generator for one linear group, the same whichever groups came before."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
