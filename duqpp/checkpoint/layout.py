"""How a quantized model is laid out: the `quantization_config` of a checkpoint, and its modules."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.checkpoint.transforms import verify_transforms
from duqpp.errors import CheckpointError
from duqpp.format import BLOCK_SIZE, ScaleRule
from duqpp.models.family import Family, LinearGroup, family_of
from duqpp.models.stack import DecoderStack
from duqpp.nn import MXFP4Linear, share_input

QUANT_METHOD = "duqpp"
FORMAT_VERSION = 1
_ROTATIONS = ("none", "shared", "per_block")
_RULES = tuple(str(rule) for rule in ScaleRule)
_PROVENANCE = {"base_model": str, "configuration": dict, "calibration": str}
_PROVENANCE |= {"versions": dict, "mean_errors": dict, "job": str}
_JSON = {str: "string", bool: "boolean", list: "array", dict: "object"}


@dataclass(frozen=True)
class Layout:
    """What must be known to build the modules of a checkpoint, and where it came from.

    method: how the rotations were made; for people, nothing depends on it.
    rotation: "none", "shared" ([32, 32]) or "per_block" ([K/32, 32, 32]).
    permuted: whether each linear also has DuQuant's pre_rotation and permutation.
    weight_rule, activation_rule: scale rules; the second is what the layers do online.
    skip: `modules_to_not_convert`.
    provenance: calibration data, options and versions.
    """

    method: str
    rotation: str
    permuted: bool
    weight_rule: ScaleRule
    activation_rule: ScaleRule
    skip: tuple[str, ...] = ("lm_head",)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "rotation": self.rotation,
            "permuted": self.permuted,
            "scale_rule": {
                "weights": str(self.weight_rule),
                "activations": str(self.activation_rule),
            },
            "modules_to_not_convert": list(self.skip),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Layout":
        """The inverse of `to_dict`.

        Raises: CheckpointError for another method, a newer format, or a missing or bad field.
        """
        if values.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"quant_method is {values.get('quant_method')!r}, not {QUANT_METHOD!r}"
            )
        version = values.get("format_version")
        if type(version) is not int or version < 1:
            raise CheckpointError(f"format_version must be a positive integer, got {version!r}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"format_version {version} is newer than this duqpp reads ({FORMAT_VERSION}); "
                "upgrade duqpp"
            )
        skip = _field(values, "modules_to_not_convert", list)
        if not all(isinstance(name, str) for name in skip):
            raise CheckpointError(f"modules_to_not_convert must hold names, got {skip!r}")
        rotation = _field(values, "rotation", str)
        if rotation not in _ROTATIONS:
            raise CheckpointError(f"rotation must be one of {_ROTATIONS}, got {rotation!r}")
        rules = _field(values, "scale_rule", dict)
        return cls(
            method=_field(values, "method", str),
            rotation=rotation,
            permuted=_field(values, "permuted", bool),
            weight_rule=_rule(rules, "weights"),
            activation_rule=_rule(rules, "activations"),
            skip=tuple(skip),
            provenance=_provenance(_field({"provenance": {}} | values, "provenance", dict)),
        )

    def rotation_shape(self, columns: int) -> tuple[int, ...] | None:
        """Shape of the rotation of a linear with K = `columns`; None where there is none."""
        blocks = columns // BLOCK_SIZE
        return {"none": None, "shared": (32, 32), "per_block": (blocks, 32, 32)}[self.rotation]

    def empty_linear(
        self, linear: nn.Linear, *, device: torch.device | str | None = None
    ) -> MXFP4Linear:
        """An MXFP4Linear with the shape of `linear`, its values still to be loaded."""
        shape = self.rotation_shape(linear.in_features)
        return MXFP4Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            rule=self.activation_rule,
            rotation=shape,
            pre_rotation=shape if self.permuted else None,
            permutation=self.permuted,
            dtype=linear.weight.dtype,
            device=linear.weight.device if device is None else device,
        )


def quantization_of(config: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` in a model's config.json; empty where it is none, or no object."""
    values = config.get("quantization_config")
    return values if isinstance(values, dict) else {}


def is_duqpp(config: dict[str, Any]) -> bool:
    """Whether a config.json says that its folder holds a duqpp checkpoint, good or bad."""
    return quantization_of(config).get("quant_method") == QUANT_METHOD


