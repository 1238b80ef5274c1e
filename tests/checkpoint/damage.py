"""Ways to alter a safetensors folder, a float model or a duqpp checkpoint, on a copy of it."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

CHECKSUMS = "duqpp.crc32"
INDEX = "model.safetensors.index.json"
MANIFEST = "duqpp-manifest.json"

Tensors = dict[str, Tensor]


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of `folder` at `target`, which must not exist; without its manifest.

    With that, no damage would get as far as the other checks.
    """
    shutil.copytree(folder, target)
    (target / MANIFEST).unlink(missing_ok=True)
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the JSON object in a file, in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def read_shard(file: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors of a safetensors file, not mapped to it, and its metadata."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load(content), header.get("__metadata__", {})


def write_shard(file: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write a shard with checksums of its tensors as they are now, if the metadata has any."""
    if CHECKSUMS in metadata:
        sums = {name: f"{zlib.crc32(_bytes(tensor)):08x}" for name, tensor in tensors.items()}
        metadata = metadata | {CHECKSUMS: json.dumps(sums)}
    file.write_bytes(save(tensors, metadata))


def edit_tensors(folder: Path, holder: str, change: Callable[[Tensors], Any]) -> Path:
    """Apply `change` to the tensors of the shard that holds `holder`; checksums stay right.

    Returns: the shard.
    """
    for file in sorted(folder.glob("*.safetensors")):
        tensors, metadata = read_shard(file)
        if holder in tensors:
            change(tensors)
            write_shard(file, tensors, metadata)
            return file
    raise KeyError(holder)


def set_tensor(folder: Path, name: str, value: Tensor) -> Path:
    """Replace one tensor; checksums stay right. Returns: its shard."""
    return edit_tensors(folder, name, lambda tensors: tensors.update({name: value.contiguous()}))


def get_tensor(folder: Path, name: str) -> Tensor:
    """One tensor of a folder, not mapped to its file."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors, _ = read_shard(file)
        if name in tensors:
            return tensors[name]
    raise KeyError(name)


def flip_bit(file: Path, bit: int) -> None:
    """Flip bit number `bit` of a file, counted from its first byte's least significant bit."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
