"""The transform of a linear group's input: one for all of its linears, each of which stores it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from duqpp.errors import CheckpointError
from duqpp.models.family import Family, LinearGroup
from duqpp.placement import HOST

_KINDS = ("rotation", "pre_rotation", "permutation")


def verify_transforms(
    groups: Iterable[tuple[str, LinearGroup]], names: Iterable[str], read: Callable[[str], Tensor]
) -> None:
    """Check that the linears of each group have equal rotations and permutations.

    Their input is quantized once, by the transform of any of them.

    Args:
        groups: each with the name of its decoder block.
        names: of all tensors. read: one of them.
    Raises: CheckpointError naming two tensors that differ.
    """
    present = set(names)
    for block, group in groups:
        if not group.shares_input:
            continue
        for kind in _KINDS:
            first, *others = (f"{block}.{linear}.{kind}" for linear in group.linears)
            if first not in present:
                continue
            expected = read(first)
            for other in others:
                if other in present and not torch.equal(read(other), expected):
                    raise CheckpointError(
                        f"{other} is not {first}, though both linears read one input: a linear "
                        "group has one rotation and one permutation"
                    )


def groups_of(family: Family, skip: tuple[str, ...]) -> Iterator[tuple[str, LinearGroup]]:
    """Every quantized group of a model, with the name of its decoder block."""
    for index in range(family.config.num_hidden_layers):
        for group in family.quantized_groups(index, skip):
            yield family.block_name(index), group


def verify_transforms_of(files: Iterable[Path], family: Family, skip: tuple[str, ...]) -> None:
    """`verify_transforms` for the shards of a checkpoint, which are verified already.

    Args: skip: `modules_to_not_convert`.
    """
    with _reader(files) as (names, read):
        verify_transforms(groups_of(family, skip), names, read)


@contextmanager
def _reader(files: Iterable[Path]) -> Iterator[tuple[set[str], Callable[[str], Tensor]]]:
    """The names of all tensors in shards, and what reads one of them."""
    # transformers calls this in a context where tensors are made on the meta device.
    with ExitStack() as stack:
        stack.enter_context(HOST)
        shards = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        holder = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118
        yield set(holder), lambda name: holder[name].get_tensor(name)
