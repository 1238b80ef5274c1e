"""The manifest of a checkpoint: digests of all files that decide what the model computes.

A JSON object: "format_version", 1; "files", by name, each with "sha256", for a shard that of its
header alone, and for a JSON object also "fields", the CRC-32 (eight hex digits) of each value, by
which an error can name it; and "sha256", of all this. A shard's header holds the checksum of each
of its tensors, so that the manifest binds every value of the model: a shard of another run does not
belong to it, though it is undamaged.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from duqpp.checkpoint.shard import INDEX_FILE, header_bytes, json_bytes, write_json
from duqpp.errors import CheckpointError
from duqpp.files import parse_json_object, read_bytes

logger = logging.getLogger(__name__)

MANIFEST_FILE = "duqpp-manifest.json"
FORMAT_VERSION = 1
_LARGE = 64  # entries of an object that has one checksum for all of them
# What transformers writes of a model, as opposed to its tokenizer.
MODEL_FILES = ("config.json", "generation_config.json", INDEX_FILE, "model*.safetensors")
# What a model card says decides nothing, and people change it.
_FREE = (MANIFEST_FILE, "*.md", ".*")
# What is read from a folder where it is there: an added one changes the model or its tokenizer.
_READ_BY_MODELS = (*MODEL_FILES, "adapter_config.json", "adapter_model*")
_READ_BY_TOKENIZERS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def write_manifest(
    folder: Path, patterns: Iterable[str] = ("*",), *, leftovers: Collection[str] = ()
) -> None:
    """Write the manifest of the files in a folder, as they are now.

    Args: patterns: of the names of files to take in. leftovers: names of those to leave out.
    """
    names = sorted(n for n in _names(folder) if _matches(n, patterns))
    files = {name: _entry(folder / name) for name in names if name not in leftovers}
    values = {"format_version": FORMAT_VERSION, "files": files}
    write_json(folder / MANIFEST_FILE, values | {"sha256": _own_digest(values)})


def verify_manifest(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    A checkpoint without one, as duqpp wrote them once, gets a warning. Files that are not there are
    no error in the hub's cache, which holds what was asked for.

    Raises: CheckpointError naming the file, and the field of a JSON object.
    """
    if not os.path.lexists(folder / MANIFEST_FILE):
        logger.warning(
            "%s has no %s: its tensors are verified, but not its configuration and its tokenizer",
            folder,
            MANIFEST_FILE,
        )
        return
    files = _read_manifest(folder / MANIFEST_FILE)
    present = _names(folder)
    is_partial = folder.parent.name == "snapshots"
    for name, entry in files.items():
        if name in present:
            difference = _difference(folder / name, entry)
        else:
            difference = None if is_partial else "it is missing"
        if difference:
            raise _mismatch(folder, name, difference)
    for name in sorted(present - set(files)):
        if _is_read(name, files):
            raise _mismatch(folder, name, "it was not there when the checkpoint was saved")


def _mismatch(folder: Path, name: str, difference: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / name} is not as it was saved: {difference}; restore it, or, to load the files "
        f"as they are, remove {MANIFEST_FILE}"
    )


def _names(folder: Path) -> set[str]:
    """The files below a folder that a manifest may name, as it writes their names."""
    found = (path for path in folder.rglob("*") if not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in found)
    return {name for name in names if not _matches(name, _FREE)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_read(name: str, files: dict[str, Any]) -> bool:
    """Whether a file that the manifest does not name takes part in what loaders read.

    A manifest of a model alone says nothing of the tokenizer that is saved beside it.
    """
    has_tokenizer = any(_matches(listed, _READ_BY_TOKENIZERS) for listed in files)
    return _matches(name, _READ_BY_MODELS) or (
        has_tokenizer and _matches(name, _READ_BY_TOKENIZERS)
    )


def _entry(path: Path) -> dict[str, Any]:
    """What a manifest keeps of a file. Raises: OSError, ValueError, CheckpointError."""
    if path.suffix == ".safetensors":
        return {"sha256": hashlib.sha256(header_bytes(path)).hexdigest()}
    content = read_bytes(path)
    entry: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest()}
    if path.suffix == ".json":
        with suppress(ValueError):  # a vocabulary may be a list
            entry["fields"] = _fields(content)
    return entry


def _fields(content: bytes) -> dict[str, str]:
    """A checksum of each value of a JSON object, by its path. Raises: ValueError."""
    return {
        path: f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
        for path, value in _values(parse_json_object(content))
    }


def _values(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """("rope_parameters.rope_theta", 10000.0) and so on; large objects, as vocabularies, whole."""
    for name, value in values.items():
        if isinstance(value, dict) and 0 < len(value) <= _LARGE:
            yield from _values(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _difference(path: Path, entry: dict[str, Any]) -> str | None:
    """How a file differs from what a manifest has of it, in words; None where it does not."""
    try:
        if _entry(path)["sha256"] == entry["sha256"]:
            return None
        if path.suffix == ".safetensors":
            return "it is the shard of another run, or altered"
        if "fields" not in entry:
            return "its content differs"
        return _differing_field(entry["fields"], _fields(read_bytes(path)))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError as error:  # CheckpointError among them
        return str(error)


def _differing_field(before: dict[str, str], now: dict[str, str]) -> str:
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"the field {name} is missing"
        if name not in before:
            return f"the field {name} was added"
        if now[name] != before[name]:
            return f"the field {name} differs"
    return "its values are the same, but it is written in another way"


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The files of a manifest. Raises: CheckpointError for one that is damaged, or newer."""
    try:
        content = read_bytes(path)
        values = parse_json_object(content)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    digest = values.pop("sha256", None)
    if digest != _own_digest(values) or content != json_bytes(values | {"sha256": digest}):
        raise CheckpointError(f"{path} is damaged: its own digest differs")
    if values["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has the format_version {values['format_version']}, newer than this duqpp "
            f"reads ({FORMAT_VERSION}); upgrade duqpp"
        )
    files: dict[str, dict[str, Any]] = values["files"]
    return files


def _own_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json_bytes(values)).hexdigest()
