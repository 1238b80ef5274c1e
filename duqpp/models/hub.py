"""Hugging Face: repositories of the hub, and what transformers loads from a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from duqpp.errors import InputError, refusing

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# The weights a second time, for other programs: Mistral's, Meta's, and those of an ONNX runtime.
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]


def download(model: str, *, check: Callable[[Path], object] | None = None, **options: Any) -> Path:
    """A hub repository's configuration, tokenizer and safetensors, in the local cache.

    Args:
        check: called with a folder that has config.json, before anything else is fetched: what it
            raises saves the download of the weights.
        options: for `huggingface_hub.snapshot_download`, such as revision.
    Raises: InputError when the hub does not give it, or the name is a path; what `check` raises.
    """
    _check_name(model)
    if check is not None:
        check(download_config(model, **options))
    return _snapshot(model, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED, **options)


def download_config(model: str, **options: Any) -> Path:
    """A hub repository's config.json alone, in a folder of the local cache.

    Raises: as `download`, and InputError where there is no such file.
    """
    _check_name(model)
    folder = _snapshot(model, allow_patterns=["config.json"], **options)
    if not (folder / "config.json").exists():
        raise InputError(
            f"{model} has no config.json on the hub; of a repository of GGUF files, download one "
            "and give its path, and merge an adapter into its base model first"
        )
    return folder


def _check_name(model: str) -> None:
    """Raise InputError for what is a path, and there is nothing."""
    if model.startswith(("/", ".", "~")) or model.endswith("/") or model.count("/") > 1:
        raise InputError(f"no such folder or file: {model}")


def _snapshot(model: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    with refusing(f"{model} is no local folder or .gguf file, and the hub has not given it"):
        return Path(snapshot_download(model, **options))


def base_model(name_or_path: str) -> str:
    """What to call a model that was read from here: its name on the hub, or that of its folder."""
    path = Path(name_or_path)
    # The hub's cache has folders models--OWNER--NAME/snapshots/COMMIT.
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    is_hub_name = name_or_path.count("/") == 1 and not path.is_absolute() and not path.exists()
    return name_or_path if is_hub_name else path.name


def load_pretrained(cls: Any, folder: Path, what: str, **options: Any) -> Any:
    """`cls.from_pretrained(folder)` with the errors of a bad model as InputError."""
    with refusing(f"cannot load the {what} of {folder}"):  # struct.error, or a panic of tokenizers
        return cls.from_pretrained(str(folder), **options)


def load_generation_config(folder: Path) -> Any | None:
    """A model's transformers generation configuration, if it has one. Raises: InputError."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return None
    return load_pretrained(GenerationConfig, folder, "generation configuration")


def load_whole_model(cls: Any, folder: Path, what: str, **options: Any) -> Any:
    """`load_pretrained` of a model, of which transformers has made up no tensor.

    Raises: InputError, for a missing or misshapen tensor too.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, keys = load_pretrained(cls, folder, what, **options)
    if misshapen := sorted(keys["mismatched_keys"]):
        name, found, expected = misshapen[0]
        raise InputError(f"{folder}: {name} must be {list(expected)}, got {list(found)}")
    if missing := sorted(keys["missing_keys"]):
        raise InputError(f"{folder} has no tensor {missing[0]}")
    return model
