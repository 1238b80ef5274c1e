"""transformers: `from_pretrained` of quantized and float models, once duqpp is imported."""

import copy
from contextlib import suppress
from contextvars import ContextVar
from importlib.util import find_spec
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

from duqpp.checkpoint.card import GUARD_FIELD
from duqpp.checkpoint.layout import (
    QUANT_METHOD,
    Layout,
    convert_model,
    is_duqpp,
    share_inputs,
    tensors_of,
)
from duqpp.checkpoint.manifest import MANIFEST_FILE, verify_manifest
from duqpp.checkpoint.shard import Progress, checkpoint_contents, read_json, verify_values
from duqpp.checkpoint.stack import CheckpointSource, layout_of
from duqpp.checkpoint.transforms import verify_transforms_of
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, InputError, refusing
from duqpp.files import model_path
from duqpp.format import BLOCK_SIZE
from duqpp.integrations.on_load import QuantizeOnLoad
from duqpp.integrations.saving import complete_on_save, forget_on_save, state_to_save
from duqpp.job.finish import provenance
from duqpp.models.family import check_blocks, family_of
from duqpp.models.folder import check_float_folder, check_folder
from duqpp.models.gguf import is_gguf, load_gguf
from duqpp.models.hub import (
    base_model,
    download,
    load_generation_config,
    load_whole_model,
)
from duqpp.models.weights import check_complete, check_files
from duqpp.nn import MXFP4Linear, unshare_input
from duqpp.placement import HOST
from duqpp.placement.devices import fitting

# transformers refuses a name that is taken; a module that is imported again takes its own place.
AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)


@register_quantization_config(QUANT_METHOD)
class DuqppConfig(QuantizationConfigMixin):
    """The `quantization_config` of transformers: how a model is to be quantized, or was.

    To quantize a float checkpoint while it loads, by the same arithmetic as `duqpp quantize`::

        AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=DuqppConfig(method="rtn"))

    Args:
        method: "hadamard" (the default here), "rtn" or "random": what reads no activations.
        modules_to_not_convert: transformers' name for the field `skip` of `duqpp.QuantizeConfig`.
        values: other fields of `duqpp.QuantizeConfig`. With quant_method among them, they are those
            of a checkpoint's config.json instead, which transformers passes.
    Raises: InputError for a bad option, or one that needs calibration; CheckpointError for a bad
        field of a checkpoint.
    """

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.options: QuantizeConfig | None = None
        if "quant_method" in values:
            self.layout = Layout.from_dict(values)
        else:
            self.options = _options(values)
            self.layout = self.options.build_method().layout(self.options.skip)

    def to_dict(self) -> dict[str, Any]:
        return self.layout.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


def _options(values: dict[str, Any]) -> QuantizeConfig:
    """The options of `DuqppConfig`, checked."""
    if (skip := values.pop("modules_to_not_convert", None)) is not None:
        if "skip" in values:
            raise InputError("DuqppConfig: modules_to_not_convert and skip are the same: give one")
        values["skip"] = tuple(skip)
    options = QuantizeConfig.from_dict({"method": "hadamard"} | values)
    if options.dtype is not None:
        raise InputError("DuqppConfig: give dtype to from_pretrained instead")
    if options.needs.inputs:
        raise InputError(
            "DuqppConfig: these options need calibration, which a model that loads does not get; "
            'give method="rtn", "hadamard" or "random" alone, or run '
            f"`duqpp quantize MODEL OUT --method {options.method}` first"
        )
    return options


