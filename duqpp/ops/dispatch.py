"""Backends: what each can run here, and which one runs an op on a device."""

import functools
import logging
import os
from collections.abc import Callable

import torch

from duqpp.errors import BackendUnavailableError
from duqpp.ops.backend import OPS, Backend
from duqpp.ops.native import CUDA_BACKENDS, CpuBackend
from duqpp.ops.reference import ReferenceBackend

ENVIRONMENT_VARIABLE = "DUQPP_BACKEND"

logger = logging.getLogger(__name__)


# Best first: `select` takes the first that can run.
BACKENDS: tuple[Backend, ...] = (*CUDA_BACKENDS, CpuBackend(), ReferenceBackend())


def select(op: str, device: torch.device, backend: str = "auto") -> Backend:
    """The backend that runs an op on a device.

    Args:
        op: name of a public op.
        backend: a backend's name, or "auto": what DUQPP_BACKEND names, else the best that can run
            all ops there. A warning is logged, once for a device, where that is the reference.
    Raises: BackendUnavailableError naming the reason and what is available instead.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    return _select(op, device.type, device.index, backend)


@functools.cache
def _select(op: str, device_type: str, device_index: int | None, backend: str) -> Backend:
    # Index 0 is a device of its own; None is whichever is current.
    device = torch.device(device_type if device_index is None else f"{device_type}:{device_index}")
    chosen = choose(op, device_type, lambda b, o: b.unavailable_reason(o, device), backend)
    if backend == "auto" and chosen.name == ReferenceBackend.name:
        warn_of_reference(device)
    return chosen


@functools.cache
def warn_of_reference(device: torch.device) -> None:
    """Log, once for a device, that no kernel of duqpp's runs there, and why none of those meant."""
    reasons = {
        b.name: reason
        for b in BACKENDS
        if b.name.startswith(device.type)
        for op in OPS
        if (reason := b.unavailable_reason(op, device))
    }
    why = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items())
    logger.warning(
        "duqpp runs on %s by its reference, which is slow (%s). `duqpp doctor` says more; "
        "%s=reference asks for it without this warning.",
        device,
        why or f"there are no kernels for {device.type}",
        ENVIRONMENT_VARIABLE,
    )


def choose(
    op: str, where: str, unavailable: Callable[[Backend, str], str | None], backend: str
) -> Backend:
    """The rule by which `select` chooses.

    Args:
        where: the device in a word, for messages.
        unavailable: of a backend and an op, why it cannot run there; None when it can.
        op, backend: as of `select`, the environment aside.
    """
    runnable = {b.name: b for b in BACKENDS if unavailable(b, op) is None}
    if backend == "auto" and runnable:
        # One backend for both ops: what one writes is in the layout that its own GEMM reads.
        for candidate in runnable.values():
            if all(unavailable(candidate, other) is None for other in OPS):
                return candidate
    if backend in runnable:
        return runnable[backend]
    reasons = {b.name: unavailable(b, op) for b in BACKENDS}
    raise BackendUnavailableError(
        f"backend '{backend}' cannot run {op} on {where} here: "
        f"{reasons.get(backend, 'no such backend')}; available: {', '.join(runnable) or 'none'} "
        f"({ENVIRONMENT_VARIABLE}=...)"
    )


def select_shapes(op: str, device: torch.device, backend: str = "auto") -> Backend:
    """`select` for results without values: on the meta device, too, where nothing can run."""
    if device.type != "meta":
        return select(op, device, backend)
    return next((b for b in BACKENDS if b.name == backend), BACKENDS[-1])


def available(op: str, device: torch.device) -> list[str]:
    """Names of the backends that can run an op on a device, best first."""
    return [b.name for b in BACKENDS if b.unavailable_reason(op, device) is None]
