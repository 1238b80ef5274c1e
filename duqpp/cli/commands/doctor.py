"""The command `duqpp doctor`."""

import sys
from typing import Annotated, Any

import typer

from duqpp.cli.options import JsonOption
from duqpp.cli.tables import print_json
from duqpp.errors import InputError


def doctor(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="M,N,K", help="Kernels for x [M, K], weight [N, K]; repeatable."),
    ] = None,
    arch: Annotated[
        int | None, typer.Option(help="A GPU to ask about: 10 x its compute capability, as 100.")
    ] = None,
    sm_count: Annotated[int, typer.Option(help="With --arch: its SMs; 148 on a B200.")] = 148,
    as_json: JsonOption = False,
) -> None:
    """Which backend and kernel runs each op here, and why not the others.

    Exits with 1 when DUQPP_BACKEND names no backend.
    """
    from duqpp.ops.kernels import Machine
    from duqpp.tools.doctor import SHAPE, doctor

    shapes = [_shape(text) for text in shape] if shape else [SHAPE]
    facts = doctor(shapes, Machine(divmod(arch, 10), sm_count) if arch else None)
    if as_json:
        print_json(facts)
    else:
        print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
        print(f"platform: {facts['platform']}")
        print(f"cpu: {facts['cpu']}, {facts['threads']} threads")
        print(f"library: {_library(facts['library'])}")
        print(f"gpu: {'; '.join(facts['gpus']) or 'none that torch can use'}")
        for name in ("DUQPP_BACKEND", "DUQPP_STREAMK"):
            print(f"{name}: {facts[name] or 'not set'}")
        print(*doctor_lines(facts), *others_lines(facts), sep="\n")
    if facts["error"] is not None:
        print(f"error: {facts['error']}", file=sys.stderr)
        raise typer.Exit(1)


def _shape(text: str) -> tuple[int, int, int]:
    """ "16,4096,4096" as three positive integers."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise InputError(f"--shape must be M,N,K, as in 16,4096,4096, got {text!r}")
    m, n, k = map(int, parts)
    return m, n, k


def _library(facts: dict[str, Any]) -> str:
    """The compiled library in a line."""
    if "error" in facts:
        return str(facts["error"])
    cuda = facts["cuda_architectures"] or "none"
    return f"CPU kernels for {facts['cpu_isa']}, CUDA kernels for {cuda}"


def doctor_lines(facts: dict[str, Any]) -> list[str]:
    """Per op and device, which backend runs it; for each shape, which kernel, and why that one."""
    lines = []
    for entry in facts["ops"]:
        chosen = entry["selected"] or f"none: {entry['error']}"
        lines.append(f"{entry['op']} on {entry['device']}: {chosen}")
        for kernel in entry["kernels"]:
            shape = "{M},{N},{K}".format(**kernel)
            lines.append(f"  {shape}: {kernel['name'] or 'none'} ({kernel['why']})")
    return lines


def others_lines(facts: dict[str, Any]) -> list[str]:
    """Why each of the other backends is not taken; once, where all ops have one answer."""
    answers: dict[tuple[str, str, str], list[str]] = {}
    for entry in facts["ops"]:
        for name, reason in entry["others"].items():
            answers.setdefault((name, entry["device"], reason), []).append(entry["op"])
    ops = {entry["op"] for entry in facts["ops"]}
    return [
        f"not {name} for {'any op' if set(of) == ops else ', '.join(of)} on {device}: {reason}"
        for (name, device, reason), of in answers.items()
    ]
