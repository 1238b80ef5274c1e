"""What `duqpp quantize --plan` takes and prints."""

import math
import re
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from duqpp.cli.tables import console, size
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.job.plan import GPUS, JobPlan, Machine, plan_job, shaped, this_cpu
from duqpp.models.source import read_config
from duqpp.placement.devices import gpu_count
from duqpp.placement.ranks import started_ranks

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?) ?([kmgt]?i?)b?", re.IGNORECASE)
_DISK_RATE = "1GB"


def bytes_of(text: str, name: str) -> float:
    """Bytes in "80GB", "80 GiB" or "8e10". Raises: InputError, naming the argument."""
    found = _SIZE.fullmatch(text.strip())
    scale = found and (_UNITS | _BINARY).get(found[2].lower())
    value = float(found[1]) * scale if found and scale else 0.0
    if not 0 < value < 1e18:
        raise InputError(f"`{name}` must be a size such as 80GB or 80GiB, got {text!r}")
    return value


def make_plan(
    model: str,
    config: QuantizeConfig,
    *,
    on: str | None = None,
    device_memory: str | None = None,
    ranks: int | None = None,
    flops: float | None = None,
    disk_bandwidth: str | None = None,
) -> JobPlan:
    """The plan of a job.

    Args:
        on: what it computes on: cpu, or a name of `GPUS`; None for the GPU that is here, an H100
            where `device_memory` asks for one, else this machine's CPU.
        device_memory: in the place of that device's; disk_bandwidth: a second; as in `bytes_of`.
        ranks: processes; None for those that torchrun has started, or one.
        flops: operations a second in every dtype, in the place of the device's.
    Raises: InputError.
    """
    memory = None if device_memory is None else bytes_of(device_memory, "device_memory")
    disk_rate = bytes_of(disk_bandwidth or _DISK_RATE, "disk_bandwidth")
    if flops is not None and not 0 < flops < math.inf:
        raise InputError(f"`flops` must be a number of operations a second, got {flops:g}")
    planned = shaped(read_config(model), config)
    machine = _machine(on, planned.dtype, wants_gpu=memory is not None)
    return plan_job(
        planned,
        config,
        machine=machine if flops is None else machine.at(flops),
        device_memory=memory,
        ranks=started_ranks() if ranks is None else ranks,
        disk_rate=disk_rate,
    )


def _machine(on: str | None, dtype: torch.dtype, *, wants_gpu: bool) -> Machine:
    if on is None and gpu_count():
        name = torch.cuda.get_device_name()
        on = next((known for known in GPUS if known in name), None)
        if on is None:
            raise InputError(f"`on` must name what to plan for: the rates of {name} are not known")
    if on is None:
        on = "H100" if wants_gpu else "cpu"
    if on == "cpu":
        return this_cpu(dtype)
    if on not in GPUS:
        raise InputError(f"`on` must be one of cpu, {', '.join(GPUS)}, got {on!r}")
    return GPUS[on]


def print_plan(model: str, config: QuantizeConfig, plan: JobPlan) -> None:
    """For people, on stdout."""
    machine = plan.machine
    print(f"{model}: {plan.blocks} blocks, {plan.weights / 1e9:.3g} billion weights, {plan.dtype}")
    text = f"{plan.sequences} sequences, {plan.tokens} tokens" if plan.tokens else "no text"
    ranks = f", {plan.ranks} ranks" if plan.ranks > 1 else ""
    refine = "" if config.refine == "none" else f" --refine {config.refine}"
    print(f"method {config.method}{refine}, {text}{ranks}")
    print(f"on {machine.name}: {_rates(machine)} ({machine.source})")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage, of one block at a time")
    for head in ("device, GB", "host, GB", "TFLOP in all", "seconds in all"):
        table.add_column(head, justify="right")
    for stage in plan.stages:
        device = f"{stage.device / 1e9:.2f}" if machine.is_gpu else "-"
        operations, seconds = f"{stage.operations / 1e12:.1f}", f"{stage.seconds:.1f}"
        table.add_row(stage.name, device, f"{stage.host / 1e9:.2f}", operations, seconds)
    console(width=100).print(table)
    if not plan.fits and plan.memory is not None:
        print(f"It does not fit: {machine.name} has {plan.memory / 1e9:.1f} GB.")
    each = " on each rank" if plan.ranks > 1 else ""
    device = f"{size(int(plan.device))} on the device, " if machine.is_gpu else ""
    print(f"memory{each}: {device}{size(int(plan.host))} on the host")
    if plan.tokens:
        print(f"activations{each}: {size(int(plan.activations))}, resting on the {plan.rests}")
    print(
        f"disk: {size(int(plan.read))} read, {size(int(plan.written))} written, "
        f"{size(int(plan.disk))} needed beside the model"
    )
    parts = ", ".join(f"{name} {duration(value)}" for name, value in plan.seconds.items())
    print(f"time: {duration(plan.total_seconds)} ({parts})")
    print(
        "All of it is computed from shapes: sizes on disk are exact, memory was compared with what "
        "small models take on a CPU, and times are estimates that may be off by a factor."
    )


def _rates(machine: Machine) -> str:
    rates: dict[str, Any] = {
        "16-bit": machine.half,
        "float32": machine.single,
        "float64": machine.double,
    }
    products = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    memory = f"{machine.moved / 1e9:.0f} GB/s of memory"
    return f"products in TFLOP/s: {products}; {memory}"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    for unit, scale in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} s"
