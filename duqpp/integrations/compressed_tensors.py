"""compressed-tensors: a duqpp checkpoint in the format that vLLM runs without duqpp.

The weights stay what they are, bit for bit: codes and scale bytes of `mxfp4-pack-quantized` are
those of duqpp. A rotation becomes a transform of type "random-hadamard": vLLM and
compressed-tensors both use the matrix stored for it, divided by sqrt(32). What differs is up to the
engine, which rotates activations in the model's dtype and scales them by a rule of its own.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duqpp.checkpoint.card import GUARD_FIELD
from duqpp.checkpoint.layout import Layout, checkpoint_family, is_duqpp, quantization_of
from duqpp.checkpoint.manifest import verify_manifest
from duqpp.checkpoint.shard import (
    INDEX_FILE,
    Progress,
    read_json,
    read_shard,
    shard_files,
    write_json,
    write_shard,
)
from duqpp.errors import CheckpointError, InputError
from duqpp.files import model_path
from duqpp.format import BLOCK_SIZE
from duqpp.integrations.serving import check_index, is_quantized, served_layout
from duqpp.job.companions import copy_companions
from duqpp.job.folder import Output
from duqpp.job.lock import locked
from duqpp.models.family import Family
from duqpp.models.hub import download
from duqpp.torch_state import plain_torch
from duqpp.version import __version__

# transformers quotes it in its error (see `duqpp.checkpoint.card`); vLLM does not know the field.
_GUARD = "it is an export of duqpp for vLLM, whose rotations transformers would ignore"


@dataclass(frozen=True)
class ExportReport:
    """What an export did: folder, bytes of the shards, number of transforms.

    remarks: how a model differs that is served from it; they are in the model card as well.
    """

    folder: Path
    weight_bytes: int
    transforms: int
    remarks: tuple[str, ...]


@plain_torch()
def export_compressed_tensors(
    model: str | Path, out: str | Path, *, progress: Progress | None = None
) -> ExportReport:
    """Write a duqpp checkpoint as compressed-tensors `mxfp4-pack-quantized`, for vLLM.

    An export with rotations is guarded against transformers, which would ignore them. Works in
    `OUT.partial` and renames it: `out` is either absent or whole. An empty folder that is there is
    filled in the end, as by `duqpp.quantize_model`.

    Args:
        model: duqpp checkpoint: local folder, or hub name.
        out: folder to create; it must not exist, or be empty.
        progress: called with ("export", shards done, shards in all).
    Raises: InputError for what the format, or vLLM's reading of it, cannot express: a rotation per
        block, DuQuant's permutation, a bias behind a rotation, a fused linear that is quantized in
        part. CheckpointError for a damaged checkpoint.
    """
    folder, out = model_path(model), Path(out)
    folder = folder if folder.exists() else download(str(model))
    config = read_json(folder / "config.json")
    if is_duqpp(config):
        verify_manifest(folder)
    layout = _exportable_layout(folder, config)
    groups, skipped = _groups(checkpoint_family(config, layout.skip), layout)
    conversion = _Conversion(frozenset(name for group in groups for name in group))
    with _new_folder(out) as work:
        copy_companions(folder, work)
        size = _write_shards(
            folder, work, conversion, progress or (lambda stage, done, total: None)
        )
        schemes = conversion.schemes(groups) if layout.rotation == "shared" else {}
        write_json(work / "config.json", _config(config, skipped, schemes))
        card = _card(out.name, layout).encode("utf-8", "backslashreplace")  # a name may be no UTF-8
        (work / "README.md").write_bytes(card)
    return ExportReport(out, size, len(schemes), _remarks(layout))


def _exportable_layout(folder: Path, config: dict[str, Any]) -> Layout:
    """The layout in a checkpoint's config.json. Raises: InputError where the format has no room."""
    values = quantization_of(config)
    if not values:
        raise InputError(f"{folder} is not quantized; run `duqpp quantize` first")
    layout = served_layout(values)
    if layout.rotation == "per_block":
        raise InputError(
            f"{folder} has one rotation per block, and compressed-tensors has one matrix for all; "
            "quantize with `rotation=shared`, or serve it exactly with duqpp's vLLM plugin"
        )
    return layout


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to be filled: it becomes `out` then, or is removed where that fails.

    Raises: InputError where it or `out` is in the way, or cannot be written.
    """
    output = Output.at(out)
    work = output.work
    output.check(resume=True)
    if work.exists():
        raise InputError(f"{work} is in the way: something was interrupted there; remove it")
    try:
        output.make()
        with locked(work), _removed_on_failure(work):
            yield work
            output.finish()
    except OSError as error:
        raise InputError(f"cannot write to {work}: {error.strerror or error}") from error


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        raise


def _write_shards(folder: Path, work: Path, conversion: "_Conversion", progress: Progress) -> int:
    """Write every shard, converted, and their index. Returns: bytes of the tensors."""
    files = shard_files(folder)
    found: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    size = 0
    for done, file in enumerate(files):
        progress("export", done, len(files))
        tensors = read_shard(file)
        found |= dict.fromkeys(tensors, file.name)
        tensors = conversion.convert(tensors)
        write_shard(work / file.name, tensors)
        weight_map |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    check_index(folder, found)
    write_json(work / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return size


def _config(
    config: dict[str, Any], skipped: list[str], schemes: dict[str, list[str]]
) -> dict[str, Any]:
    """The config.json of an export, from that of the checkpoint."""
    values = config | {"quantization_config": _quantization_config(skipped, schemes)}
    values.pop(GUARD_FIELD, None)  # the checkpoint's own: duqpp does not read an export
    return values | ({GUARD_FIELD: _GUARD} if schemes else {})


@dataclass
class _Conversion:
    """Tensors of duqpp under the names of compressed-tensors; equal rotations are one scheme.

    quantized: names of the quantized linears. scheme_of: name of each one's scheme, once seen.
    """

    quantized: frozenset[str]
    scheme_of: dict[str, str] = field(default_factory=dict)
    _names: dict[bytes, str] = field(default_factory=dict)

    def convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a shard."""
        converted = {}
        for name, tensor in tensors.items():
            linear, _, kind = name.rpartition(".")
            if linear not in self.quantized or kind in ("weight_packed", "weight_scale"):
                converted[name] = tensor
            elif kind == "rotation":
                scheme = self._scheme(tensor)
                self.scheme_of[linear] = scheme
                # Divided by sqrt(32) again on load, in the dtype that the model then has.
                scaled = tensor.float() * math.sqrt(BLOCK_SIZE)
                converted[f"{linear}.{scheme}_input.weight"] = scaled
            elif kind == "bias" and f"{linear}.rotation" in tensors:
                raise InputError(
                    f"{linear} has a bias, which vLLM refuses behind a compressed-tensors "
                    "transform; serve the checkpoint with duqpp's vLLM plugin"
                )
            else:
                converted[name] = tensor
        return converted

    def _scheme(self, rotation: Tensor) -> str:
        key = rotation.contiguous().view(torch.uint8).numpy().tobytes()
        return self._names.setdefault(key, f"rotation{len(self._names)}")

    def schemes(self, groups: list[tuple[str, ...]]) -> dict[str, list[str]]:
        """The linears of each scheme. Raises: CheckpointError where a group's are not one."""
        members: dict[str, list[str]] = {}
        for group in groups:
            found = {self.scheme_of[name] for name in group if name in self.scheme_of}
            if len(found) != 1 or not all(name in self.scheme_of for name in group):
                raise CheckpointError(f"{', '.join(group)} share one input but not one rotation")
            members.setdefault(found.pop(), []).extend(group)
        return members


