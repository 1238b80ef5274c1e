"""The decoder blocks of a job in its folder: which are finished, and what is kept of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from duqpp.checkpoint.layout import Layout, quantized_block
from duqpp.checkpoint.shard import block_tensors, read_shard, shard_name, write_shard
from duqpp.job.records import allow_file, check_files, read_record, write_record
from duqpp.methods.base import Block, BlockResult
from duqpp.methods.reports import DistillReport, GroupReport, RefineReport
from duqpp.models.family import LinearGroup
from duqpp.models.stack import DecoderStack
from duqpp.placement import HOST
from duqpp.placement.stages import stage

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

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of them, as JSON values."""
        values: dict[str, Any] = {"groups": [group.to_dict() for group in self.groups]}
        if self.distilled:
            values["distilled"] = self.distilled.to_dict()
        if self.refined:
            values["refined"] = [block.to_dict() for block in self.refined]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], resumed: int) -> "Results":
        """The inverse of `to_dict`."""
        distilled = values.get("distilled")
        return cls(
            [GroupReport(**group) for group in values["groups"]],
            [RefineReport(**report) for report in values.get("refined", [])],
            DistillReport(**distilled) if distilled else None,
            resumed,
        )


@dataclass(frozen=True)
class KeptBlock:
    """What is kept of block `index`: the tensors of its shard and its latents, on the host, and its
    reports as JSON values."""

    index: int
    tensors: dict[str, Tensor]
    latents: dict[str, Tensor]
    reports: dict[str, Any]


class BlockFolder:
    """The shards of a job, one a decoder block, and beside each its record and its latents.

    A record has the block's reports, and tells whether the files are those that the job wrote. It
    is written last: where it is, the others are too, or were removed.

    Args: blocks: how many there are. layout: of the shards. job: digest of the job's description.
        keeps_latents: until the whole model is trained.
    """

    def __init__(
        self, work: Path, blocks: int, layout: Layout, job: str, *, keeps_latents: bool
    ) -> None:
        self.work, self.layout, self.job = work, layout, job
        self._blocks, self._keeps_latents = blocks, keeps_latents

    @property
    def shards(self) -> list[Path]:
        """One file a decoder block, there or not."""
        return [self.work / shard_name(n + 1, self._blocks + 1) for n in range(self._blocks)]

    @property
    def training_record(self) -> Path:
        """The record of the whole model's training; once it is there, the new shards are whole."""
        return self.work / "model-distilled.json"

    @property
    def leftovers(self) -> list[Path]:
        """The files that only serve to resume the job."""
        patterns = ("model-*.json", "*" + LATENTS, "*.partial")
        return [file for pattern in patterns for file in sorted(self.work.glob(pattern))]

    def finished(self) -> list[bool]:
        """Of each block, whether it has its shard and what else is kept with it.

        If one of these files was damaged and then removed, the block is made again, with the same
        bytes.
        """
        suffixes = [".safetensors", ".json", *([LATENTS] if self._keeps_latents else [])]
        return [
            all(shard.with_suffix(suffix).exists() for suffix in suffixes) for shard in self.shards
        ]

    def bytes_needed(self, stack: DecoderStack) -> int:
        """Bytes of the tensors that are still to be written; the files have headers besides."""
        size = 0
        if not self._rest.exists():
            size += sum(tensor.nbytes for tensor in stack.rest().values())
        for index, is_finished in enumerate(self.finished()):
            size += 0 if is_finished else self._block_bytes(stack, index)
        return size

    def _block_bytes(self, stack: DecoderStack, index: int) -> int:
        groups = stack.family.quantized_groups(index, self.layout.skip)
        shard, latents = block_bytes(stack.skeleton(index), groups, self.layout)
        return shard + (latents if self._keeps_latents else 0)

    @property
    def _rest(self) -> Path:
        """The shard of what is outside of the decoder blocks."""
        return self.work / shard_name(0, self._blocks + 1)

    @stage("writing")
    def write_rest(self, stack: DecoderStack) -> None:
        """Write what is outside of the decoder blocks, if it is not there.

        Raises: CheckpointError for a file that is not this job's.
        """
        record = self._rest.with_suffix(".json")
        if self._rest.exists() and record.exists():
            self._check(self._rest)
            return
        write_shard(self._rest, stack.rest())
        write_record(record, self.job, {}, {self._rest.name: self._rest})

    def kept(self, block: Block, result: BlockResult) -> KeptBlock:
        """What is kept of a quantized block, which `write` may write in another thread."""
        refined = [result.refined.to_dict()] if result.refined else []
        values = {"groups": [group.to_dict() for group in result.groups], "refined": refined}
        latents = result.latents if self._keeps_latents else {}
        return KeptBlock(
            block.index,
            _on_host(block_tensors(block.name, block.module)),
            _on_host(latents),
            values,
        )

    @stage("writing")
    def write(self, kept: KeptBlock) -> None:
        """Write a quantized block and what is kept with it."""
        shard = self.shards[kept.index]
        files = [shard]
        if self._keeps_latents:
            files.append(shard.with_suffix(LATENTS))
            write_shard(files[-1], kept.latents)
        write_shard(shard, kept.tensors)
        write_record(shard.with_suffix(".json"), self.job, kept.reports, {f.name: f for f in files})

    def reports(self, index: int) -> BlockResult:
        """The reports of a finished block. Raises: CheckpointError, for another job's files too."""
        values = self._check(self.shards[index])
        groups = [GroupReport(**group) for group in values["groups"]]
        refined = [RefineReport(**report) for report in values["refined"]]
        return BlockResult(groups, refined[0] if refined else None)

    def allow(self, shard: Path, trained: Path) -> None:
        """Let the record of a shard speak of what the training makes of it, too."""
        allow_file(shard.with_suffix(".json"), self.job, shard.name, trained)

    def _check(self, shard: Path) -> dict[str, Any]:
        """The record of a shard, if both are this job's. Raises: CheckpointError."""
        path = shard.with_suffix(".json")
        record = read_record(path, self.job)
        check_files(path, record)
        return record

    @stage("reading")
    def quantized(self, stack: DecoderStack, index: int) -> Block:
        """A finished block, verified and ready to run. Raises: CheckpointError."""
        module = quantized_block(stack, index, self.layout, read_shard(self.shards[index]))
        return Block.of(module, index, self.layout.skip, stack.family)

    def latents(self, index: int) -> dict[str, Tensor]:
        """What a finished block's codes were rounded from, by linear. Raises: CheckpointError."""
        return read_shard(self.shards[index].with_suffix(LATENTS))


def block_bytes(block: nn.Module, groups: Sequence[LinearGroup], layout: Layout) -> tuple[int, int]:
    """What a float block on the meta device becomes on disk: bytes of its shard, of its latents."""
    shard, latents = _bytes(block), 0
    for group in groups:
        for name in group.linears:
            linear = block.get_submodule(name)
            shard += _bytes(layout.empty_linear(linear)) - _bytes(linear)
            latents += 4 * linear.weight.numel()
    return shard, latents


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to(HOST) for name, tensor in tensors.items()}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
