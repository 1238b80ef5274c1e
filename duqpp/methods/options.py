"""What a method is told: frozen options, a class for each family of methods, with its defaults."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from duqpp.calibration.gptq import BlockOrder
from duqpp.errors import InputError
from duqpp.format import ScaleRule

RotationScope = Literal["shared", "per-block"]
Stream = Literal["float", "quantized"]
Refine = Literal["none", "blocks", "distill"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every method is told. A field means what that of `QuantizeConfig` means.

    A default here, or in a subclass, is the method's own.
    """

    activation_rule: ScaleRule
    weight_rule: ScaleRule
    damping: float
    next_inputs: Stream
    seed: int
    rotation: RotationScope = "shared"
    gptq: bool = False
    smooth_alpha: float = 0.0
    hessian: Stream = "float"
    block_order: BlockOrder = "diagonal"

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The method's own defaults, by field, for what is given of its options."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}

    def check(self) -> None:
        """Raise InputError where options do not go together."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """Of methods that search a rotation in calibration activations."""

    max_steps: int
    smooth_alpha: float = 0.6  # DuQuant++ (arXiv 2604.17789)


@dataclass(frozen=True, kw_only=True)
class LearnedOptions(Options):
    """Of the method that trains its rotations."""

    def check(self) -> None:
        if self.smooth_alpha:
            raise InputError("learned trains rotations alone: it goes without smoothing")


@dataclass(frozen=True, kw_only=True)
class SequentialOptions(Options):
    """Of the method that quantizes the groups of a block one after the other."""

    rotation: RotationScope = "per-block"
    gptq: bool = True
    hessian: Stream = "quantized"
    drift: float = 0.3
    refine: Refine = "none"

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values = super().defaults(given)
        if given.get("refine", "none") != "none":
            # What training starts from: after GPTQ, SmolLM2-135M ends about as it does without on
            # text like the calibration's, and worse on other text; worse still there with GPTQ's
            # other defaults (docs/experiments.md).
            values |= {"gptq": False, "block_order": "channels", "drift": 0.0}
        if not given.get("gptq", values["gptq"]):
            values["drift"] = 0.0
        return values

    def check(self) -> None:
        if self.smooth_alpha or self.rotation != "per-block":
            raise InputError("duqpp has a transform per block, which takes the place of smoothing")
        if self.drift and not self.gptq:
            raise InputError(
                "`drift` is what GPTQ makes up for, and that is off: `gptq=True` turns it on"
            )
        if self.refine != "none" and self.next_inputs == "float":
            raise InputError(
                "`refine` trains on what quantized blocks give: `next_inputs=quantized`"
            )
