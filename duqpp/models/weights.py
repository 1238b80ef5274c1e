"""A folder of safetensors read as transformers reads it, one tensor at a time.

What `AutoModelForCausalLM.from_pretrained(folder, dtype="auto")` decides is decided alike: which
files count, which stored tensor is which of the model, their dtype, and whether lm_head is a tensor
of its own. Where it makes up the values of a tensor that the files lack, there is an error.

Source: transformers 5.16 to 5.24, modeling_utils.py (`_get_resolved_checkpoint_files`,
`_get_dtype`, `tie_weights`) and core_model_loading.py (`convert_and_load_state_dict_in_model`).
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from duqpp.errors import InputError, first_line, refusing
from duqpp.files import read_json_object, require_regular

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What torch.distributed.checkpoint writes, which transformers prefers to any other file.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of a model that is quantized
_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32}
_STORED_DTYPES |= {"BF16": torch.bfloat16, "F16": torch.float16}
_COMPARED_ROWS = 1024  # of lm_head and the embedding at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, its shape, and its dtype as safetensors calls it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class FolderWeights:
    """The tensors of a causal language model in a folder, by their names in the model.

    dtype: of every tensor, to which one that is stored in another is cast. is_tied: whether lm_head
    is the embedding; it is then not among `names`.

    Args: config: the model's transformers configuration.
    Raises: InputError for a file that cannot be read, and a tensor that is missing, misshapen, or
        no floating-point one.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self._folder = folder
        self._open: tuple[Path, Any] | None = None
        files, metadata = _weight_files(folder, config)
        contents = [_contents(file) for file in files]
        self.dtype = _dtype(config, metadata, contents[0])
        model = empty_model(config, self.dtype)
        found = _by_model_name(model, {each.name: each for file in contents for each in file})
        tied = self._tied(model, found)
        self.is_tied = bool(tied)
        expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
        self._stored = {name: self._checked(found, name, expected[name]) for name in expected}
        self.names = frozenset(self._stored)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model. Raises: InputError when there is none, or it cannot be read."""
        if name not in self._stored:
            raise InputError(f"{self._folder} has no tensor {name}")
        stored = self._stored[name]
        if self._open is None or self._open[0] != stored.file:  # blocks come in order
            self._open = (stored.file, _opened(stored.file))
        try:
            return self._open[1].get_tensor(stored.name).to(self.dtype)
        except SafetensorError as error:
            raise InputError(f"{stored.file}: cannot read {stored.name}: {error}") from error

    def _tied(self, model: Any, found: dict[str, Stored]) -> set[str]:
        """Names of the tensors that are another one. One that is there stands for a missing one."""
        tied = set()
        for target, source in model.all_tied_weights_keys.items():
            if source not in found and target in found:
                found[source] = found[target]
            if target not in found or self._are_equal(found[target], found[source]):
                tied.add(target)
        return tied

    def _checked(self, found: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> Stored:
        if name not in found:
            raise InputError(f"{self._folder} has no tensor {name}")
        stored = found[name]
        if stored.shape != shape:
            raise InputError(
                f"{stored.file}: {stored.name} must be {list(shape)}, got {list(stored.shape)}"
            )
        if stored.dtype not in _STORED_DTYPES:
            raise InputError(
                f"{stored.file}: {stored.name} is {stored.dtype}; duqpp quantizes float32, "
                "bfloat16 and float16 models"
            )
        return stored

    def _are_equal(self, one: Stored, other: Stored) -> bool:
        """Whether two stored tensors are one after the cast, which is done in parts."""
        if one.shape != other.shape or not one.shape:
            return False
        left, right = (_opened(s.file).get_slice(s.name) for s in (one, other))
        for start in range(0, one.shape[0], _COMPARED_ROWS):
            rows = slice(start, start + _COMPARED_ROWS)
            if not torch.equal(left[rows].to(self.dtype), right[rows].to(self.dtype)):
                return False
        return True


def check_files(folder: Path) -> None:
    """Raise InputError for a file that may be why a folder does not load: the first that is bad."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files += _indexed_files(folder, index)[0]
    for file in files:
        _opened(file)
    if not files and any(folder.glob("*.gguf")):
        raise InputError(f"{folder} has no {_SINGLE}; {_instead(folder)}")


def check_complete(model: Any, files: Sequence[Path]) -> None:
    """Raise InputError for a tensor of a model that safetensors files lack, and none is tied to."""
    found = _by_model_name(model, {each.name: each for file in files for each in _contents(file)})
    for target, source in model.all_tied_weights_keys.items():
        for one, other in ((target, source), (source, target)):
            if other in found:
                found.setdefault(one, found[other])
    for name in model.state_dict():
        if name not in found:
            raise InputError(f"{files[0].parent} has no tensor {name}")


