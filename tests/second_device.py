"""A second device on any machine, to show that code moves what it must and implies no device.

Inside of ``with second_device():`` a tensor made on `DEVICE`, or moved there, says that it is on
``cpu:1``. Its values are held by a tensor of the CPU, so that results are those of the CPU, bit by
bit. An operation on it and a tensor of the plain CPU is an error, as it would be on a GPU.

``cpu:1`` rather than ``cuda:0``, because autograd asks the device's guard, and that of the CPU is
there without a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cpu", 1)
MOVES = ("aten::copy_", "aten::_to_copy", "aten::to")  # may have tensors of both devices


@contextmanager
def second_device() -> Iterator[torch.device]:
    """While it is open, factories and moves make tensors of `DEVICE` where it is asked for."""
    with _Mode():
        yield DEVICE


class _OnDevice(torch.Tensor):
    """A tensor of the second device; `held` has its values, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "_OnDevice") -> None:
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def __repr__(self) -> str:
        return f"second_device({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values that tensors hold, and put results where they belong."""
    name = function._schema.name
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    on_device = any(isinstance(t, _OnDevice) for t in tensors)
    # Indices may be on the CPU, and so may a scalar in a tensor: torch allows both on a GPU.
    if on_device and name not in MOVES and not name.startswith("aten::index"):
        for t in tensors:
            if not isinstance(t, _OnDevice) and t.dim() > 0:
                raise RuntimeError(f"{name}: tensors on {DEVICE} and cpu met: {tuple(t.shape)}")
    asked = kwargs.get("device")
    held = tree_map(lambda v: v.held if isinstance(v, _OnDevice) else v, (args, kwargs))
    plain_args, plain_kwargs = held
    if asked is not None:
        plain_kwargs = plain_kwargs | {"device": torch.device("cpu")}
    out = function(*plain_args, **plain_kwargs)
    if function._schema.is_mutable and not isinstance(out, tuple | list):
        for argument, declared in zip(args, function._schema.arguments, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                return argument
    goal = on_device if asked is None else torch.device(asked) == DEVICE
    return tree_map(_wrapped, out) if goal else out


def _wrapped(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, _OnDevice)
    return _OnDevice(value) if plain else value
