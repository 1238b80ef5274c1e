"""The input that several linears read, quantized once for all of them."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from duqpp.format import MXFP4Tensor
from duqpp.nn.joined import Joined, Member, join


class _Read(NamedTuple):
    """What a linear has quantized, or multiplied for all of them.

    version: of the source then, by which a change in place shows; None where torch counts none.
    by: the backend, or what the weights are joined in. made: codes and scales, or the products by
        the first rows of their weights, each until its linear has taken it.
    """

    source: Tensor
    version: int | None
    by: str | Joined
    made: Any

    def is_of(self, source: Tensor, version: int | None, by: str | Joined) -> bool:
        return self.source is source and self.version == version and self.by == by


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

    def __init__(self, linears: Sequence[Member] = ()) -> None:
        self._reads: dict[int, _Read | None] = {}  # by thread, of owners that are running
        self._linears = [weakref.ref(linear) for linear in linears]
        self.joined: Joined | None = None

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
        if last is not None and last.is_of(source, version, backend):
            made: MXFP4Tensor = last.made
            return made
        quantized = quantize(x, backend)
        self._reads[thread] = _Read(source, version, backend, quantized)
        return quantized

    def product(
        self, source: Tensor, joined: Joined, first: int, multiply: Callable[[], Tensor]
    ) -> Tensor | None:
        """Of ``multiply()``, the product of the source by joined weights, the part from `first` on.

        Each linear gets its own once: nobody sees what another one's reader changes in place.

        Returns: None where the owner does not run.
        """
        thread = threading.get_ident()
        if thread not in self._reads:
            return None
        last, version = self._reads[thread], _version(source)
        if last is None or not last.is_of(source, version, joined) or first not in last.made:
            last = _Read(source, version, joined, joined.split(multiply()))
            self._reads[thread] = last
        y: Tensor = last.made.pop(first)
        if not last.made:
            self._reads[thread] = None
        return y

    def join(self) -> None:
        """Join the weights of the linears, if all can be."""
        linears = [linear for known in self._linears if (linear := known()) is not None]
        self.joined = join(linears)

    def separate(self) -> None:
        """Multiply by each weight on its own: one of them is replaced."""
        self.joined = None


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _version(x: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class Reader(Member, Protocol):
    """A linear that takes its input from a SharedInput."""

    shared_input: SharedInput | None


def share_input(owner: nn.Module, linears: Sequence[Reader]) -> None:
    """Quantize the input of a linear group once, whenever its owner runs.

    Args:
        owner: the module whose forward hands one tensor to each of `linears`.
        linears: members of one linear group: equal rotation and scale rule.
    """
    unshare_input(owner)
    shared = SharedInput(linears)
    for linear in linears:
        linear.shared_input = shared
    shared.join()
    owner.shared_input_hooks = (
        owner.register_forward_pre_hook(shared.begin),
        owner.register_forward_hook(shared.end, always_call=True),
    )


def unshare_input(owner: nn.Module) -> None:
    """Undo `share_input`, if it was called: the linears quantize for themselves."""
    for hook in vars(owner).pop("shared_input_hooks", ()):
        hook.remove()
