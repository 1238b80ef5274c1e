"""The decoder blocks of a job in its folder: which are finished, and what is kept of them."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from duqpp.checkpoint.layout import Layout, quantized_block
from duqpp.checkpoint.shard import (
    read_json,
    read_shard,
    shard_name,
    write_block,
    write_json,
    write_shard,
)
from duqpp.errors import CheckpointError
from duqpp.methods.base import Block, BlockResult
from duqpp.methods.reports import DistillReport, GroupReport, RefineReport
from duqpp.models.stack import DecoderStack

LATENTS = ".latents"  # suffix of what a block's codes were rounded from, beside its shard


@dataclass
class Results:
    """Reports of all blocks, in order, and how many blocks an earlier run had finished."""

    groups: list[GroupReport] = field(default_factory=list)
    refined: list[RefineReport] = field(default_factory=list)
    distilled: DistillReport | None = None
    resumed: int = 0

    def add(self, result: BlockResult) -> None:
        """Take in the reports of the next block."""
        self.groups += result.groups
        self.refined += [result.refined] if result.refined else []


class BlockFolder:
    """The shards of a job, one a decoder block, and beside each its report and its latents.

    A block's shard is written last: where it is, the others are too, or were removed.

    Args: blocks: how many there are. layout: of the shards. keeps_latents: until the whole model is
        trained.
    """

    def __init__(self, work: Path, blocks: int, layout: Layout, *, keeps_latents: bool) -> None:
        self.work, self.layout = work, layout
        self._blocks, self._keeps_latents = blocks, keeps_latents

    @property
    def shards(self) -> list[Path]:
        """One file a decoder block, there or not."""
        return [self.work / shard_name(n + 1, self._blocks + 1) for n in range(self._blocks)]

    def finished(self) -> list[bool]:
        """Of each block, whether it has its shard and what else is kept with it.

        If another of these files was damaged and then removed, the block is made again, with the
        same bytes.
        """
        suffixes = [".safetensors", ".json", *([LATENTS] if self._keeps_latents else [])]
        return [
            all(shard.with_suffix(suffix).exists() for suffix in suffixes) for shard in self.shards
        ]

    def has_finished_block(self) -> bool:
        """Whether there is a shard that an error must not take away."""
        return any(shard.exists() for shard in self.shards)

    def write_rest(self, stack: DecoderStack) -> None:
        """Write what is outside of the decoder blocks, if it is not there."""
        rest = self.work / shard_name(0, self._blocks + 1)
        if not rest.exists():
            write_shard(rest, stack.rest())

    def write(self, block: Block, result: BlockResult) -> None:
        """Write a quantized block and what is kept with it."""
        shard = self.shards[block.index]
        refined = [result.refined.to_dict()] if result.refined else []
        groups = [group.to_dict() for group in result.groups]
        write_json(shard.with_suffix(".json"), {"groups": groups, "refined": refined})
        if self._keeps_latents:
            write_shard(shard.with_suffix(LATENTS), result.latents)
        write_block(shard, block.name, block.module)

    def reports(self, index: int) -> BlockResult:
        """The reports of a finished block. Raises: CheckpointError."""
        path = self.shards[index].with_suffix(".json")
        values = read_json(path)
        try:
            groups = [GroupReport(**group) for group in values["groups"]]
            refined = [RefineReport(**report) for report in values["refined"]]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not the report of a block: {error!r}") from error
        return BlockResult(groups, refined[0] if refined else None)

    def quantized(self, stack: DecoderStack, index: int) -> Block:
        """A finished block, verified and ready to run. Raises: CheckpointError."""
        module = quantized_block(stack, index, self.layout, self.shards[index])
        return Block.of(module, index, self.layout.skip, stack.family)

    def latents(self, index: int) -> dict[str, Tensor]:
        """What a finished block's codes were rounded from, by linear. Raises: CheckpointError."""
        return read_shard(self.shards[index].with_suffix(LATENTS))
