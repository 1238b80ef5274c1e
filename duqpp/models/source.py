"""Float models to quantize: a safetensors folder or hub repository read lazily, or a GGUF file."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duqpp.errors import InputError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# The weights a second time, for other programs: Mistral's, Meta's, and those of an ONNX runtime.
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Source(Protocol):
    """A float model, one tensor at a time.

    config: transformers configuration. names: of all tensors, as transformers names them.
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


def check_family(config: Any) -> None:
    """Raise InputError unless the configuration is of a family that duqpp knows."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise InputError(
            f"model_type {kind!r} is not supported; duqpp quantizes {', '.join(ARCHITECTURES)}"
        )


def check_float_model(folder: Path) -> None:
    """Raise InputError unless config.json is that of a float model of a known family."""
    check_family(_float_config(folder))


def fingerprint(source: Source) -> str:
    """SHA-256 over the configuration and every tensor: names, dtypes, shapes and all values.

    Reads the whole model once, at about 1 GB/s: anything less would take two models that differ in
    a few weights for one, and a resumed job would then mix them.
    """
    digest = hashlib.sha256(json.dumps(_plain_config(source.config), sort_keys=True).encode())
    for name in sorted(source.names):
        tensor = source.tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class SafetensorsSource:
    """A folder with config.json and one or more safetensors shards, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config = _float_config(folder)
        self._shard_of = _shards(folder)
        self.names = frozenset(self._shard_of)
        self._open: tuple[Path, Any] | None = None

    def tensor(self, name: str) -> Tensor:
        if name not in self._shard_of:
            raise InputError(f"{self._folder} has no tensor {name}")
        try:
            tensor = self._reader(self._shard_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self._shard_of[name]}: cannot read {name}: {error}") from error
        if tensor.dtype not in _FLOATS and name.endswith((".weight", ".bias")):
            raise InputError(
                f"{self._folder}: {name} is {tensor.dtype}; duqpp quantizes float32, bfloat16 "
                "and float16 models"
            )
        return tensor

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return _load(AutoTokenizer, self._folder, "tokenizer")

    def generation_config(self) -> Any | None:
        from transformers import GenerationConfig

        if not (self._folder / "generation_config.json").exists():
            return None
        return _load(GenerationConfig, self._folder, "generation configuration")

    def _reader(self, shard: Path) -> Any:
        if self._open is None or self._open[0] != shard:  # layers are read in order: one at a time
            self._open = (shard, _open_shard(shard))
        return self._open[1]


class GgufSource:
    """A GGUF file, dequantized whole to float32 by transformers."""

    def __init__(self, file: Path) -> None:
        model, self._tokenizer = load_gguf(file)
        self.config = model.config
        self._generation_config = model.generation_config
        self._file = file
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.names = frozenset(self._tensors)

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise InputError(f"{self._file} has no tensor {name}")
        return self._tensors[name]

    def tokenizer(self) -> Any:
        return self._tokenizer

    def generation_config(self) -> Any | None:
        return self._generation_config


def is_gguf(model: str) -> bool:
    """Whether the name of a model is that of a GGUF file."""
    return model.endswith(".gguf")


def load_gguf(file: Path) -> tuple[Any, Any]:
    """The float32 model in a GGUF file, in eval mode, and its tokenizer. Raises: InputError."""
    import transformers

    if not file.is_file():
        raise InputError(f"no such file: {file}")
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_transformers(), _parsed_once():
        model, keys = _load(
            transformers.AutoModelForCausalLM,
            file.parent,
            "GGUF model",
            gguf_file=file.name,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
        for kind in ("missing_keys", "mismatched_keys"):  # transformers makes such weights up
            if keys[kind]:
                raise InputError(f"{file} lacks the tensor {min(map(str, keys[kind]))}")
        tokenizer = _load(
            transformers.AutoTokenizer, file.parent, "GGUF tokenizer", gguf_file=file.name
        )
    model.config.name_or_path = file.name
    return model.eval(), tokenizer


def _float_config(folder: Path) -> Any:
    """A float model's transformers configuration. Raises: InputError, of a quantized one too."""
    from transformers import AutoConfig

    config = _load(AutoConfig, folder, "configuration")
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method")
        raise InputError(f"{folder} is quantized already ({method}); quantize the float model")
    return config


def _load(cls: Any, folder: Path, what: str, **options: Any) -> Any:
    """`cls.from_pretrained(folder)` with the errors of a bad model as InputError."""
    try:
        return cls.from_pretrained(str(folder), **options)
    except Exception as error:  # of any kind: struct.error, or bare from the tokenizers library
        raise InputError(f"cannot load the {what} of {folder}: {first_line(error)}") from error


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


def first_line(error: Exception) -> str:
    """An error in one line: the first of its message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def download(model: str, *, check: Callable[[Path], object] | None = None, **options: Any) -> Path:
    """A hub repository's configuration, tokenizer and safetensors, in the local cache.

    Args:
        check: called with a folder that has config.json, before anything else is fetched: what it
            raises saves the download of the weights.
        options: for `huggingface_hub.snapshot_download`, such as revision.
    Raises: InputError when the hub does not give it, or the name is a path; what `check` raises.
    """
    if model.startswith(("/", ".", "~")) or model.endswith("/") or model.count("/") > 1:
        raise InputError(f"no such folder or file: {model}")
    if check is not None:
        folder = _snapshot(model, allow_patterns=["config.json"], **options)
        if not (folder / "config.json").exists():
            raise InputError(
                f"{model} has no config.json on the hub; of a repository of GGUF files, download "
                "one and give its path"
            )
        check(folder)
    return _snapshot(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED, **options)


def _snapshot(model: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{model} is no local folder or .gguf file, and the hub has not given it: "
            f"{first_line(error)}"
        ) from error


def base_model(name_or_path: str) -> str:
    """What to call a model that was read from here: its name on the hub, or that of its folder."""
    path = Path(name_or_path)
    # The hub's cache has folders models--OWNER--NAME/snapshots/COMMIT.
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    is_hub_name = name_or_path.count("/") == 1 and not path.is_absolute() and not path.exists()
    return name_or_path if is_hub_name else path.name


def _plain_config(config: Any) -> dict[str, Any]:
    """The configuration without what depends on where and by whom it was read."""
    values = json.loads(config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "name_or_path", "transformers_version"):
        values.pop(key, None)
    return values


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once: it does for the configuration, the weights and the
    tokenizer, and makes a table of names for every tensor. Measured for a 135M model: 8 s, not 19.
    """
    import gguf

    parser, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(parser), cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = parser, names


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars and advice: duqpp shows its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar over a GGUF file's tensors is plain tqdm, which knows nothing of that switch.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
