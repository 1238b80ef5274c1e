"""What a quantization does: one frozen dataclass, JSON both ways."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from duqpp.errors import InputError
from duqpp.format import ScaleRule

Method = Literal["rtn", "hadamard", "random", "learned", "duquant", "duquant++", "duqpp"]
RotationScope = Literal["shared", "per-block"]
Stream = Literal["float", "quantized"]
Refine = Literal["none", "blocks", "distill"]
BlockOrder = Literal["diagonal", "channels"]

DEFAULT_SMOOTH_ALPHA = 0.6  # DuQuant++ (arXiv 2604.17789), for the methods that read activations
_SMOOTHED_BY_DEFAULT = ("duquant", "duquant++")
# Fields whose default depends on the method.
METHOD_DEFAULTS = {
    "rotation": "shared",
    "gptq": False,
    "hessian": "float",
    "block_order": "diagonal",
    "drift": 0.0,
}
_DUQPP_DEFAULTS = {
    "rotation": "per-block",
    "gptq": True,
    "hessian": "quantized",
    "block_order": "diagonal",
    "drift": 0.3,
}
# What training starts from: after GPTQ, SmolLM2-135M ends about as it does without on text like the
# calibration's, and worse on other text; worse still there with GPTQ's other defaults
# (docs/accuracy.md).
_REFINED_DEFAULTS = {"gptq": False, "block_order": "channels", "drift": 0.0}
_REFINE_SAMPLES = 72


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Options of `duqpp.quantize_model`, each with its default.

    method: how the inputs of a linear are rotated. rtn: not at all; hadamard, random: one fixed
        orthogonal 32x32 matrix; learned: an orthogonal one, trained; duquant: two outlier-aware
        rotations around a zigzag permutation; duquant++: one outlier-aware rotation; duqpp: a
        balanced transform per block (see `duqpp.rotation.balance`), groups quantized one after the
        other, by GPTQ where they are not refined.
    rotation: one matrix for all blocks of a linear group, or one per block of 32 channels. None is
        the method's own default: per-block for duqpp, shared for the others.
    gptq: round weights by GPTQ instead of to nearest; None: on for duqpp without refinement, else
        off.
    smooth_alpha: exponent of SmoothQuant's channel scaling, 0 is off; None is the method's own
        default (0.6 for duquant and duquant++, 0 for the others).
    activation_rule, weight_rule: how a block's exponent is chosen (see `ScaleRule`).
    max_steps: longest prefix of greedy rotations that is tried.
    damping: GPTQ damping, as a fraction of the Hessian's mean diagonal.
    hessian: GPTQ Hessian from the float activations, or from the quantized, rotated ones; None:
        quantized for duqpp, float for the others.
    block_order: in which GPTQ rounds the blocks of 32 channels of a weight: diagonal, by falling
        sum of the Hessian's diagonal, or channels, as they come; None: diagonal, channels with
        refinement.
    drift: share of what quantization has done to a linear's input before it that GPTQ's weights
        make up for (see `duqpp.calibration.drift`), in [0, 1], for duqpp with GPTQ; None: 0.3 for
        that without refinement, else 0.
    next_inputs: whether the next decoder block is calibrated on the quantized block's outputs.
    refine: train the weights through their rounding afterwards, for the method duqpp: each block to
        give the float block's outputs, or after that the whole model to give the float model's
        distribution of the next token (in memory: 16 bytes a weight, see docs/large-models.md).
    samples, seq_len: calibration sequences and their length in tokens.
    refine_samples: sequences for refinement, of which `samples` calibrate; None: 72, or as many as
        a shorter calibration text has (see `for_text`).
    seed: of calibration sampling and of every random matrix.
    skip: modules that stay in floating point like lm_head, by whole components of their names.
    """

    method: Method = "duquant++"
    rotation: RotationScope | None = None
    gptq: bool | None = None
    smooth_alpha: float | None = None
    activation_rule: ScaleRule = ScaleRule.EVEN
    weight_rule: ScaleRule = ScaleRule.MSE
    max_steps: int = 256
    damping: float = 0.01
    hessian: Stream | None = None
    block_order: BlockOrder | None = None
    drift: float | None = None
    next_inputs: Stream = "quantized"
    refine: Refine = "none"
    samples: int = 16
    seq_len: int = 1024
    refine_samples: int | None = None
    seed: int = 0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("method", self.method, get_args(Method))
        defaults = _DUQPP_DEFAULTS if self.is_sequential else METHOD_DEFAULTS
        if self.refine != "none":
            defaults = defaults | _REFINED_DEFAULTS
        if not (defaults["gptq"] if self.gptq is None else self.gptq):
            defaults = defaults | {"drift": 0.0}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _one_of("rotation", self.rotation, get_args(RotationScope))
        _one_of("hessian", self.hessian, get_args(Stream))
        _one_of("block_order", self.block_order, get_args(BlockOrder))
        _one_of("next_inputs", self.next_inputs, get_args(Stream))
        _one_of("refine", self.refine, get_args(Refine))
        for name in ("activation_rule", "weight_rule"):
            _one_of(name, getattr(self, name), [rule.value for rule in ScaleRule])
            object.__setattr__(self, name, ScaleRule(getattr(self, name)))
        object.__setattr__(self, "skip", tuple(self.skip))
        alpha = self.smooth_alpha
        if alpha is not None and not 0.0 <= alpha <= 1.0:
            raise InputError(f"smooth_alpha must lie in [0, 1], got {alpha}")
        if self.is_sequential and (alpha or self.rotation != "per-block"):
            raise InputError("duqpp has a transform per block, which takes the place of smoothing")
        drift = self.drift or 0.0
        if not 0.0 <= drift <= 1.0:
            raise InputError(f"drift must lie in [0, 1], got {drift}")
        if drift and not self.is_sequential:
            raise InputError(f"drift is for the method duqpp, not {self.method}")
        if drift and not self.gptq:
            raise InputError("drift is what GPTQ makes up for, and gptq is off: turn it on, too")
        if self.method == "learned" and alpha:
            raise InputError("learned trains rotations alone: it goes without smoothing")
        if self.refine != "none" and not self.is_sequential:
            raise InputError(f"refine is for the method duqpp, not {self.method}")
        if self.refine != "none" and self.next_inputs == "float":
            raise InputError("refine trains on what quantized blocks give: next_inputs=quantized")
        if self.refine != "none" and (self.refine_samples or math.inf) <= self.samples:
            raise InputError(
                f"refine_samples must be more than samples, got {self.refine_samples} and "
                f"{self.samples}"
            )
        if not 0.0 < self.damping < 1.0:
            raise InputError(f"damping must lie in (0, 1), got {self.damping}")
        for name, least in (
            ("samples", 1),
            ("refine_samples", 1),
            ("seq_len", 2),
            ("max_steps", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")

    @property
    def effective_smooth_alpha(self) -> float:
        """The smoothing exponent in force, with the method's default filled in."""
        if self.smooth_alpha is not None:
            return self.smooth_alpha
        return DEFAULT_SMOOTH_ALPHA if self.method in _SMOOTHED_BY_DEFAULT else 0.0

    def for_text(self, tokens: int) -> "QuantizeConfig":
        """With the refine_samples that a calibration text of so many tokens has by default."""
        if self.refine == "none" or self.refine_samples is not None:
            return self
        most = min(_REFINE_SAMPLES, tokens // self.seq_len)
        return replace(self, refine_samples=max(self.samples + 1, most))

    @property
    def sequences(self) -> int:
        """How many calibration sequences are read in all."""
        return self.samples if self.refine == "none" else self.refine_samples or _REFINE_SAMPLES

    @property
    def is_sequential(self) -> bool:
        """Whether the groups of a block are quantized one after the other."""
        return self.method == "duqpp"

    @property
    def makes_up_for_drift(self) -> bool:
        """Whether GPTQ aims at a share of what the float model's inputs would give."""
        return bool(self.drift)

    @property
    def needs_float_stream(self) -> bool:
        """Whether the float model's activations are followed beside the quantized stream's."""
        return self.refine != "none" or self.makes_up_for_drift

    @property
    def needs_activations(self) -> bool:
        """Whether calibration activations enter the result at all."""
        fitted = self.method in ("learned", "duquant", "duquant++", "duqpp")
        return fitted or self.gptq or self.effective_smooth_alpha > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of every field."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizeConfig":
        """The inverse of `to_dict`. Raises: InputError for an unknown field or a bad value."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"QuantizeConfig has no option {', '.join(unknown)}")
        return cls(**values)


def _one_of(name: str, value: object, choices: tuple | list) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