def empty_model(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a configuration describes, on the meta device. Raises: InputError."""
    from transformers import AutoModelForCausalLM

    with refusing("config.json describes no model"), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _weight_files(folder: Path, config: Any) -> tuple[list[Path], dict[str, Any]]:
    """The files whose tensors are read, in their order, and the metadata of their index."""
    if found := [name for name in os.listdir(folder) if _DISTRIBUTED.match(name)]:
        raise InputError(
            f"{folder / min(found)} is part of a distributed checkpoint: load it in transformers, "
            "and save it by save_pretrained"
        )
    chosen = getattr(config, "transformers_weights", None)
    if chosen is None:
        chosen = next((name for name in (_SINGLE, _INDEX) if (folder / name).is_file()), None)
    if chosen is None:
        raise InputError(f"{folder} has no {_SINGLE} and no {_INDEX}; {_instead(folder)}")
    if not _is_inside(chosen):
        raise InputError(f"config.json: transformers_weights names no file in {folder}")
    if not chosen.endswith(".index.json"):
        return [folder / chosen], {}
    return _indexed_files(folder, folder / chosen)


def _indexed_files(folder: Path, index: Path) -> tuple[list[Path], dict[str, Any]]:
    """`_weight_files` of an index: its shards, whatever it says of the tensors in them."""
    try:
        values = read_json_object(index)
    except (OSError, ValueError) as error:
        raise InputError(f"{index} is not a safetensors index: {_reason(error)}") from error
    shard_of, metadata = values.get("weight_map"), values.get("metadata")
    if not isinstance(shard_of, dict) or not isinstance(metadata, dict) or not shard_of:
        raise InputError(
            f"{index} is not a safetensors index: it lacks the object weight_map or metadata"
        )
    for name in shard_of.values():
        if not _is_inside(name):
            raise InputError(f"{index} names the shard {name!r}, which is not in {folder}")
    return [folder / name for name in sorted(set(shard_of.values()))], metadata


def _is_inside(name: Any) -> bool:
    """Whether this is the path of a file, relative to a folder, that stays in that folder."""
    if not isinstance(name, str) or not name.isprintable() or os.path.isabs(name):
        return False
    return not os.path.normpath(name).startswith("..")


def _instead(folder: Path) -> str:
    """What to do about a folder that has weights of another kind, or none."""
    if found := sorted(folder.glob("*.gguf")):
        return f"of GGUF files, give the path of one: {found[0]}"
    pickled = "duqpp reads safetensors only (pickled .bin weights can run code)"
    if any(folder.glob("*.bin")):
        pickled += ": load them in transformers where you trust them, and save by save_pretrained"
    return pickled


def _reason(error: Exception) -> str:
    """An error in few words, without the path of the file."""
    return getattr(error, "strerror", None) or first_line(error)


def _contents(file: Path) -> list[Stored]:
    """What a file holds, in its own order."""
    reader = _opened(file)
    parts = ((name, reader.get_slice(name)) for name in reader.keys())  # noqa: SIM118 (no mapping)
    return [Stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts]


def _opened(file: Path) -> Any:
    try:
        require_regular(file)
        if file.suffix != ".safetensors":
            raise ValueError("duqpp reads safetensors only (pickled weights can run code)")
        return safe_open(file, framework="pt")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # torch: cannot map it
        raise InputError(f"cannot read {file}: {_reason(error)}") from error


def _dtype(config: Any, metadata: Mapping[str, Any], first: Sequence[Stored]) -> torch.dtype:
    """The configuration's dtype, else the index's, else that of the first float in a file."""
    dtype = getattr(config, "dtype", None)
    if dtype is None and "dtype" in metadata:
        dtype = getattr(torch, str(metadata["dtype"]), metadata["dtype"])
    elif dtype is None:
        floats = (_STORED_DTYPES[s.dtype] for s in first if s.dtype in _STORED_DTYPES)
        dtype = next(floats, first[0].dtype if first else None)
    if dtype not in _DTYPES:
        raise InputError(
            f"the model's dtype is {dtype}; duqpp quantizes float32, bfloat16 and float16 models"
        )
    return dtype


def _by_model_name(model: Any, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The stored tensors that a model has, by their names there; of several for one, the first."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    names, prefix = model.state_dict(), model.base_model_prefix
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    found: dict[str, Stored] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, [], prefix, names)
        if renamed not in names and name in names:
            renamed, _ = rename_source_key(name, [], [], prefix, names)
        if renamed in names:
            found.setdefault(renamed, stored[name])
    return found
