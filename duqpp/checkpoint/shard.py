"""Quantized checkpoints on disk: write shards, and check everything that can be checked on load.

Each shard's metadata has "duqpp.crc32": a JSON object from tensor name to the CRC-32 (eight hex
digits) of the tensor's bytes.
"""

import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from duqpp.errors import CheckpointError
from duqpp.files import parse_json_object, read_json_object, require_regular
from duqpp.format.e8m0 import NAN_SCALE
from duqpp.placement import HOST
from duqpp.rotation.block_rotation import check_invertible

CHECKSUMS_KEY = "duqpp.crc32"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"U8": torch.uint8, "I32": torch.int32, "F32": torch.float32}
_DTYPES |= {"BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LINEAR = ("weight_packed", "weight_scale", "rotation", "pre_rotation", "permutation")
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a shard: where it begins there, in bytes, and the checksum that it should have.

    checksum: None where the shard has none of it.
    """

    shard: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    checksum: str | None

    def read(self) -> Tensor:
        """Its values. Raises: CheckpointError for altered ones, and such as no model may hold."""
        size = math.prod(self.shape) * self.dtype.itemsize
        # transformers calls this in a context where tensors are made on the meta device.
        with HOST:
            data = torch.empty(size, dtype=torch.uint8, device=HOST)
            with open(self.shard, "rb") as file:
                file.seek(self.begin)
                file.readinto(data.numpy().data)
            if checksum(data) != self.checksum:
                raise CheckpointError(
                    f"{self.shard}: {self.name} is altered (its checksum differs)"
                )
            tensor = data.view(self.dtype).view(self.shape)
            _check_values(self.shard, self.name, tensor)
        return tensor


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard completely or not at all.

    Equal tensors give equal bytes, so that a resumed job ends in the same files as one that was
    not interrupted; the safetensors library itself writes metadata in a random order.
    """
    # Wider elements first, as in that library, so that each tensor is aligned to its elements.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    checksums = {name: checksum(tensors[name]) for name in order}
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", CHECKSUMS_KEY: json.dumps(checksums)}
    }
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = (_bytes(tensors[name]) for name in order)
    _write(path, itertools.chain((len(text).to_bytes(8, "little"), text), data))


def block_tensors(name: str, block: nn.Module) -> dict[str, Tensor]:
    """The tensors of a decoder block by their names in the model."""
    return {f"{name}.{own}": tensor for own, tensor in block.state_dict().items()}


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a shard, verified. Raises: CheckpointError."""
    return {each.name: each.read() for each in shard_contents(path)}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file completely or not at all, as `write_shard` does."""
    _write(path, [json_bytes(values)])


