"""What a quantization does: one frozen dataclass, each of its fields described once."""

import math
from collections.abc import Collection
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch

from duqpp.calibration.gptq import BlockOrder
from duqpp.errors import InputError
from duqpp.format import ScaleRule
from duqpp.methods import METHODS
from duqpp.methods.base import Method, Needs
from duqpp.methods.options import Refine, RotationScope, Stream

Dtype = Literal["float32", "bfloat16", "float16"]

_REFINE_SAMPLES = 72
_RULES = tuple(str(rule) for rule in ScaleRule)


@dataclass(frozen=True)
class Description:
    """What is said once of an option, for whoever checks, documents or parses it.

    flag: on the command line. help: one sentence, without the default. choices: all values, where
    there are few. least, most: bounds of a number, itself allowed unless `is_open`. unused: its
    value with methods that have no such option, which refuse any other; None where they ignore it.
    """

    flag: str
    help: str
    choices: Collection[str] = ()
    least: float | None = None
    most: float | None = None
    is_open: bool = False
    unused: Any = None

    def check(self, name: str, value: Any) -> None:
        """Raise InputError unless `value` may be that of the option `name`."""
        if self.choices:
            if value not in self.choices:
                raise InputError(
                    f"`{name}` must be one of {', '.join(self.choices)}, got {value!r}"
                )
        elif self.least is not None and self.most is not None:
            inside = self.least <= value <= self.most
            if not inside or (self.is_open and value in (self.least, self.most)):
                bounds = ", ".join(map(_number, (self.least, self.most)))
                bounds = f"({bounds})" if self.is_open else f"[{bounds}]"
                raise InputError(f"`{name}` must lie in {bounds}, got {value}")
        elif self.least is not None and value < self.least:
            raise InputError(f"`{name}` must be at least {self.least:g}, got {value}")


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _described(flag: str, help: str, **limits: Any) -> dict[str, Description]:
    """Metadata of a field: see `Description`."""
    return {"description": Description(flag, help, **limits)}


