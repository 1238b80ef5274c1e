"""transformers: loads duqpp checkpoints through `from_pretrained`, once duqpp is imported."""

import json
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from duqpp.errors import CheckpointError, DuqppError, InputError
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
from duqpp.models.source import download, first_line, is_gguf, load_gguf
from duqpp.nn import MXFP4Linear

# transformers refuses a name that is taken; a module that is imported again takes its own place.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)


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
        files = [Path(file) for file in checkpoint_files or []]
        if not files:
            raise CheckpointError("a duqpp checkpoint is loaded from its safetensors files only")
        if len({file.parent for file in files}) > 1:
            raise CheckpointError(f"the index names a shard that is not in {files[0].parent}")
        if _verified.get() != {file.resolve() for file in files}:
            _verify(model, files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # transformers has made every floating-point parameter a trained one.
        for module in model.modules():
            if isinstance(module, MXFP4Linear):
                module.requires_grad_(False)
                module.prepare()

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


_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")

# The files that a `from_pretrained` in progress has verified already.
_verified: ContextVar[frozenset[Path]] = ContextVar("duqpp_verified", default=frozenset())


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
    if not folder.exists():
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        folder = download(str(model), **hub)
    values = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder} is not quantized: no quantization_config")
    layout = Layout.from_dict(values)
    files = shard_files(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder))
        check_architecture(config, ())
        del config.quantization_config
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except InputError:
        raise
    except Exception as error:  # transformers: of any kind
        raise CheckpointError(f"{folder / 'config.json'}: {first_line(error)}") from error
    convert_model(skeleton, layout)
    _verify(skeleton, files, progress)
    token = _verified.set(frozenset(file.resolve() for file in files))
    try:
        return AutoModelForCausalLM.from_pretrained(str(folder), **options)
    finally:
        _verified.reset(token)


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
    except DuqppError:
        raise
    except Exception as error:  # transformers and tokenizers: of any kind
        raise InputError(f"cannot load {model}: {first_line(error)}") from error


def _verify(model: Any, files: list[Path], progress: Progress | None = None) -> None:
    """`verify_checkpoint` for the tensors of a converted model that is still on the meta device."""
    expected = dict(model.state_dict())
    for tied in getattr(model, "all_tied_weights_keys", {}):
        expected.pop(tied, None)
    verify_checkpoint(files, expected, progress)
