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

COLD_BYTES = 1 << 29  # weights that are used in turn, so that none is found in a cache


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: median and quartiles over its turns."""

    median: float
    q25: float
    q75: float


def alternate(
    candidates: dict[str, Callable[[], Any]], *, seconds: float, turns: int = 5
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Time candidates in turn, one call each, so that clocks and neighbours trouble all alike.

    Args:
        seconds: how long to go on. turns: at least so many, however long they take.
    Returns: timings by name; and by name the median, over turns, of the first candidate's time
        over this one's time in the same turn: how many times as fast as the first it is.
    """
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    first = next(iter(candidates))
    while len(times[first]) < turns or time.perf_counter() < end:
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
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