def _choices(literal: Any) -> tuple[str, ...]:
    return tuple(get_args(literal))


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Options of `duqpp.quantize_model`, each with its default.

    None is the method's own default, of its options in `duqpp.methods`; the fields of an instance
    have it filled in. An instance is valid: InputError is raised for what is not.

    method: how the inputs of a linear are rotated. rtn: not at all; hadamard, random: one fixed
        orthogonal 32x32 matrix; learned: an orthogonal one, trained; duquant: two outlier-aware
        rotations around a zigzag permutation; duquant++: one outlier-aware rotation; duqpp: a
        balanced transform per block (see `duqpp.rotation.balance`), groups quantized one after the
        other, by GPTQ where they are not refined.
    rotation: one matrix for all blocks of a linear group, or one per block of 32 channels. Default:
        per-block for duqpp, shared for the others.
    gptq: round weights by GPTQ instead of to nearest. Default: on for duqpp without refinement,
        else off.
    smooth_alpha: exponent of SmoothQuant's channel scaling, 0 is off. Default: 0.6 for duquant and
        duquant++, 0 for the others.
    activation_rule, weight_rule: how a block's exponent is chosen (see `ScaleRule`).
    max_steps: longest prefix of greedy rotations that is tried.
    damping: GPTQ damping, as a fraction of the Hessian's mean diagonal.
    hessian: GPTQ Hessian from the float activations, or from the quantized, rotated ones. Default:
        quantized for duqpp, float for the others.
    block_order: in which GPTQ rounds the blocks of 32 channels of a weight: diagonal, by falling
        sum of the Hessian's diagonal, or channels, as they come. Default: diagonal, channels with
        refinement.
    drift: share of what quantization has done to a linear's input before it that GPTQ's weights
        make up for (see `duqpp.calibration.drift`), in [0, 1], for duqpp with GPTQ. Default: 0.3
        for that without refinement, else 0.
    next_inputs: whether the next decoder block is calibrated on the quantized block's outputs.
    refine: train the weights through their rounding afterwards, for the method duqpp: each block to
        give the float block's outputs, or after that the whole model to give the float model's
        distribution of the next token (in memory: 13 bytes a weight, see docs/large-models.md).
    samples, seq_len: calibration sequences and their length in tokens.
    refine_samples: sequences for refinement, of which `samples` calibrate; None: 72, or as many as
        a shorter calibration text has (see `for_text`).
    seed: of calibration sampling and of every random matrix.
    skip: modules that stay in floating point like lm_head, by whole components of their names.
    dtype: what the model is cast to when it is read: what its blocks compute in, and what is not
        quantized is saved in. None is the model's own.
    """

    method: str = field(
        default="duquant++",
        metadata=_described(
            "--method", "How the inputs of the linears are rotated.", choices=METHODS
        ),
    )
    rotation: RotationScope | None = field(
        default=None,
        metadata=_described(
            "--rotation",
            "One matrix per linear group, or one per block of 32 channels.",
            choices=_choices(RotationScope),
        ),
    )
    gptq: bool | None = field(
        default=None,
        metadata=_described("--gptq/--no-gptq", "Round weights by GPTQ instead of to nearest."),
    )
    smooth_alpha: float | None = field(
        default=None,
        metadata=_described(
            "--smooth-alpha", "Channel smoothing exponent, 0 is off.", least=0.0, most=1.0
        ),
    )
    activation_rule: ScaleRule = field(
        default=ScaleRule.EVEN,
        metadata=_described(
            "--scale-rule",
            "How a block of activations gets its scale.",
            choices=_RULES,
        ),
    )
    weight_rule: ScaleRule = field(
        default=ScaleRule.MSE,
        metadata=_described(
            "--weight-rule", "How a block of weights gets its scale.", choices=_RULES
        ),
    )
    max_steps: int = field(
        default=256,
        metadata=_described(
            "--max-steps", "Longest run of greedy rotations that is tried.", least=1
        ),
    )
    damping: float = field(
        default=0.01,
        metadata=_described(
            "--damping",
            "GPTQ damping, a fraction of the Hessian's mean diagonal.",
            least=0.0,
            most=1.0,
            is_open=True,
        ),
    )
    hessian: Stream | None = field(
        default=None,
        metadata=_described(
            "--hessian",
            "Activations that the GPTQ Hessian is made from.",
            choices=_choices(Stream),
        ),
    )
    block_order: BlockOrder | None = field(
        default=None,
        metadata=_described(
            "--block-order",
            "Order in which GPTQ rounds blocks of 32 channels: by falling Hessian diagonal, or as "
            "they come.",
            choices=_choices(BlockOrder),
        ),
    )
    drift: float | None = field(
        default=None,
        metadata=_described(
            "--drift",
            "Share of the quantized model's drift that GPTQ makes up for, 0 is off.",
            least=0.0,
            most=1.0,
            unused=0.0,
        ),
    )
    next_inputs: Stream = field(
        default="quantized",
        metadata=_described(
            "--next-inputs",
            "Activations that the next decoder block is calibrated on.",
            choices=_choices(Stream),
        ),
    )
    refine: Refine = field(
        default="none",
        metadata=_described(
            "--refine",
            "Train the weights through their rounding: each block, or then the whole model.",
            choices=_choices(Refine),
            unused="none",
        ),
    )
    samples: int = field(
        default=16, metadata=_described("--samples", "Calibration sequences.", least=1)
    )
    seq_len: int = field(
        default=1024, metadata=_described("--seq-len", "Tokens in a calibration sequence.", least=2)
    )
    refine_samples: int | None = field(
        default=None,
        metadata=_described(
            "--refine-samples",
            "Sequences for --refine, of which --samples calibrate; as many as a shorter text has.",
            least=1,
        ),
    )
    seed: int = field(
        default=0,
        metadata=_described(
            "--seed",
            "Of calibration sampling and of every random matrix.",
            least=-(2**63),  # what torch's generators take
            most=2**64 - 1,
        ),
    )
    skip: tuple[str, ...] = field(
        default=(),
        metadata=_described(
            "--skip", "Module kept in floating point, by name or last component; repeatable."
        ),
    )

    dtype: Dtype | None = field(
        default=None,
        metadata=_described(
            "--dtype",
            "Compute in it and save in it what is not quantized; the model's own by default.",
            choices=_choices(Dtype),
        ),
    )

    def __post_init__(self) -> None:
        for name, value in _resolved(self).items():
            object.__setattr__(self, name, value)
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                description_of(each).check(each.name, value)
        if self.refine != "none" and (self.refine_samples or math.inf) <= self.samples:
            raise InputError(
                f"`refine_samples` must be more than `samples`, got {self.refine_samples} and "
                f"{self.samples}"
            )
        self.build_method()  # which checks what its options are together

    def build_method(self) -> Method:
        """The method, with its options."""
        method = METHODS[self.method]
        names = [each.name for each in fields(method.Options)]
        return method(method.Options(**{name: getattr(self, name) for name in names}))

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype) if self.dtype else None

    @property
    def needs(self) -> Needs:
        """What the method reads besides the weights."""
        return self.build_method().needs

    def for_text(self, sequences: int) -> "QuantizeConfig":
        """With the refine_samples that a calibration text of so many sequences has by default."""
        if self.refine == "none" or self.refine_samples is not None:
            return self
        most = min(_REFINE_SAMPLES, sequences)
        return replace(self, refine_samples=max(self.samples + 1, most))

    @property
    def sequences(self) -> int:
        """How many calibration sequences are read in all."""
        return self.samples if self.refine == "none" else self.refine_samples or _REFINE_SAMPLES

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of every field."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizeConfig":
        """The inverse of `to_dict`. Raises: InputError for an unknown field or a bad value."""
        if unknown := sorted(set(values) - set(DESCRIPTIONS)):
            raise InputError(f"QuantizeConfig has no option {', '.join(unknown)}")
        return cls(**values)


def description_of(option: "Field[Any]") -> Description:
    """What is said of a field of `QuantizeConfig`."""
    description: Description = option.metadata["description"]
    return description


DESCRIPTIONS = {each.name: description_of(each) for each in fields(QuantizeConfig)}


def method_defaults(name: str) -> dict[str, Any]:
    """Each method's own default of an option, by method; for those that have such an option."""
    return {
        method: values[name]
        for method, kind in METHODS.items()
        if name in (values := kind.Options.defaults({}))
    }


def _resolved(config: QuantizeConfig) -> dict[str, Any]:
    """Values of the fields that are not as they were given, by name.

    Raises: InputError for an unknown method, and an option that only other methods have.
    """
    DESCRIPTIONS["method"].check("method", config.method)
    kind = METHODS[config.method].Options
    own = _names(kind)
    given = {each.name: getattr(config, each.name) for each in fields(config)}
    given = {name: value for name, value in given.items() if value is not None}
    changed: dict[str, Any] = {"skip": tuple(config.skip)}
    for name in ("activation_rule", "weight_rule"):
        if given.get(name) in _RULES:
            changed[name] = ScaleRule(given[name])
    for each in fields(config):
        unused = description_of(each).unused
        if unused is None or each.name in own:
            continue
        if given.get(each.name, unused) != unused:
            others = [name for name, m in METHODS.items() if each.name in _names(m.Options)]
            raise InputError(
                f"`{each.name}` is for the method {' and '.join(others)}, not {config.method}"
            )
        changed[each.name] = unused
    defaults = kind.defaults(given)
    return changed | {name: value for name, value in defaults.items() if name not in given}


def _names(options: Any) -> set[str]:
    return {each.name for each in fields(options)}
