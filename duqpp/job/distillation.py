"""Training of a whole model whose blocks are quantized, in the folder of its job."""

import os

from duqpp.checkpoint.shard import Progress, read_shard, write_shard
from duqpp.job.blocks import LATENTS, BlockFolder
from duqpp.job.records import check_files, read_record, write_record
from duqpp.methods.base import Method, QuantizedModel, Streams
from duqpp.methods.reports import DistillReport
from duqpp.models.stack import BlockInputs, DecoderStack
from duqpp.placement.stages import stage

_DISTILLED = ".distilled"  # suffix of a new shard, until all are written
_STATE_FILE = "distill-state" + LATENTS


@stage("distill")
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
        first: what enters block 0. exact: what leaves the float model's last block.
    Raises: CheckpointError for a damaged file.
    """
    shards, record = folder.shards, folder.training_record
    if not is_trained(folder) and first.inputs is not None:
        blocks = ((folder.quantized(stack, n), folder.latents(n)) for n in range(len(shards)))
        model = QuantizedModel(blocks, first.inputs, exact.hidden, stack.head())
        trained = method.train(model, folder.work / _STATE_FILE, progress)
        new = {shard.name: shard.with_suffix(_DISTILLED) for shard in shards}
        for index, (shard, codes) in enumerate(zip(shards, trained.codes, strict=True)):
            tensors = read_shard(shard)
            for name, weight in codes.items():
                linear = f"{stack.family.block_name(index)}.{name}"
                tensors[f"{linear}.weight_packed"] = weight.codes
                tensors[f"{linear}.weight_scale"] = weight.scales
            write_shard(new[shard.name], tensors)
        for shard in shards:
            folder.allow(shard, new[shard.name])
        write_record(record, folder.job, {"report": trained.report.to_dict()}, new)
    for shard in shards:
        if (file := shard.with_suffix(_DISTILLED)).exists():
            os.replace(file, shard)
    values = read_record(record, folder.job)
    check_files(record, values)
    return DistillReport(**values["report"])


def is_trained(folder: BlockFolder) -> bool:
    """Whether some of a folder's shards, or all, hold codes of the training."""
    return folder.training_record.exists()


def forget_training(folder: BlockFolder) -> None:
    """Let every block of a trained folder be made again, since one of them has to be.

    It would not get the same bytes behind trained blocks. The report goes last: as long as it is
    there, an interrupted job comes here again.
    """
    for shard in folder.shards:
        shard.unlink(missing_ok=True)
    folder.training_record.unlink()