def checkpoint_family(config: dict[str, Any], skip: Sequence[str]) -> Family:
    """The family of the model that a checkpoint's config.json describes. Raises: InputError.

    Args: skip: what is not quantized in it.
    """
    family = family_of(SimpleNamespace(**config))
    family.check_sizes(skip)
    return family


def _field(
    values: dict[str, Any], name: str, kind: type, where: str = "quantization_config"
) -> Any:
    if name not in values:
        raise CheckpointError(f"{where} lacks {name}")
    if not isinstance(values[name], kind):
        raise CheckpointError(f"{name} must be a JSON {_JSON[kind]}, got {values[name]!r}")
    return values[name]


def _provenance(values: dict[str, Any]) -> dict[str, Any]:
    """Provenance whose fields, where they are there, are what the model card makes text of."""
    for name, kind in _PROVENANCE.items():
        if name in values:
            _field(values, name, kind, "provenance")
    for name, error in values.get("mean_errors", {}).items():
        if error is not None and type(error) not in (int, float):
            raise CheckpointError(f"mean_errors.{name} must be a number or null, got {error!r}")
    return values


def _rule(rules: dict[str, Any], name: str) -> ScaleRule:
    rule = _field(rules, name, str, "scale_rule")
    if rule not in list(ScaleRule):
        raise CheckpointError(f"the scale rule of {name} must be one of {_RULES}, got {rule!r}")
    return ScaleRule(rule)


def convert_block(block: nn.Module, groups: Sequence[LinearGroup], layout: Layout) -> None:
    """Swap in the quantized linears of a decoder block, and let its groups share their inputs."""
    for group in groups:
        convert_group(block, group, layout)


def convert_group(block: nn.Module, group: LinearGroup, layout: Layout) -> None:
    """`convert_block` for one linear group of the block."""
    for name in group.linears:
        block.set_submodule(name, layout.empty_linear(block.get_submodule(name)))
    share_group(block, group)


def share_inputs(model: nn.Module, layout: Layout) -> None:
    """Let the groups of a model whose linears are all swapped in share their inputs."""
    for block, groups in _blocks(model, layout):
        for group in groups:
            share_group(block, group)


def share_group(block: nn.Module, group: LinearGroup) -> None:
    """Let the quantized linears of a group share their input, where they can."""
    if group.shares_input:
        owner = block.get_submodule(group.owner)
        share_input(owner, [block.get_submodule(name) for name in group.linears])


def convert_model(model: nn.Module, layout: Layout) -> None:
    """`convert_block` for every decoder block of a causal language model."""
    for block, groups in _blocks(model, layout):
        convert_block(block, groups, layout)


def _blocks(
    model: nn.Module, layout: Layout
) -> Iterator[tuple[nn.Module, tuple[LinearGroup, ...]]]:
    """The decoder blocks of a model, each with its groups that are quantized."""
    family = family_of(model.config)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        yield block, family.quantized_groups(index, layout.skip)


def expected_tensors(config: Any, layout: Layout) -> dict[str, Tensor]:
    """What a checkpoint of this configuration must hold: by name, on the meta device.

    Raises: what transformers does for a configuration that it cannot build a model of.
    """
    from transformers import AutoModelForCausalLM

    family_of(config).check_sizes(layout.skip)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    convert_model(skeleton, layout)
    return tensors_of(skeleton)


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The tensors that are loaded into a model, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def quantized_block(
    stack: DecoderStack, index: int, layout: Layout, stored: Mapping[str, Tensor]
) -> nn.Module:
    """Decoder block `index` with values that are verified one by one, ready to run.

    Args: stored: its tensors, by their names in the model.
    Raises: CheckpointError where linears of a group differ in their transform.
    """
    block, groups = stack.skeleton(index), stack.family.quantized_groups(index, layout.skip)
    convert_block(block, groups, layout)
    name = stack.family.block_name(index)
    verify_transforms([(name, group) for group in groups], stored, stored.__getitem__)
    fetched = stack.placement.fetched
    tensors = {n.removeprefix(f"{name}."): fetched(t) for n, t in stored.items()}
    block.load_state_dict(tensors, assign=True)
    for module in block.modules():
        if isinstance(module, MXFP4Linear):
            module.prepare()
    return block.requires_grad_(False)
