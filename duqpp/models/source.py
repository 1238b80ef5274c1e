"""Float models to quantize: a safetensors folder or hub repository read lazily, or a GGUF file."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duqpp.errors import InputError
from duqpp.models.family import family_of
from duqpp.models.gguf import GgufSource, is_gguf
from duqpp.models.hub import download, load_pretrained

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Source(Protocol):
    """A float model, one tensor at a time.

    config: transformers configuration. names: of all tensors, as transformers names them. A source
    that is a folder has it as `folder`: a checkpoint gets copies of the files beside the weights.
    """

    config: Any
    names: frozenset[str]

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype. Raises: InputError when it is missing or unreadable."""

    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""

    def generation_config(self) -> Any | None:
        """The model's transformers generation configuration, such as its stop tokens, if any."""


def open_source(model: str) -> Source:
    """Open a local folder, a .gguf file that transformers can load, or a hub repository by name.

    Raises: InputError when there is no such model, or it is not a float safetensors or GGUF model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return SafetensorsSource(path)
    if is_gguf(model):
        return GgufSource(path)
    if path.exists():
        raise InputError(f"{model} is neither a model folder nor a .gguf file")
    return SafetensorsSource(download(model, check=check_float_model))


def check_float_model(folder: Path) -> None:
    """Raise InputError unless config.json is that of a float model of a known family."""
    family_of(_float_config(folder))


# Of the sources that are open.
_FINGERPRINTS: WeakKeyDictionary[Source, str] = WeakKeyDictionary()


def fingerprint(source: Source) -> str:
    """SHA-256 over the configuration and every tensor: names, dtypes, shapes and all values.

    Reads the whole model once, at about 1 GB/s, however often an open source is asked for it:
    anything less would take two models that differ in a few weights for one, and a resumed job
    would then mix them.
    """
    if source not in _FINGERPRINTS:
        _FINGERPRINTS[source] = _fingerprint(source)
    return _FINGERPRINTS[source]


def _fingerprint(source: Source) -> str:
    digest = hashlib.sha256(json.dumps(_plain_config(source.config), sort_keys=True).encode())
    for name in sorted(source.names):
        tensor = source.tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class SafetensorsSource:
    """A folder with config.json and one or more safetensors shards, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _float_config(folder)
        self._shard_of = _shards(folder)
        self.names = frozenset(self._shard_of)
        self._open: tuple[Path, Any] | None = None

    def tensor(self, name: str) -> Tensor:
        if name not in self._shard_of:
            raise InputError(f"{self.folder} has no tensor {name}")
        try:
            tensor = self._reader(self._shard_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self._shard_of[name]}: cannot read {name}: {error}") from error
        if tensor.dtype not in _FLOATS and name.endswith((".weight", ".bias")):
            raise InputError(
                f"{self.folder}: {name} is {tensor.dtype}; duqpp quantizes float32, bfloat16 "
                "and float16 models"
            )
        return tensor

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return load_pretrained(AutoTokenizer, self.folder, "tokenizer", trust_remote_code=False)

    def generation_config(self) -> Any | None:
        from transformers import GenerationConfig

        if not (self.folder / "generation_config.json").exists():
            return None
        return load_pretrained(GenerationConfig, self.folder, "generation configuration")

    def _reader(self, shard: Path) -> Any:
        if self._open is None or self._open[0] != shard:  # layers are read in order: one at a time
            self._open = (shard, _open_shard(shard))
        return self._open[1]


def _float_config(folder: Path) -> Any:
    """A float model's transformers configuration. Raises: InputError, of a quantized one too."""
    from transformers import AutoConfig

    config = load_pretrained(AutoConfig, folder, "configuration")
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method")
        raise InputError(f"{folder} is quantized already ({method}); quantize the float model")
    return config


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name to shard, from the index or the single file; every shard is opened once."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {name: folder / file for name, file in weight_map.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not a safetensors index: {error!r}") from error
        if outside := sorted(str(s) for s in shards.values() if s.parent != folder):
            raise InputError(f"{index} names the shard {outside[0]}, which is not in {folder}")
        for shard in sorted(set(shards.values())):
            present = set(_open_shard(shard).keys())
            missing = [n for n, s in shards.items() if s == shard and n not in present]
            if missing:
                raise InputError(f"{shard} lacks the tensor {missing[0]} that the index names")
        return shards
    if single.exists():
        return dict.fromkeys(_open_shard(single).keys(), single)
    raise InputError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json; "
        "duqpp reads safetensors only (pickled .bin weights can run code)"
    )


def _open_shard(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {shard}: {error}") from error


def _plain_config(config: Any) -> dict[str, Any]:
    """The configuration without what depends on where and by whom it was read."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "name_or_path", "transformers_version"):
        values.pop(key, None)
    return values
