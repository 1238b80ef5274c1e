"""Distillation of a checkpoint that `quantize_model` is about to finish, in its working folder."""

import os
from collections.abc import Callable
from pathlib import Path

from duqpp.config import QuantizeConfig
from duqpp.models.checkpoint import read_json, read_shard, shard_name, write_block, write_json
from duqpp.models.layout import Layout, quantized_block
from duqpp.models.llama import BlockInputs, DecoderStack
from duqpp.quantize_group import group_generator
from duqpp.refine.distill import DistillReport, distill

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
    if not (work / _REPORT_FILE).exists():
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
    return DistillReport(**read_json(work / _REPORT_FILE))