def _groups(family: Family, layout: Layout) -> tuple[list[tuple[str, ...]], list[str]]:
    """The quantized linears, by the input that they share, and those that are not quantized."""
    groups, skipped = [], ["lm_head"]
    for index in range(family.config.num_hidden_layers):
        for group in family.groups(index):
            names = tuple(f"{family.block_name(index)}.{name}" for name in group.linears)
            if is_quantized(family, names, layout.skip):
                groups.append(names)
            else:
                skipped += names
    return groups, skipped


def _quantization_config(skipped: list[str], schemes: dict[str, list[str]]) -> dict[str, Any]:
    """As compressed-tensors has it in config.json.

    Source: compressed-tensors 0.20, `QuantizationConfig` and `TransformConfig`.
    """
    mxfp4 = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": BLOCK_SIZE,
        "symmetric": True,
        "observer": None,
        "scale_dtype": "torch.uint8",
    }
    values: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": skipped,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "mxfp4-pack-quantized",
                "weights": {**mxfp4, "dynamic": False},
                "input_activations": {**mxfp4, "dynamic": True},
            }
        },
    }
    if schemes:
        values["transform_config"] = {
            "config_groups": {
                scheme: {
                    "type": "random-hadamard",
                    "head_dim": BLOCK_SIZE,
                    "precision": "torch.float32",
                    "apply": [{"targets": linears, "location": "input"}],
                }
                for scheme, linears in schemes.items()
            }
        }
    return values


def _remarks(layout: Layout) -> tuple[str, ...]:
    rule = layout.activation_rule
    remarks = [
        "For vLLM; as it has no rotation, transformers with the package compressed-tensors reads "
        "it as well."
        if layout.rotation == "none"
        else "For vLLM alone: transformers ignores the transforms of compressed-tensors, and would "
        f"run this model without its rotations, wrongly. The field {GUARD_FIELD} of config.json "
        "makes it stop with an error instead, from transformers 5.16 on.",
        "Weights are exactly those of the duqpp checkpoint. Activations are approximate: vLLM's "
        f"kernels round their scales by a rule of their own (FlashInfer's: ceil), not by {rule}, "
        "for which this model was quantized; its Marlin kernel, for GPUs before Blackwell, does "
        "not quantize them at all.",
    ]
    if layout.rotation != "none":
        remarks.append(
            "vLLM applies the rotations in the model's dtype, and only without tensor parallelism."
        )
    remarks.append("duqpp's own checkpoint and its vLLM plugin have none of these limits.")
    return tuple(remarks)


def _card(name: str, layout: Layout) -> str:
    base = layout.provenance.get("base_model") or "a float model"
    return "\n".join(
        [
            "---",
            "library_name: vllm",
            "tags: [mxfp4, compressed-tensors, duqpp]",
            "---",
            f"# {name}",
            "",
            f"{base}, quantized to MXFP4 (W4A4) by duqpp, method `{layout.method}`, and exported "
            f"to compressed-tensors by `duqpp export` of duqpp {__version__}.",
            "",
            *(f"- {remark}" for remark in _remarks(layout)),
            "",
        ]
    )
