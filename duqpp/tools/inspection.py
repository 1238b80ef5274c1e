"""inspect: what rotation does to a model's outliers, and what rounding then costs."""

from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duqpp.calibration.text import CalibrationText
from duqpp.calibration.tokens import BUILTIN
from duqpp.checkpoint.layout import Layout, checkpoint_family, is_duqpp, quantization_of
from duqpp.checkpoint.manifest import verify_manifest
from duqpp.checkpoint.shard import Progress, read_json
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError
from duqpp.files import model_path
from duqpp.job.companions import REPORT_FILE
from duqpp.job.overlap import ahead
from duqpp.methods.base import Block, Streams
from duqpp.methods.reports import GroupReport, mean_errors
from duqpp.models.family import family_of
from duqpp.models.folder import check_folder
from duqpp.models.gguf import is_gguf
from duqpp.models.hub import download
from duqpp.models.positions import check_seq_len
from duqpp.models.source import Source, check_float_model, open_source
from duqpp.models.stack import DecoderStack
from duqpp.placement import ON_HOST, Placement
from duqpp.placement.devices import choose_device, fitting
from duqpp.torch_state import plain_torch


@dataclass(frozen=True)
class Inspection:
    """Reports of linear groups.

    model: the float model's name. method: options, for people. kinds: the groups that a decoder
    block of the model can have, in their order; name to label, for people.
    """

    model: str
    method: str
    groups: list[GroupReport]
    kinds: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = asdict(self) | {"mean_errors": mean_errors(self.groups)}
        del values["kinds"]
        return values


def layer_and_kind(group: GroupReport) -> tuple[int, str]:
    """(3, "qkv") of a report named "model.layers.3.qkv"."""
    prefix, _, kind = group.name.rpartition(".")
    return int(prefix.rpartition(".")[2]), kind


@plain_torch()
def inspect_model(
    model: str,
    config: QuantizeConfig | None = None,
    *,
    calibration: str = BUILTIN,
    layers: int | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Inspection:
    """What a duqpp checkpoint reports of its quantization, or what one of a float model would do.

    Args:
        model: duqpp checkpoint, or float model as for `quantize_model`; nothing is written.
        config, calibration: for a float model; its blocks are fed by float blocks.
        layers: only this many decoder blocks, from the first.
        progress: called with ("inspect", blocks done, blocks in all).
        device: where a float model's blocks compute, as for `quantize_model`.
    Raises: InputError, CheckpointError.
    """
    if layers is not None and layers < 1:
        raise InputError(f"`layers` must be at least 1, got {layers}")
    placement = Placement(choose_device(device))
    path = model_path(model)
    if not path.exists() and not is_gguf(model):
        path = download(model, check=_check_inspectable)
    if path.is_dir() and (found := _read_checkpoint(path)):
        kept = [g for g in found.groups if layers is None or layer_and_kind(g)[0] < layers]
        return replace(found, groups=kept)
    return inspect_source(
        open_source(str(path)),
        config or QuantizeConfig(),
        calibration=calibration,
        layers=layers,
        progress=progress,
        placement=placement,
    )


def inspect_source(
    source: Source,
    config: QuantizeConfig,
    *,
    calibration: str = BUILTIN,
    layers: int | None = None,
    progress: Progress | None = None,
    placement: Placement = ON_HOST,
) -> Inspection:
    """`inspect_model` of an open float model. Activations are read for every method, rtn too."""
    family = family_of(source.config)
    family.check(config.skip)
    config = replace(config, next_inputs="float")
    text = CalibrationText.read(calibration).tokenized(source.tokenizer())
    sequences = text.sequences(samples=config.samples, seq_len=config.seq_len, seed=config.seed)
    check_seq_len(source.config, config.seq_len, "calibration sequences")
    stack = DecoderStack(source, config.torch_dtype, placement)
    method, streams = config.build_method(), Streams(stack.first_inputs(sequences))
    count = min(layers or len(stack), len(stack))
    groups: list[GroupReport] = []
    with closing(ahead(stack.read, range(count))) as read:
        for index, weights in enumerate(read):
            if progress:
                progress("inspect", index, count)
            with fitting(stack.family.block_name(index), stack.device):
                block = Block.of(stack.block(index, weights), index, config.skip, stack.family)
                result = method.quantize(block, streams)
                streams.advance(block, result)
            groups += result.groups
    if progress:
        progress("inspect", count, count)
    name = Path(source.config.name_or_path or "").name or "model"
    return Inspection(name, _describe(config), groups, family.kinds())


def _check_inspectable(folder: Path) -> None:
    """Raise InputError unless config.json is of a duqpp checkpoint, or of a model to quantize."""
    if not is_duqpp(read_json(folder / "config.json")):
        check_float_model(folder)


def _read_checkpoint(folder: Path) -> Inspection | None:
    """What a duqpp checkpoint reports; None for a folder that is not one."""
    check_folder(folder)
    config = read_json(folder / "config.json")
    if not is_duqpp(config):
        return None
    verify_manifest(folder)
    layout = Layout.from_dict(quantization_of(config))
    kinds = checkpoint_family(config, layout.skip).kinds()
    file = folder / REPORT_FILE
    if not file.exists():
        raise CheckpointError(f"{folder} has no {REPORT_FILE}; inspect the float model instead")
    try:
        groups = [GroupReport(**group) for group in read_json(file)["groups"]]
        if any(layer_and_kind(group)[1] not in kinds for group in groups):
            raise ValueError("unknown linear group")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a report of duqpp quantize: {error}") from error
    try:
        method = _describe(QuantizeConfig.from_dict(layout.provenance["configuration"]))
    except (KeyError, TypeError, ValueError):  # provenance is free text: say less
        method = layout.method
    name = layout.provenance.get("base_model") or folder.resolve().name
    return Inspection(name, method, groups, kinds)


def _describe(config: QuantizeConfig) -> str:
    parts: list[str] = [config.method]
    if config.build_method().rotates:
        parts.append("one rotation per group" if config.rotation == "shared" else "per block")
    if config.smooth_alpha:
        parts.append(f"smoothing {config.smooth_alpha:g}")
    return ", ".join([*parts, "GPTQ" if config.gptq else "RTN"])
