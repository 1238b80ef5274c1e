"""Telling a weight in the layout of a backend's GEMM from a row-major one of the same size."""

import weakref
from typing import Any

import torch
from torch import Tensor

from duqpp.format import MXFP4Tensor
from duqpp.ops.backend import DirectOps
from duqpp.ops.dispatch import select
from duqpp.placement import HOST

_MARKS = 16  # bytes that tell the layouts apart: random ones agree with chance 2**-128
_FIRST = 2**16  # bytes that are compared before all of them are


class Prepared:
    """What `MXFP4Linear.prepare` has made of a weight.

    Libraries put other tensors in the place of a module's: moved as they are (a model that is split
    over devices), or from its state dict, row-major (offloading, `torch.func.functional_call`).
    They are known by bytes in which the two layouts differ, read when a tensor is first seen.

    Args:
        backend: its name; device: the type of the device that it was chosen for.
        before, after: the weight, row-major and prepared.
        holder: the tensor of the module that has the codes of `after` from now on.
    """

    def __init__(
        self,
        backend: str,
        device: str,
        before: MXFP4Tensor,
        after: MXFP4Tensor,
        holder: Tensor,
    ) -> None:
        self.backend, self.device = backend, device
        places = _differences(before.codes, after.codes)
        self._marks_scales = not len(places)
        if self._marks_scales:
            places = _differences(before.scales, after.scales)
        marked = after.scales if self._marks_scales else after.codes
        self._places, self._marks = places.to(HOST).tolist(), _bytes_at(marked, places)
        self.remember(holder)

    def is_read_from(self, codes: Tensor, scales: Tensor) -> bool:
        """Whether the backend's GEMM can read a module's tensors as they are."""
        return self.device == codes.device.type and self.holds(codes, scales)

    def direct_ops(self, codes: Tensor, scales: Tensor) -> DirectOps | None:
        """The ops that may be called with a module's tensors as they are, if any."""
        if self._is_known(codes) or self.holds(codes, scales):
            return self._ops
        return None

    def holds(self, codes: Tensor, scales: Tensor) -> bool:
        """Whether a module's tensors are in the prepared layout; taken for granted in a graph."""
        if torch.compiler.is_compiling():
            return True
        if self._is_known(codes):
            return True
        marked = scales if self._marks_scales else codes
        is_stored = marked.dtype == torch.uint8 and not marked.is_meta
        if not is_stored or marked.numel() <= max(self._places, default=-1):
            return False
        places = torch.tensor(self._places, dtype=torch.long, device=marked.device)
        if _bytes_at(marked, places) != self._marks:
            return False
        self.remember(codes)
        return True

    def _is_known(self, codes: Tensor) -> bool:
        """Whether they are the tensor, and in the memory, that were seen last."""
        return self._address == codes.data_ptr() and self._known() is codes

    def remember(self, codes: Tensor) -> None:
        """Know a tensor of the module, in this memory, to be in the prepared layout."""
        self._known, self._address, self._ops = weakref.ref(codes), codes.data_ptr(), None
        if codes.device.type == self.device:
            backend, (rows, half) = select("mxfp4_gemm", codes.device, self.backend), codes.shape
            self._ops = backend.direct_ops(rows, 2 * half, codes.device)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": _nothing, "_address": 0, "_ops": None}


def _nothing() -> None:
    return None


def _differences(one: Tensor, other: Tensor) -> Tensor:
    """A few places at which two layouts of some bytes differ: int64 [n]."""
    one, other = one.reshape(-1), other.reshape(-1)
    size = min(len(one), len(other))
    for end in (min(size, _FIRST), size):
        places = (one[:end] != other[:end]).nonzero().flatten()
        if len(places):
            break
    return places[:_MARKS]


def _bytes_at(tensor: Tensor, places: Tensor) -> list[int]:
    values: list[int] = tensor.reshape(-1)[places].to(HOST).tolist()
    return values
