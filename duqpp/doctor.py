"""doctor: what this machine has, and which backend runs each op here."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

import duqpp
from duqpp.errors import BackendUnavailableError
from duqpp.ops.dispatch import ENVIRONMENT_VARIABLE, capability_table, select
from duqpp.ops.native import compiled_library, library_info


def doctor() -> dict[str, Any]:
    """JSON-ready facts.

    Returns: versions, python, platform, cpu, library (see `library_info`), threads, gpus,
        DUQPP_BACKEND, and per op and device: the backend selected, or the error instead, and what
        each backend says ("yes", or why not).
    """
    import transformers

    return {
        "versions": {
            "duqpp": duqpp.__version__,
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
        "ops": _ops(),
    }


def gemm_kernel(m: int, n: int, k: int, *, arch: int, sm_count: int) -> dict[str, Any]:
    """The mxfp4_gemm kernel that a Blackwell GPU would run for [m, k] by [n, k].

    Args:
        arch: ten times the compute capability: 100, 103, 120 or 121. sm_count: of the device.
    Returns: JSON-ready: kernel, its tile, splits of K, workspace_bytes, and whether this build
        holds it; {"error": why} where there is none.
    """
    if n % 8 or k % 32:
        return {"error": f"N must be a multiple of 8 and K of 32, got N = {n}, K = {k}"}
    library = compiled_library()
    if library is None:
        return {"error": library_info()["error"]}
    plan = library.select_gemm(m, n, k, arch=arch, sm_count=sm_count)
    if plan is None:
        return {"error": f"compute capability {arch / 10} has no block-scaled GEMM"}
    tile = next(row["tile"] for row in library.gemm_kernels() if row["name"] == plan.kernel)
    has = getattr(library, "has_mxfp4_gemm_kernel", None)
    return {
        "kernel": plan.kernel,
        "tile": list(tile),
        "splits": plan.splits,
        "workspace_bytes": library.gemm_workspace_size(plan, m, n),
        "in_this_build": has is not None and has(plan),
    }


def _ops() -> list[dict[str, Any]]:
    table = capability_table()
    ops = []
    for cell in [name for name in table[0] if name != "backend"]:  # "rotate_quantize on cpu"
        op, _, device = cell.partition(" on ")
        selected = error = None
        try:
            selected = select(op, torch.device(device)).name
        except BackendUnavailableError as unavailable:
            error = str(unavailable)
        backends = {row["backend"]: row[cell] for row in table}
        ops.append(
            {"op": op, "device": device, "selected": selected, "error": error, "backends": backends}
        )
    return ops


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
