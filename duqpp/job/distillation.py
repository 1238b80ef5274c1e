"""Training of a whole model whose blocks are quantized, in the folder of its job."""

import os
from pathlib import Path

from duqpp.checkpoint.shard import Progress, read_json, write_block, write_json
from duqpp.errors import CheckpointError
from duqpp.job.blocks import LATENTS, BlockFolder
from duqpp.methods.base import Method, QuantizedModel, Streams
from duqpp.methods.reports import DistillReport
from duqpp.models.stack import BlockInputs, DecoderStack

_DISTILLED = ".distilled"  # suffix of a new shard, until all are written
_REPORT_FILE = "model-distilled.json"  # once it is there, the new shards are whole
_STATE_FILE = "distill-state" + LATENTS


def train_shards(
    method: Method,
    stack: DecoderStack,
    folder: BlockFolder,
    first: Streams,
    exact: BlockInputs,
    progress: Progress,
) -> DistillReport:
    """Train all blocks of a folder together, and replace their shards.

    Args:
        stack: with none of its blocks released.
        first: what enters block 0. exact: what leaves the float model's last block.
    Raises: CheckpointError for a damaged file.
    """
    shards, report_file = folder.shards, folder.work / _REPORT_FILE
    if not is_trained(folder) and first.inputs is not None:
        indices = range(len(shards))
        model = QuantizedModel(
            [folder.quantized(stack, index) for index in indices],
            [folder.latents(index) for index in indices],
            first.inputs,
            exact.hidden,
            stack.head(),
        )
        report = method.train(model, folder.work / _STATE_FILE, progress)
        for shard, block in zip(shards, model.blocks, strict=True):
            write_block(shard.with_suffix(_DISTILLED), block.name, block.module)
        write_json(report_file, report.to_dict())
    for shard in shards:
        if (new := shard.with_suffix(_DISTILLED)).exists():
            os.replace(new, shard)
    return _read_report(report_file)


def is_trained(folder: BlockFolder) -> bool:
    """Whether some of a folder's shards, or all, hold codes of the training."""
    return (folder.work / _REPORT_FILE).exists()


def forget_training(folder: BlockFolder) -> None:
    """Let every block of a trained folder be made again, since one of them has to be.

    It would not get the same bytes behind trained blocks. The report goes last: as long as it is
    there, an interrupted job comes here again.
    """
    for shard in folder.shards:
        shard.unlink(missing_ok=True)
    (folder.work / _REPORT_FILE).unlink()


def _read_report(path: Path) -> DistillReport:
    values = read_json(path)
    try:
        return DistillReport(**values)
    except TypeError as error:
        raise CheckpointError(f"{path} is not the report of a distillation: {error}") from error