@register_quantizer(QUANT_METHOD)
class DuqppQuantizer(HfQuantizer):
    """Builds the quantized modules, into which transformers loads tensors by name.

    For a quantized checkpoint they are there before anything is loaded; of a float one each linear
    is replaced when its weight has been read.
    """

    def __init__(self, quantization_config: DuqppConfig, **kwargs: Any) -> None:
        # A copy: what was loaded is written into it, and one configuration may load many models.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self._on_load: QuantizeOnLoad | None = None
        self._weights: frozenset[str] = frozenset()  # names of those that `_on_load` quantizes

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.options is None:
            raise InputError(
                "quantization_config describes a quantized checkpoint, but the model is a float "
                'one; to quantize it while it loads, give DuqppConfig(method="hadamard")'
            )

    # transformers up to 5.20 calls the first, from 5.18 on the second, before it looks for files.
    def update_tp_plan(self, config: Any) -> Any:
        return _without_guard(config)

    def update_attn_implementation(self, config: Any) -> Any:
        return _without_guard(config)

    @property
    def quantized_element_size(self) -> float:
        return 0.5 + 1 / BLOCK_SIZE  # bytes: 4 bits and a share of a scale byte

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._weights

    def get_quantize_ops(self) -> QuantizeOnLoad | None:
        return self._on_load

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        options, layout = self.quantization_config.options, self.quantization_config.layout
        family = family_of(model.config)
        if options is None:
            family.check_sizes(layout.skip)
        else:
            family.check(options.skip)
        if not any(name == family.blocks for name, _ in model.named_modules()):
            raise InputError(
                "duqpp loads a model with its head (AutoModelForCausalLM), not "
                f"{type(model).__name__}"
            )
        files = [Path(file) for file in checkpoint_files or []]
        if not self.pre_quantized:
            if all(file.suffix == ".safetensors" for file in files):
                check_complete(model, files)
            origin = provenance(model.config.name_or_path, options, "none")
            self.quantization_config.layout = options.build_method().layout(options.skip, origin)
            self._on_load = QuantizeOnLoad(self.quantization_config.layout, options, family)
            linears = family.quantized_linears(options.skip)
            self._weights = frozenset(f"{linear}.weight" for linear in linears)
            return
        convert_model(model, layout)
        if not files:
            raise CheckpointError("a duqpp checkpoint is loaded from its safetensors files only")
        if len({file.parent for file in files}) > 1:
            raise CheckpointError(f"the index names a shard that is not in {files[0].parent}")
        if _verified.get() != {file.resolve() for file in files}:
            verify_manifest(_with_manifest(files[0].parent))
            verify_values(checkpoint_contents(files, tensors_of(model)))
            verify_transforms_of(files, family, layout.skip)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._on_load is not None:
            self._check_quantized(model, self._on_load.failures)
            share_inputs(model, self.quantization_config.layout)
            self._on_load, self._weights = None, frozenset()
        for module in model.modules():
            # transformers has made every floating-point parameter a trained one.
            if isinstance(module, MXFP4Linear):
                module.requires_grad_(False)
                module.prepare()
        complete_on_save(model)

    def _check_quantized(self, model: Any, failures: list[InputError]) -> None:
        """Raise InputError unless every linear that was to be quantized has been."""
        if failures:
            raise failures[0]
        for weight in sorted(self._weights):
            if not isinstance(model.get_submodule(weight.removesuffix(".weight")), MXFP4Linear):
                raise InputError(f"{model.config.name_or_path} has no tensor {weight}")

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Put float linears with the effective weights in the place of the quantized ones."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        quantized = {n: m for n, m in model.named_modules() if isinstance(m, MXFP4Linear)}
        if any(parameter.is_meta for m in quantized.values() for parameter in m.parameters()):
            raise InputError("dequantize: part of the model is offloaded; load it without")
        for module in model.modules():
            unshare_input(module)
        for name, linear in quantized.items():
            model.set_submodule(name, linear.dequantized(dtype))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        forget_on_save(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        return state_to_save(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters: gradients pass through the quantized linears

    @property
    def is_compileable(self) -> bool:
        return True


def _with_manifest(folder: Path) -> Path:
    """The folder of a model's files; one in the hub's cache with its manifest, if it has one.

    transformers fetches the files that it needs, and the manifest is none of them.
    """
    if folder.parent.name == "snapshots":
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        place = {"revision": folder.name, "cache_dir": folder.parents[2]}
        with suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
            hf_hub_download(base_model(str(folder)), MANIFEST_FILE, **place)
    return folder


def _without_guard(config: Any) -> Any:
    """A configuration whose weights are looked for as usual: duqpp is there to read them."""
    file = getattr(config, GUARD_FIELD, None)
    if file is not None and not str(file).endswith((".safetensors", ".safetensors.index.json")):
        delattr(config, GUARD_FIELD)
    return config


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
    from transformers import AutoModelForCausalLM

    folder = model_path(model)
    if not folder.exists():
        hub = {name: options[name] for name in _HUB_OPTIONS if name in options}
        folder = download(str(model), check=layout_of, **hub)
    source = CheckpointSource(folder)
    source.verify(progress)
    token = _verified.set(frozenset(file.resolve() for file in source.files))
    try:
        return AutoModelForCausalLM.from_pretrained(str(folder), **options)
    finally:
        _verified.reset(token)


def load_model(
    model: str,
    *,
    device: torch.device | str = HOST,
    device_map: str | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Any model that duqpp can evaluate, quantized or float, with its tokenizer.

    It is whole, and in eval mode.

    Args:
        model: duqpp checkpoint or float model folder, .gguf file, or hub name.
        device: where the model is to run. It is read into main memory first.
        device_map: "auto" to spread it over all GPUs by accelerate, whatever `device` says.
        progress: as for `from_pretrained`.
    Raises: InputError when it cannot be loaded, or is too large for the device; CheckpointError for
        a damaged duqpp checkpoint.
    """
    if device_map is not None:
        if find_spec("accelerate") is None:
            raise InputError("`device_map` needs accelerate: pip install accelerate")
        return _load_model(model, progress, device_map=device_map)
    loaded, tokenizer = _load_model(model, progress)
    device = torch.device(device)
    if loaded.device != device:
        with fitting(model, device):
            loaded.to(device)
    return loaded, tokenizer


def _load_model(model: str, progress: Progress | None, **options: Any) -> tuple[Any, Any]:
    """`load_model` for the CPU, or where options of transformers' `from_pretrained` say."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_path(model)
    if is_gguf(model):
        return load_gguf(folder, **options)
    folder = folder if folder.exists() else download(model)
    check_folder(folder)
    values = read_json(folder / "config.json")
    check_blocks(values.get("num_hidden_layers"))
    quantized = is_duqpp(values)
    with refusing(f"cannot load {model}"):
        if quantized:
            loaded = from_pretrained(folder, progress=progress, **options)
        else:
            check_float_folder(folder)
            load_generation_config(folder)  # transformers would do without a damaged one
            try:
                options |= {"dtype": "auto"}
                loaded = load_whole_model(AutoModelForCausalLM, folder, "model", **options)
            except InputError:
                check_files(folder)  # whose error says which
                raise
        return loaded.eval(), AutoTokenizer.from_pretrained(str(folder))
