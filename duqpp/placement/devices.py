"""Which device a job computes on: the one that is asked for, or the best that is here."""

import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from duqpp.errors import InputError, first_line
from duqpp.ops.dispatch import ENVIRONMENT_VARIABLE
from duqpp.ops.native import CpuBackend
from duqpp.placement import HOST, Placement

AUTO = "auto"  # as None: see `choose_device`
_USABLE = 0.95  # of a GPU's memory: what is between tensors is lost
_OLDEST = (8, 0)  # compute capability from which GPUs have bfloat16, and duqpp has kernels

logger = logging.getLogger(__name__)


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device that is asked for, once it is known to be here.

    Args: device: "cpu", "cuda" or "cuda:N"; None or "auto" for the GPU where torch sees one, unless
        DUQPP_BACKEND asks for the kernels of the CPU.
    Raises: InputError for what names no device, none that is here, or one that is too old.
    """
    if device is None or device == AUTO:
        return _best_device()
    chosen = _parsed(str(device))
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise InputError(f"`device` must be auto, cpu, cuda or cuda:N, got {str(device)!r}")
    if chosen.type == "cuda" and (reason := _why_not(chosen)):
        raise InputError(f"`device` {device}: {reason}; `device=cpu` runs anywhere")
    return chosen


def kind_of(device: torch.device) -> str:
    """What a device is: on two of one kind, an operation gives the same bits."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _parsed(name: str) -> torch.device | None:
    """What torch takes a name for, if it has such a device: it makes cuda:65512 of cuda:1000."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return None
    return device if str(device) == name else None


def _best_device() -> torch.device:
    gpu = torch.device("cuda")
    if gpu_count() == 0 or os.environ.get(ENVIRONMENT_VARIABLE) == CpuBackend.name:
        return HOST
    if reason := _why_not(gpu):
        logger.warning("duqpp computes on the CPU, not on %s: %s", gpu, reason)
        return HOST
    return gpu


def rest_for(placement: Placement, needed: Callable[[], float]) -> Placement:
    """A placement whose activations rest where blocks compute, if there is room, else on the host.

    Args: needed: how many bytes of a GPU everything takes at its peak, these activations included;
        it is asked for a GPU alone.
    """
    compute = storage = placement.compute
    free = free_memory(compute)
    if free is not None:
        storage = compute if has_room(needed(), free) else HOST
        logger.info("%s has %.1f GB free: activations rest on %s", compute, free / 1e9, storage)
    return replace(placement, storage=storage)


def has_room(size: float, memory: float) -> bool:
    """Whether tensors of so many bytes have room in so many of a GPU's."""
    return size <= _USABLE * memory


@contextmanager
def fitting(
    what: str, device: torch.device, advice: str = "`device=cpu` needs no GPU"
) -> Iterator[None]:
    """Raise InputError, and not torch's error, where `what` does not fit into a GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{what} does not fit into the memory of {device}: {first_line(error)} ({advice})"
        ) from error


def gpu_count() -> int:
    """How many GPUs torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free on a GPU; None for the CPU, whose memory is that of the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _why_not(gpu: torch.device) -> str | None:
    """Why duqpp cannot compute on a GPU, in a few words; None when it can."""
    count = gpu_count()
    if count == 0:
        return f"torch {torch.__version__} sees no CUDA device here"
    if (gpu.index or 0) >= count:
        return f"the last CUDA device here is cuda:{count - 1}"
    capability = torch.cuda.get_device_capability(gpu)
    if capability < _OLDEST:
        found, oldest = (".".join(map(str, pair)) for pair in (capability, _OLDEST))
        return (
            f"{torch.cuda.get_device_name(gpu)} has compute capability {found}, and bfloat16 and "
            f"the kernels of duqpp need {oldest}"
        )
    return None
