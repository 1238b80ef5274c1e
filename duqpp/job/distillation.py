"""Training of a whole model whose blocks are quantized, in the folder of its job."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from duqpp.checkpoint.shard import Progress, read_shard, write_shard
from duqpp.format import MXFP4Tensor
from duqpp.job.blocks import LATENTS, BlockFolder
from duqpp.job.records import check_files, read_record, write_record
from duqpp.methods.base import Method, QuantizedModel, Streams
from duqpp.methods.reports import DistillReport
from duqpp.models.stack import DecoderStack
from duqpp.placement.ranks import Ranks
from duqpp.placement.stages import stage

_DISTILLED = ".distilled"  # suffix of a new shard, until all are written
_STATE_FILE = "distill-state" + LATENTS


@stage("distill")
def train_shards(
    method: Method,
    stack: DecoderStack,
    folder: BlockFolder,
    first: Streams,
    last: Streams,
    ranks: Ranks,
    progress: Progress,
) -> DistillReport:
    """Train all blocks of a folder together, and replace their shards.

    Args:
        stack: of the job's source, which no rank shares.
        first: what enters block 0, all batches. last: what leaves the last block, those of this
            rank; of the float model alone.
        ranks: that train together; the first alone writes shards.
    Raises: CheckpointError for a damaged file.
    """
    if first.inputs is not None and not ranks.first(lambda: is_trained(folder)):
        blocks = (
            (folder.quantized(stack, index), folder.latents(index))
            for index in range(len(folder.shards))
        )
        exact = _of_all_ranks(last, ranks)
        model = QuantizedModel(blocks, first.inputs, exact, stack.head(), ranks)
        trained = method.train(model, folder.work / _STATE_FILE, progress)
        for index, codes in enumerate(trained.codes):
            if ranks.is_first:
                _write_trained(folder, index, stack.family.block_name(index), codes)
        ranks.first(lambda: _record(folder, trained.report))
    return ranks.first(lambda: _put_in_place(folder))


def _of_all_ranks(streams: Streams, ranks: Ranks) -> list[Tensor]:
    """The float stream's batches, as one process would have them.

    Each rank has a run of those that calibrate, and one of those that only refine.
    """
    exact = streams.exact.hidden if streams.exact is not None else []
    if ranks.count == 1:
        return exact
    whole: list[Tensor] = []
    for part in (exact[: streams.calibrating], exact[streams.calibrating :]):
        sequences = ranks.all(len(part[0]))[0]  # of a batch; the last one may have fewer
        whole += ranks.gather(torch.cat(part)).split(sequences)
    return whole


def _write_trained(
    folder: BlockFolder, index: int, block: str, codes: Mapping[str, MXFP4Tensor]
) -> None:
    """Write the new shard of a block beside the one that it has."""
    shard = folder.shards[index]
    tensors = read_shard(shard)
    for name, weight in codes.items():
        tensors[f"{block}.{name}.weight_packed"] = weight.codes
        tensors[f"{block}.{name}.weight_scale"] = weight.scales
    write_shard(shard.with_suffix(_DISTILLED), tensors)


def _record(folder: BlockFolder, report: DistillReport) -> None:
    """Say that the new shards are whole."""
    new = {shard.name: shard.with_suffix(_DISTILLED) for shard in folder.shards}
    for shard in folder.shards:
        folder.allow(shard, new[shard.name])
    write_record(folder.training_record, folder.job, {"report": report.to_dict()}, new)


def _put_in_place(folder: BlockFolder) -> DistillReport:
    """Let the new shards be those of the job. Raises: CheckpointError for a damaged file."""
    for shard in folder.shards:
        if (file := shard.with_suffix(_DISTILLED)).exists():
            os.replace(file, shard)
    values = read_record(folder.training_record, folder.job)
    check_files(folder.training_record, values)
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
