"""Float models to quantize: a safetensors folder or hub repository read lazily, or a GGUF file."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from duqpp.errors import InputError
from duqpp.files import model_path
from duqpp.models.family import family_of
from duqpp.models.folder import check_float_folder
from duqpp.models.gguf import GgufSource, gguf_config, is_gguf
from duqpp.models.hub import (
    download,
    download_config,
    load_generation_config,
    load_pretrained,
)
from duqpp.models.weights import FolderWeights


class Source(Protocol):
    """A float model, one tensor at a time.

    config: transformers configuration. names: of all tensors, as transformers names them. A source
    that is a folder has it as `folder`: a checkpoint gets copies of the files beside the weights.
    """

    config: Any
    names: frozenset[str]

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype that it has in the model.

        Raises: InputError when it is missing or unreadable.
        """

    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""

    def generation_config(self) -> Any | None:
        """The model's transformers generation configuration, such as its stop tokens, if any."""


def open_source(model: str) -> Source:
    """Open a local folder, a .gguf file that transformers can load, or a hub repository by name.

    Raises: InputError when there is no such model, or it is not a float safetensors or GGUF model.
    """
    path = model_path(model)
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


def read_config(model: str) -> Any:
    """The transformers configuration of what `open_source` opens; no weights are read.

    Raises: InputError when there is none, or it is not that of a float model of a known family.
    """
    path = model_path(model)
    if is_gguf(model):
        config = gguf_config(path)
    elif path.exists() and not path.is_dir():
        raise InputError(f"{model} is neither a model folder nor a .gguf file")
    else:
        config = _float_config(path if path.is_dir() else download_config(model))
    family_of(config)
    return config


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
    """A folder with config.json and safetensors, mapped into memory, as transformers reads them.

    Its `config` has the dtype of the tensors, and says whether lm_head is tied in fact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _float_config(folder)
        family_of(self.config)  # an error for what duqpp does not know
        self._weights = FolderWeights(folder, self.config)
        self.names = self._weights.names
        self.config.dtype = self._weights.dtype
        self.config.tie_word_embeddings = self._weights.is_tied

    def tensor(self, name: str) -> Tensor:
        return self._weights.tensor(name)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return load_pretrained(AutoTokenizer, self.folder, "tokenizer", trust_remote_code=False)

    def generation_config(self) -> Any | None:
        return load_generation_config(self.folder)


def _float_config(folder: Path) -> Any:
    """A float model's transformers configuration. Raises: InputError, of a quantized one too."""
    from transformers import AutoConfig

    check_float_folder(folder)
    config = load_pretrained(AutoConfig, folder, "configuration")
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method")
        raise InputError(f"{folder} is quantized already ({method}); quantize the float model")
    return config


def _plain_config(config: Any) -> dict[str, Any]:
    """The configuration without what depends on where and by whom it was read."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "name_or_path", "transformers_version"):
        values.pop(key, None)
    return values
