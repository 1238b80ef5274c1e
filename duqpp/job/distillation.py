"""Distillation of a checkpoint that `quantize_model` is about to finish, in its working folder."""

import os
from collections.abc import Callable
from pathlib import Path

from duqpp.checkpoint.layout import Layout, quantized_block
from duqpp.checkpoint.shard import read_json, read_shard, shard_name, write_block, write_json
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError
from duqpp.methods.group import group_generator
from duqpp.methods.refine.distill import DistillReport, distill
from duqpp.models.llama import BlockInputs, DecoderStack

LATENTS = ".latents"  # suffix of what a block's codes were rounded from, beside its shard
_DISTILLED = ".distilled"  # suffix of a new shard, until all are written
_REPORT_FILE = "model-distilled.json"  # once it is there, the new shards are whole
_STATE_FILE = "distill-state" + LATENTS


def distill_shards(
    stack: DecoderStack,
    config: QuantizeConfig,
    layout: Layout,
    inputs: BlockInputs,
    exact: BlockInputs,
    work: Path,
    progress: Callable[[str, int, int], None],
) -> DistillReport:
    """Distill all blocks of a folder, and replace their shards.

    Args:
        stack: with none of its blocks released.
        inputs: what enters block 0. exact: what leaves the float model's last block.
    Raises: CheckpointError for a damaged file.
    """
    total = len(stack)
    shards = [work / shard_name(index + 1, total + 1) for index in range(total)]
    if not is_distilled(work):
        blocks = [quantized_block(stack, i, layout, shard) for i, shard in enumerate(shards)]
        report = distill(
            blocks,
            [read_shard(shard.with_suffix(LATENTS)) for shard in shards],
            config,
            inputs,
            exact.hidden,
            stack.head(),
            work / _STATE_FILE,
            group_generator(config.seed, "distill"),
            progress,
        )
        for index, (shard, block) in enumerate(zip(shards, blocks, strict=True)):
            write_block(shard.with_suffix(_DISTILLED), index, block)
        write_json(work / _REPORT_FILE, report.to_dict())
    for shard in shards:
        if (new := shard.with_suffix(_DISTILLED)).exists():
            os.replace(new, shard)
    return _read_report(work / _REPORT_FILE)


def is_distilled(work: Path) -> bool:
    """Whether some of a folder's shards, or all, hold distilled codes."""
    return (work / _REPORT_FILE).exists()


def forget_distilled(work: Path, shards: list[Path]) -> None:
    """Let every block of a distilled folder be made again, since one of them has to be.

    It would not get the same bytes behind distilled blocks. The report goes last: as long as it is
    there, an interrupted job comes here again.
    """
    for shard in shards:
        shard.unlink(missing_ok=True)
    (work / _REPORT_FILE).unlink()


def _read_report(path: Path) -> DistillReport:
    values = read_json(path)
    try:
        return DistillReport(**values)
    except TypeError as error:
        raise CheckpointError(f"{path} is not the report of a distillation: {error}") from error
