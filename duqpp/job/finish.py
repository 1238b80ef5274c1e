"""What a finished job writes beside the shards, from its source and its reports."""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from duqpp.checkpoint.card import GUARD, GUARD_FIELD, write_card
from duqpp.checkpoint.layout import Layout
from duqpp.checkpoint.shard import INDEX_FILE, read_shard, write_json
from duqpp.config import QuantizeConfig
from duqpp.job.blocks import BlockFolder, Results
from duqpp.job.companions import REPORT_FILE, Companions
from duqpp.job.folder import JOB_FIELD
from duqpp.methods.reports import mean_errors
from duqpp.models.hub import base_model
from duqpp.placement.stages import stage
from duqpp.version import __version__


def stage_companions(companions: Companions, folder: BlockFolder, dtype: torch.dtype) -> None:
    """Everything that can be written before the shards are, so that what fails does so now.

    config.json and the model card are without what is measured. Raises: InputError.
    """
    companions.write(folder.work)
    _write_config(companions, folder.layout, dtype, folder.work)
    write_card(folder.work)
    companions.check(folder.work)


@stage("finishing")
def write_companions(
    companions: Companions, folder: BlockFolder, dtype: torch.dtype, results: Results
) -> None:
    """Index, report, config.json and model card, beside the finished shards and what is staged."""
    weight_map, size = {}, 0
    work, layout = folder.work, folder.layout
    for shard in sorted(work.glob("*.safetensors")):
        for name, tensor in read_shard(shard).items():
            weight_map[name] = shard.name
            size += tensor.numel() * tensor.element_size()
    write_json(work / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(work / REPORT_FILE, results.to_dict())
    measured = {"mean_errors": mean_errors(results.groups), JOB_FIELD: folder.job}
    layout = replace(layout, provenance=layout.provenance | measured)
    _write_config(companions, layout, dtype, work)
    write_card(work)


def _write_config(companions: Companions, layout: Layout, dtype: torch.dtype, work: Path) -> None:
    own = {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": layout.to_dict(),
        GUARD_FIELD: GUARD,
    }
    write_json(work / "config.json", companions.config | own)


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
