"""Quantized linears as serving engines hold them, fused and split over ranks; needs no engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from duqpp.checkpoint.layout import Layout, checkpoint_family, quantization_of
from duqpp.checkpoint.manifest import verify_manifest
from duqpp.checkpoint.shard import INDEX_FILE, read_json, shard_files, verify_shard
from duqpp.checkpoint.transforms import verify_transforms_of
from duqpp.errors import CheckpointError, InputError
from duqpp.format import BLOCK_SIZE
from duqpp.models.family import Family, is_skipped


def served_layout(values: dict[str, Any]) -> Layout:
    """The layout in a checkpoint's `quantization_config`.

    Raises: CheckpointError for a bad one; InputError for one that an engine cannot split.
    """
    layout = Layout.from_dict(values)
    if layout.permuted:
        raise InputError(
            f"method {layout.method!r} permutes channels across blocks, which serving engines are "
            "not given; quantize with another `method`, or run it through transformers"
        )
    return layout


def verify_folder(folder: Path) -> int:
    """Check a checkpoint: its files against its manifest, its shards, its index, its linear groups.

    Returns: the number of shards.
    Raises: CheckpointError naming the file and the tensor.
    """
    verify_manifest(folder)
    files = shard_files(folder)
    check_index(folder, {name: file.name for file in files for name in verify_shard(file)})
    config = read_json(folder / "config.json")
    skip = Layout.from_dict(quantization_of(config)).skip
    verify_transforms_of(files, checkpoint_family(config, skip), skip)
    return len(files)


def check_index(folder: Path, found: dict[str, str]) -> None:
    """Raise CheckpointError unless the index, where there is one, tells what shards have.

    Args: found: tensor name to the shard that has it.
    """
    if not (folder / INDEX_FILE).exists():
        return
    promised = read_json(folder / INDEX_FILE)["weight_map"]
    for name in sorted(set(promised) | set(found)):
        if promised.get(name) != found.get(name):
            raise CheckpointError(
                f"{folder / INDEX_FILE}: {name} should be in {promised.get(name, 'no shard')}, "
                f"and is in {found.get(name, 'none')}"
            )


def is_quantized(family: Family, parts: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether a linear of an engine is quantized.

    Args:
        family: of the model.
        parts: the full names of the model's linears that the engine has fused into it, or its own.
        skip: `modules_to_not_convert`.
    Raises: InputError when only some parts are quantized: they share one input and one weight.
    """
    quantized = [family.group_of(name) is not None and not is_skipped(name, skip) for name in parts]
    if any(quantized) and not all(quantized):
        kept = [name for name, is_one in zip(parts, quantized, strict=True) if not is_one]
        others = [name for name in parts if name not in kept]
        raise InputError(
            f"{', '.join(others)} and {', '.join(kept)} are one linear here, but only the former "
            "is quantized; quantize with `skip` for all of them, or for none"
        )
    return all(quantized)


def check_columns(name: str, columns: int, ranks: int) -> None:
    """Raise InputError unless K = `columns`, what each rank has of a linear, is whole blocks."""
    if columns % BLOCK_SIZE:
        blocks = columns * ranks // BLOCK_SIZE
        sizes = [str(n) for n in range(1, blocks + 1) if blocks % n == 0 and n < ranks]
        raise InputError(
            f"{name}: split over {ranks} ranks, each has K = {columns}, which is not a multiple "
            f"of {BLOCK_SIZE}, MXFP4's block; use a tensor-parallel size of {' or '.join(sizes)}"
        )


def rotation_of_rank(rotation: Tensor, blocks: int, rank: int) -> Tensor:
    """What a rank needs of a rotation when K is split: its blocks' matrices, or the shared one.

    Args:
        rotation: [32, 32] or [K/32, 32, 32].
        blocks: of 32 columns, that each rank has.
    """
    return rotation if rotation.dim() == 2 else rotation.narrow(0, rank * blocks, blocks)
