"""The input that several linears read, quantized once for all of them."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from duqpp.format import MXFP4Tensor


class _Read(NamedTuple):
    """What a linear has quantized.

    version: of the source then, by which a change in place shows; None where torch counts none.
    """

    source: Tensor
    version: int | None
    backend: str
    quantized: MXFP4Tensor


class SharedInput:
    """Remembers, while the owner of a linear group runs, what the last of its linears quantized.

    Linears get tensors, and so do hooks, wrappers and adapters around them. One that reads the very
    tensor that another member has read takes that one's codes; any other tensor, such as one that
    a wrapper changed, is quantized for itself. Nothing outlives the owner's forward, and each
    thread has its own. When gradients are asked for, each linear quantizes for itself, with the
    same result, because integer codes carry no gradient.

    In inference mode torch does not count changes: there, what is between the linears must not
    change their input in place.
    """

    def __init__(self) -> None:
        self._reads: dict[int, _Read | None] = {}  # by thread, of owners that are running

    def __reduce__(self) -> tuple[type["SharedInput"], tuple[()]]:
        return SharedInput, ()  # copied or pickled with its linears, it remembers nothing

    def begin(self, *_: Any) -> None:
        """Hook of the owner: its forward begins."""
        self._reads[_thread()] = None

    def end(self, *_: Any) -> None:
        """Hook of the owner: its forward has ended, by an error perhaps."""
        self._reads.pop(_thread(), None)

    def read(
        self,
        source: Tensor,
        backend: str,
        quantize: Callable[[Tensor, str], MXFP4Tensor],
        x: Tensor,
    ) -> MXFP4Tensor | None:
        """``quantize(x, backend)``, or what it was when another linear read the source.

        Returns: None where nothing is shared: the owner does not run, or a gradient is asked for.
        """
        thread = _thread()
        if thread not in self._reads or (source.requires_grad and torch.is_grad_enabled()):
            return None
        last, version = self._reads[thread], _version(source)
        if (
            last is not None
            and last.source is source
            and last.version == version
            and last.backend == backend
        ):
            return last.quantized
        quantized = quantize(x, backend)
        self._reads[thread] = _Read(source, version, backend, quantized)
        return quantized


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _version(x: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class Reader(Protocol):
    """A linear that takes its input from a SharedInput."""

    shared_input: SharedInput | None


def share_input(owner: nn.Module, linears: Sequence[Reader]) -> None:
    """Quantize the input of a linear group once, whenever its owner runs.

    Args:
        owner: the module whose forward hands one tensor to each of `linears`.
        linears: members of one linear group: equal rotation and scale rule.
    """
    unshare_input(owner)
    shared = SharedInput()
    for linear in linears:
        linear.shared_input = shared
    owner.shared_input_hooks = (
        owner.register_forward_pre_hook(shared.begin),
        owner.register_forward_hook(shared.end, always_call=True),
    )


def unshare_input(owner: nn.Module) -> None:
    """Undo `share_input`, if it was called: the linears quantize for themselves."""
    for hook in vars(owner).pop("shared_input_hooks", ()):
        hook.remove()
