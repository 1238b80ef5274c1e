"""Models to evaluate: block by block where duqpp knows how, else whole."""

from pathlib import Path
from typing import Any

import torch

from duqpp.checkpoint.layout import is_duqpp
from duqpp.checkpoint.shard import Progress, read_json
from duqpp.checkpoint.stack import CheckpointSource, QuantizedStack
from duqpp.files import model_path
from duqpp.integrations.transformers import load_model
from duqpp.models.family import check_blocks, is_known
from duqpp.models.folder import check_folder
from duqpp.models.gguf import is_gguf
from duqpp.models.hub import download
from duqpp.models.source import Source, open_source
from duqpp.models.stack import DecoderStack
from duqpp.placement import HOST, Placement


def open_model(
    model: str,
    *,
    device: torch.device = HOST,
    device_map: str | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """A model as `perplexity` takes it, and its tokenizer.

    duqpp checkpoints, and float models of the families that duqpp quantizes, are stacks, of which
    one decoder block at a time is read, verified and in memory. Other models are whole.

    Args:
        model: duqpp checkpoint or float model folder, .gguf file, or hub name.
        device: where the model is to run.
        device_map: as for `load_model`; the model is then whole.
        progress: as for `load_model`.
    Raises: InputError when it cannot be opened; CheckpointError for a damaged duqpp checkpoint.
    """
    path = model_path(model)
    if not path.exists() and not is_gguf(model):
        path = download(model)
    source = None if device_map else _source(path)
    if source is None:
        return load_model(str(path), device=device, device_map=device_map, progress=progress)
    source.generation_config()  # a damaged one is an error to every loader
    placement = Placement(device)
    if isinstance(source, CheckpointSource):
        return QuantizedStack(source, placement), source.tokenizer()
    return DecoderStack(source, placement=placement), source.tokenizer()


def _source(path: Path) -> Source | None:
    """What a model is read from block by block; None for one that can only be loaded whole."""
    if is_gguf(str(path)):
        source = open_source(str(path))
        return source if is_known(source.config.model_type) else None
    check_folder(path)
    values = read_json(path / "config.json")
    check_blocks(values.get("num_hidden_layers"))
    if is_duqpp(values):
        return CheckpointSource(path)
    is_float = is_known(values.get("model_type")) and not values.get("quantization_config")
    return open_source(str(path)) if is_float and any(path.glob("*.safetensors")) else None
