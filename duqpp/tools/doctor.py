"""doctor: what this machine has, and which backend and kernel runs each op."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from duqpp.errors import BackendUnavailableError
from duqpp.ops import kernels
from duqpp.ops.dispatch import BACKENDS, ENVIRONMENT_VARIABLE
from duqpp.ops.kernels import Machine
from duqpp.ops.native import library_info
from duqpp.version import __version__

SHAPE = (16, 4096, 4096)  # of LLaMA-3 8B's o, a few tokens


def doctor(
    shapes: Sequence[tuple[int, int, int]] = (SHAPE,), gpu: Machine | None = None
) -> dict[str, Any]:
    """JSON-ready facts.

    Args:
        shapes: (M, N, K) of products, for each of which a kernel is named.
        gpu: a GPU to speak of instead of this machine's devices.
    Returns: versions, python, platform, cpu, library (see `library_info`), threads, gpus,
        DUQPP_BACKEND, DUQPP_STREAMK, error (None, or that the first names no backend), and per op
        and device: the backend selected, or the error instead; of the others, why not; and for each
        shape the kernel, or None, and why.
    """
    import transformers

    return {
        "versions": {
            "duqpp": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "library": library_info(),
        "threads": torch.get_num_threads(),
        "gpus": [_gpu_name(index) for index in range(torch.cuda.device_count())],
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE),
        "DUQPP_STREAMK": os.environ.get("DUQPP_STREAMK"),
        "error": _unknown_backend(os.environ.get(ENVIRONMENT_VARIABLE)),
        "ops": [
            _op(op, machine, shapes)
            for machine in ([gpu] if gpu else kernels.machines_here())
            for op in kernels.OPS
        ],
    }


def _unknown_backend(name: str | None) -> str | None:
    names = ("auto", *(backend.name for backend in BACKENDS))
    if name is None or name in names:
        return None
    return f"{ENVIRONMENT_VARIABLE}={name!r} names no backend; there are {', '.join(names)}"


def _op(op: str, machine: Machine, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    backend = error = None
    try:
        backend = kernels.select(op, machine, os.environ.get(ENVIRONMENT_VARIABLE, "auto"))
    except BackendUnavailableError as unavailable:
        error = str(unavailable)
    return {
        "op": op,
        "device": machine.name,
        "selected": backend and backend.name,
        "error": error,
        "others": {b.name: kernels.why_not(b, op, machine) for b in BACKENDS if b != backend},
        "kernels": [
            {"M": m, "N": n, "K": k, **asdict(kernels.kernel(op, m, n, k, machine, backend))}
            for m, n, k in shapes
            if backend is not None
        ],
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty or vague there
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    gib = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {gib:.0f} GiB"
