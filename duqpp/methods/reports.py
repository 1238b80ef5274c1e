"""What a quantization reports: of each linear group, of a block's refinement, of distillation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_MEANS = ("weight_error", "activation_error_before", "activation_error", "output_error")


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


def mean_errors(groups: Sequence[GroupReport]) -> dict[str, float | None]:
    """Mean of each error over the groups; None for an error that the groups do not have."""
    means: dict[str, float | None] = {}
    for name in _MEANS:
        values = [getattr(g, name) for g in groups if getattr(g, name) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


@dataclass(frozen=True)
class RefineReport:
    """loss_before, loss_after: mean over held-back tokens of the block's squared error over the
    squared norm of the float output. steps: of the optimizer. improved: else nothing was changed.
    """

    loss_before: float
    loss_after: float
    steps: int

    @property
    def improved(self) -> bool:
        return self.loss_after < self.loss_before

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class DistillReport:
    """divergence_before, divergence_after: mean KL(float || quantized) in nats on held-back tokens.

    steps: of the optimizer. improved: else nothing was changed.
    """

    divergence_before: float
    divergence_after: float
    steps: int

    @property
    def improved(self) -> bool:
        return self.divergence_after < self.divergence_before

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)
