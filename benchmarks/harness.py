"""Timing by alternation in one process, tables, and JSON that says where it was measured."""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duqpp.doctor import doctor

COLD_BYTES = 1 << 29  # copies that are used in turn, so that none is found in a cache
GRAPH_CALLS = 64  # in a CUDA graph: every copy is used


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: median and quartiles over its turns."""

    median: float
    q25: float
    q75: float


def timer(call: Callable[[], Any], device: str = "cpu") -> Callable[[], float]:
    """A function that makes the call and returns the seconds it took; it was made once before.

    On a GPU some calls are captured in a CUDA graph, which is timed by events: what is measured is
    their share of it, without the time that Python takes to launch them.
    """
    call()
    if device == "cpu":

        def seconds() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return seconds

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()

    def share_of_graph() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / GRAPH_CALLS

    return share_of_graph


def alternate(
    candidates: dict[str, Callable[[], Any]],
    *,
    seconds: float,
    turns: int = 5,
    device: str = "cpu",
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time candidates in turn, one call each, so that clocks and neighbours trouble all alike.

    Args:
        seconds: how long to go on. turns: at least so many, however long they take.
        device: on which the calls work; see `timer`.
    Returns: timings by name; and by name the median, over turns, of the first candidate's time
        over this one's time in the same turn: how many times as fast as the first it is.
    """
    timers = {name: timer(call, device) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    first = next(iter(candidates))
    while len(times[first]) < turns or time.perf_counter() < end:
        for name, measure in timers.items():
            times[name].append(measure())
    timings, ratios = {}, {}
    for name, values in times.items():
        q25, median, q75 = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, q25, q75)
        ratios[name] = statistics.median(
            one / other for one, other in zip(times[first], values, strict=True)
        )
    return timings, ratios


def in_turn(copies: Iterable[Any]) -> Callable[[], Any]:
    """A function that returns the copies one after another, for ever."""
    values, position = list(copies), -1

    def following() -> Any:
        nonlocal position
        position = (position + 1) % len(values)
        return values[position]

    return following


def copies_for(size: int) -> int:
    """How many copies of `size` bytes fill COLD_BYTES; at least two, at most 64."""
    return max(2, min(64, COLD_BYTES // size))


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    options.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--seed", type=int, default=0)
    return options


def start(options: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.Generator]:
    """The options, and the generator of what is random; sets the number of threads."""
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen, torch.Generator().manual_seed(chosen.seed)


def add_shapes(options: argparse.ArgumentParser) -> None:
    """Options of a benchmark over activations [M, K]."""
    options.add_argument("--rows", type=int, nargs="+", default=(1, 16, 512, 2048), help="M")
    options.add_argument("--columns", type=int, nargs="+", default=(4096, 14336), help="K")


def environment() -> dict[str, Any]:
    """Device, versions and commit."""
    facts = doctor()
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": facts["cpu"],
        "library": facts["library"],
        "threads": torch.get_num_threads(),
        "gpus": facts["gpus"],
        "versions": facts["versions"],
        "platform": platform.platform(),
        "commit": commit or None,
    }


def report(rows: list[dict[str, Any]], options: argparse.Namespace, **facts: Any) -> None:
    """Print the rows as JSON, and write them to a file, where that was asked for."""
    result = {"rows": rows, **facts, "environment": environment()}
    text = json.dumps(result, indent=1)
    if options.json:
        print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


class Table:
    """Rows printed as they come, unless JSON was asked for."""

    def __init__(self, columns: dict[str, str], options: argparse.Namespace) -> None:
        self._columns, self._quiet = columns, options.json
        self.rows: list[dict[str, Any]] = []
        if not self._quiet:
            print(" ".join(f"{name:>{self._width(name)}}" for name in columns), flush=True)

    def _width(self, name: str) -> int:
        return max(len(name), 9)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not self._quiet:
            cells = []
            for name, form in self._columns.items():
                value = row.get(name)
                text = "-" if value is None else format(value, form)
                cells.append(f"{text:>{self._width(name)}}")
            print(" ".join(cells), flush=True)
