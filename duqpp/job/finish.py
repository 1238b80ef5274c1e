"""What a finished job writes beside the shards, from its source and its reports."""

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duqpp.checkpoint.card import GUARD, GUARD_FIELD, write_card
from duqpp.checkpoint.layout import Layout
from duqpp.checkpoint.shard import INDEX_FILE, read_json, read_shard, write_json
from duqpp.config import QuantizeConfig
from duqpp.job.blocks import Results
from duqpp.methods.reports import mean_errors
from duqpp.models.hub import base_model
from duqpp.models.source import Source
from duqpp.version import __version__

REPORT_FILE = "quantization_report.json"


@dataclass(frozen=True)
class Companions:
    """What a checkpoint has of its source besides weights: read before any work is done."""

    config: Any
    tokenizer: Any
    generation: Any | None
    causal_class: str


def companions_of(source: Source) -> Companions:
    """Read them. Raises: InputError."""
    return Companions(
        source.config,
        source.tokenizer(),
        source.generation_config(),
        _causal_class(source.config),
    )


def write_companions(
    companions: Companions, layout: Layout, dtype: torch.dtype, work: Path, results: Results
) -> None:
    """Configurations, index, tokenizer, report and model card, beside the finished shards."""
    weight_map, size = {}, 0
    for shard in sorted(work.glob("*.safetensors")):
        for name, tensor in read_shard(shard).items():
            weight_map[name] = shard.name
            size += tensor.numel() * tensor.element_size()
    write_json(work / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    companions.config.save_pretrained(work)
    config = read_json(work / "config.json")
    for transient in ("_name_or_path", "quantization_config"):
        config.pop(transient, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [companions.causal_class]
    measured = layout.provenance | {"mean_errors": mean_errors(results.groups)}
    config["quantization_config"] = replace(layout, provenance=measured).to_dict()
    config[GUARD_FIELD] = GUARD
    write_json(work / "config.json", config)
    companions.tokenizer.save_pretrained(work)
    if companions.generation is not None:
        companions.generation.save_pretrained(work)
    report: dict[str, Any] = {"groups": [group.to_dict() for group in results.groups]}
    if results.distilled:
        report["distilled"] = results.distilled.to_dict()
    if results.refined:
        report["refined"] = [block.to_dict() for block in results.refined]
    write_json(work / REPORT_FILE, report)
    write_card(work)


def _causal_class(config: Any) -> str:
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)


def provenance(name_or_path: str | None, config: QuantizeConfig, data: str) -> dict[str, Any]:
    """Where a checkpoint comes from: float model, calibration data, options, versions."""
    import transformers

    return {
        "base_model": base_model(name_or_path or ""),
        "calibration": data,
        "configuration": config.to_dict(),
        "versions": {
            "duqpp": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
