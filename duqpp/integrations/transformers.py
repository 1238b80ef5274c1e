"""transformers: loads duqpp checkpoints through `from_pretrained`, once duqpp is imported."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from duqpp.errors import CheckpointError, InputError
from duqpp.format import BLOCK_SIZE
from duqpp.models.checkpoint import (
    CHECKSUMS_KEY,
    Progress,
    checksum,
    read_json,
    shard_files,
    verify_checkpoint,
)
from duqpp.models.layout import QUANT_METHOD, Layout, convert_model
from duqpp.models.llama import check_architecture
from duqpp.models.source import download, is_gguf, load_gguf


@register_quantization_config(QUANT_METHOD)
class DuqppConfig(QuantizationConfigMixin):
    """The `quantization_config` of a duqpp checkpoint, as transformers wants it."""

    def __init__(self, **values: Any) -> None:
        self.layout = Layout.from_dict({"quant_method": QUANT_METHOD, **values})
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        return self.layout.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


@register_quantizer(QUANT_METHOD)
class DuqppQuantizer(HfQuantizer):
    """Builds the quantized modules before transformers loads tensors into them by name."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise InputError(
                "duqpp does not quantize while loading: run `duqpp quantize MODEL OUT` first"
            )

    @property
    def quantized_element_size(self) -> float:
        return 0.5 + 1 / BLOCK_SIZE  # bytes: 4 bits and a share of a scale byte

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        check_architecture(model.config, ())
        convert_model(model, self.quantization_config.layout)
        _verify(model, [Path(file) for file in checkpoint_files or []])

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        checksums = {name: checksum(tensor) for name, tensor in model.state_dict().items()}
        return None, {CHECKSUMS_KEY: json.dumps(checksums)}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


_verified: set[tuple[str, int, int]] = set()


def from_pretrained(model: str | Path, *, progress: Progress | None = None, **options: Any) -> Any:
    """Load a duqpp checkpoint as a transformers causal language model.

    Every tensor is checked against the model's structure and its checksum before it is used, and
    nothing in the checkpoint is executed.

    Args:
        model: local folder, or hub name.
        progress: called with ("verify", shards done, shards in all).
        options: for `AutoModelForCausalLM.from_pretrained`, such as dtype and device_map.
    Raises: CheckpointError when the checkpoint is damaged, inconsistent, or not duqpp's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(model).expanduser()
    folder = folder if folder.exists() else download(str(model))
    values = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder} is not quantized: no quantization_config")
    layout = Layout.from_dict(values)
    files = shard_files(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    check_architecture(config, ())
    del config.quantization_config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    convert_model(skeleton, layout)
    _verify(skeleton, files, progress)
    return AutoModelForCausalLM.from_pretrained(str(folder), **options)


def load_model(model: str, *, progress: Progress | None = None) -> tuple[Any, Any]:
    """Any model that duqpp can evaluate, quantized or float, with its tokenizer; in eval mode.

    Args: model: duqpp checkpoint or float model folder, .gguf file, or hub name.
    Raises: InputError when it cannot be loaded; CheckpointError for a damaged duqpp checkpoint.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if is_gguf(model):
        return load_gguf(Path(model))
    folder = Path(model).expanduser()
    folder = folder if folder.exists() else download(model)
    quantization = read_json(folder / "config.json").get("quantization_config") or {}
    try:
        if quantization.get("quant_method") == QUANT_METHOD:
            loaded = from_pretrained(folder, progress=progress)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        return loaded.eval(), AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError | InputError):
            raise
        raise InputError(f"cannot load {model}: {str(error).strip().splitlines()[0]}") from error


def _verify(model: Any, files: list[Path], progress: Progress | None = None) -> None:
    """`verify_checkpoint`, once for files that do not change."""
    keys = {(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files}
    if keys <= _verified:
        return
    expected = dict(model.state_dict())
    for tied in getattr(model, "all_tied_weights_keys", {}):
        expected.pop(tied, None)
    verify_checkpoint(files, expected, progress)
    _verified.update(keys)
