"""A duqpp checkpoint one decoder block at a time, each tensor verified as it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.checkpoint.layout import Layout, expected_tensors, quantization_of, quantized_block
from duqpp.checkpoint.manifest import verify_manifest
from duqpp.checkpoint.shard import (
    Progress,
    checkpoint_contents,
    is_exact,
    read_json,
    shard_files,
    verify_values,
)
from duqpp.checkpoint.transforms import verify_transforms_of
from duqpp.errors import CheckpointError, refusing
from duqpp.models.family import family_of
from duqpp.models.hub import load_generation_config, load_pretrained
from duqpp.models.stack import DecoderStack
from duqpp.placement import ON_HOST, Placement


class CheckpointSource:
    """The tensors of a duqpp checkpoint, however its shards are cut, as a `Source`.

    layout: how they are quantized. files: the shards. Opening one checks its files against its
    manifest, and what the shards hold against what the model needs; values are checked when they
    are read.

    Raises: CheckpointError when the checkpoint is damaged, inconsistent, or not duqpp's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.layout = folder, layout_of(folder)
        verify_manifest(folder)
        self.files = shard_files(folder)
        self.config, self._expected = _described(folder, self.layout)
        self._contents = checkpoint_contents(self.files, self._expected)
        self.names = frozenset(self._contents)
        if self.config.dtype is None:  # as transformers has it
            dtypes = (stored.dtype for stored in self._contents.values())
            self.config.dtype = next(dtype for dtype in dtypes if dtype.is_floating_point)

    def verify(self, progress: Progress | None = None) -> None:
        """Read every tensor, to check its values, and the transforms of linear groups.

        Args: progress: called with ("verify", shards done, shards in all).
        Raises: CheckpointError.
        """
        verify_values(self._contents, progress)
        verify_transforms_of(self.files, family_of(self.config), self.layout.skip)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype that it has in the model. Raises: CheckpointError."""
        tensor = self._contents[name].read()
        return tensor if is_exact(name, self._expected[name]) else tensor.to(self.config.dtype)

    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        from transformers import AutoTokenizer

        return load_pretrained(AutoTokenizer, self.folder, "tokenizer")

    def generation_config(self) -> Any | None:
        """The model's transformers generation configuration, if it has one."""
        return load_generation_config(self.folder)


def layout_of(folder: Path) -> Layout:
    """What config.json says of a checkpoint. Raises: CheckpointError when it is not duqpp's."""
    values = quantization_of(read_json(folder / "config.json"))
    if not values:
        raise CheckpointError(f"{folder} is not quantized: no quantization_config")
    return Layout.from_dict(values)


def _described(folder: Path, layout: Layout) -> tuple[Any, dict[str, Tensor]]:
    """The model's transformers configuration, and its tensors on the meta device."""
    from transformers import AutoConfig

    with refusing(str(folder / "config.json"), CheckpointError):
        config = AutoConfig.from_pretrained(str(folder))
        del config.quantization_config
        return config, expected_tensors(config, layout)


class QuantizedStack(DecoderStack):
    """The decoder blocks of a duqpp checkpoint: quantized, verified as they are read.

    Raises: CheckpointError.
    """

    source: CheckpointSource

    def __init__(self, source: CheckpointSource, placement: Placement = ON_HOST) -> None:
        dtype = source.config.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{source.folder / 'config.json'}: the model's dtype is {dtype}")
        super().__init__(source, dtype, placement)

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` on the host, by their names in the model; see `block`."""
        prefix = f"{self.family.block_name(index)}."
        names = [name for name in self.source.names if name.startswith(prefix)]
        return {name: self.placement.staged(self.source.tensor(name)) for name in names}

    def block(self, index: int, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Block `index` with its values, ready to run. Raises: CheckpointError."""
        values = self.read(index) if weights is None else weights
        return quantized_block(self, index, self.source.layout, values)