def json_bytes(values: dict[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(values, indent=2) + "\n").encode()


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file completely or not at all: under a temporary name, synced, then renamed."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: CheckpointError naming the file."""
    try:
        return read_json_object(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def shard_name(number: int, total: int) -> str:
    """File name of shard `number`, from 0, of `total`: 0 is what is outside the decoder blocks."""
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """The shards of a checkpoint, from its index or its single file.

    Raises: CheckpointError when neither exists, or a shard that the index names does not.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return [folder / "model.safetensors"]
        raise CheckpointError(f"{folder} has neither {INDEX_FILE} nor model.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    shards = sorted({str(file) for file in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not in {folder}")
    return [folder / shard for shard in shards]


def linear_storage(folder: Path) -> tuple[int, int]:
    """Size of the quantized linears of a checkpoint, from the headers of its shards.

    Returns: bytes of their codes, scales, rotations and permutations, and how many weights they
    hold.
    """
    size = weights = 0
    for shard in sorted(folder.glob("*.safetensors")):
        header, _ = _read_header(shard)
        for name, entry in header.items():
            kind = name.rpartition(".")[2]
            if kind in _LINEAR:
                begin, end = entry["data_offsets"]
                size += end - begin
                weights += 2 * (end - begin) if kind == "weight_packed" else 0
    return size, weights


def settle_metadata(path: Path) -> None:
    """Put the metadata of a shard in one order, and leave it the checksums of its own tensors.

    The safetensors library writes metadata in an order that differs from run to run, and a model
    that is saved has one set of metadata for all of its shards. In place: the header keeps its
    length, and the tensors stay where they are.

    Raises: CheckpointError, and the file stays as it was, for one without checksums or room.
    """
    header, start = _read_header(path)
    metadata = header.get("__metadata__", {})
    checksums = _checksums(path, metadata)
    own = {name: checksums[name] for name in sorted(header) if name in checksums}
    header["__metadata__"] = {"format": metadata["format"], CHECKSUMS_KEY: json.dumps(own)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > start - 8:  # it would run into the tensors
        raise CheckpointError(
            f"{path}: its header has {start - 8} bytes, its checksums in order need {len(text)}; "
            "save the model again"
        )
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(text.ljust(start - 8))


def checkpoint_contents(
    shards: Sequence[Path], expected: Mapping[str, Tensor]
) -> dict[str, StoredTensor]:
    """What shards hold, checked against the tensors that the model needs; no value is read.

    Args:
        expected: name to a tensor (on the meta device) of the right shape and dtype. Integer
            tensors and rotations must match in dtype, other floating-point ones need not.
    Raises: CheckpointError naming the file and the tensor.
    """
    found: dict[str, StoredTensor] = {}
    for stored in (each for shard in shards for each in shard_contents(shard)):
        name, shard = stored.name, stored.shard
        if name in found:
            raise CheckpointError(f"{name} is in both {found[name].shard.name} and {shard.name}")
        if name not in expected:
            raise CheckpointError(f"{shard}: {name} does not belong to this model")
        found[name] = stored
        _check_kind(shard, name, stored.dtype, stored.shape, expected[name])
    if missing := sorted(set(expected) - set(found)):
        raise CheckpointError(
            f"{shards[0].parent} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
        )
    return found


def verify_values(contents: Mapping[str, StoredTensor], progress: Progress | None = None) -> None:
    """Read every tensor, to check its values.

    Args: progress: called with ("verify", shards done, shards in all).
    Raises: CheckpointError naming the file and the tensor.
    """
    shards = list(dict.fromkeys(stored.shard for stored in contents.values()))
    for done, shard in enumerate(shards):
        if progress:
            progress("verify", done, len(shards))
        for stored in contents.values():
            if stored.shard == shard:
                stored.read()
    if progress:
        progress("verify", len(shards), len(shards))


def verify_tensor(where: str, name: str, tensor: Tensor, expected: Tensor) -> None:
    """Check a tensor that is to be written as it will be checked in its shard.

    Args: where: it is, in words.
    Raises: CheckpointError naming the tensor.
    """
    if tensor.dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"{where}: {name} has the dtype {tensor.dtype}")
    _check_kind(where, name, tensor.dtype, tensor.shape, expected)
    if name.rpartition(".")[2] in _LINEAR:
        _check_values(where, name, tensor.detach().to(HOST))


def verify_shard(path: Path) -> list[str]:
    """Check one shard by itself: header, size, checksums, scale bytes, rotations.

    Returns: the names of its tensors.
    Raises: CheckpointError naming the file, and the tensor where it is one tensor's fault.
    """
    contents = shard_contents(path)
    for stored in contents:
        stored.read()
    return [stored.name for stored in contents]


def shard_contents(path: Path) -> list[StoredTensor]:
    """What a shard holds, from its header; no value is read. Raises: CheckpointError."""
    header, start = _read_header(path)
    checksums = _checksums(path, header.pop("__metadata__", {}))
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the safetensors library cannot read it: {error}") from error
    return [
        StoredTensor(
            path,
            name,
            _DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            checksums.get(name),
        )
        for name, entry in header.items()
    ]


def header_bytes(path: Path) -> bytes:
    """The beginning of a safetensors file, up to its data. Raises: CheckpointError."""
    try:
        size = require_regular(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            raw = file.read(length) if 2 <= length <= min(size - 8, _HEADER_LIMIT) else None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if raw is None:
        raise CheckpointError(f"{path} is truncated or not a safetensors file")
    return prefix + raw


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, checked, and the offset where its data begin."""
    content = header_bytes(path)
    try:
        header = parse_json_object(content[8:])
        _check_metadata(header.get("__metadata__", {}))
        entries = [(n, _sizes(e), e) for n, e in header.items() if n != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its header is not one of safetensors") from error
    position = 0
    for name, (begin, end, count), entry in sorted(entries, key=lambda item: item[1]):
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has the dtype {entry['dtype']}")
        if begin != position or end - begin != count * _DTYPES[entry["dtype"]].itemsize:
            raise CheckpointError(f"{path}: the header's offsets of {name} are wrong")
        position = end
    size, expected = path.stat().st_size, len(content) + position
    if size != expected:
        raise CheckpointError(
            f"{path} is truncated or altered: {size} bytes, its header says {expected}"
        )
    return header, len(content)


def _check_metadata(metadata: Any) -> None:
    """Raise ValueError unless these are metadata that the safetensors library reads."""
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata are an object of strings")


def _sizes(entry: dict[str, Any]) -> tuple[int, int, int]:
    """Where a header's entry says that a tensor begins and ends, and its number of elements.

    Raises: KeyError, TypeError or ValueError for what is not an entry of a safetensors header.
    """
    begin, end = entry["data_offsets"]
    numbers = [begin, end, *entry["shape"]]
    if not isinstance(entry["dtype"], str) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("sizes and offsets are integers from 0, a dtype is a string")
    return begin, end, math.prod(entry["shape"])


def _checksums(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or metadata.get("format") != "pt":
        raise CheckpointError(f"{path}: its metadata lack the format 'pt'")
    if CHECKSUMS_KEY not in metadata:
        raise CheckpointError(f"{path} has no checksums ({CHECKSUMS_KEY} in metadata)")
    try:
        checksums = json.loads(metadata[CHECKSUMS_KEY])
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {CHECKSUMS_KEY} is not a JSON object") from error
    if not isinstance(checksums, dict):
        raise CheckpointError(f"{path}: {CHECKSUMS_KEY} is not a JSON object")
    return checksums


def _check_values(where: Path | str, name: str, tensor: Tensor) -> None:
    """What no model may hold: scale bytes of 255, singular rotations, bad permutations."""
    flat = tensor.reshape(-1)
    if name.endswith(".weight_scale") and bool((flat.view(torch.uint8) == NAN_SCALE).any()):
        raise CheckpointError(f"{where}: {name} has a scale byte of 255 (NaN)")
    if not len(flat):
        return
    is_matrix = tensor.dtype == torch.bfloat16 and tensor.shape[-2:] == (32, 32)
    if name.endswith("rotation") and is_matrix:
        check_invertible(flat.view(-1, 32, 32), f"{where}: {name}", CheckpointError)
    if name.endswith(".permutation") and tensor.dtype == torch.int32:
        channels = flat.sort().values
        if not torch.equal(channels, torch.arange(len(channels), dtype=torch.int32, device=HOST)):
            raise CheckpointError(f"{where}: {name} does not name every channel once")


def _check_kind(
    where: Path | str, name: str, dtype: torch.dtype, shape: Sequence[int], expected: Tensor
) -> None:
    if list(shape) != list(expected.shape):
        raise CheckpointError(f"{where}: {name} must be {list(expected.shape)}, got {list(shape)}")
    exact = is_exact(name, expected)
    if dtype != expected.dtype if exact else not dtype.is_floating_point:
        wanted = expected.dtype if exact else "floating point"
        raise CheckpointError(f"{where}: {name} must be {wanted}, got {dtype}")


def is_exact(name: str, expected: Tensor) -> bool:
    """Whether a tensor has one dtype; others have any floating-point one, and are cast to it."""
    return not expected.is_floating_point() or name.endswith("rotation")


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes, eight hex digits."""
    return f"{zlib.crc32(_bytes(tensor)):08x}"


def _bytes(tensor: Tensor) -> memoryview:
    data = tensor.detach().contiguous().to(HOST).reshape(-1).view(torch.uint8).numpy().data
    return memoryview(data)
