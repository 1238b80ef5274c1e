"""Run the tests that depend on the kind of CPU as they would run on another one.

    python -m tests.elsewhere [N] [PYTEST_ARGUMENT ...]

N: which of `SETTINGS`; without it, they take turns by the day. torch, MKL and duqpp's kernels make
do with what an older CPU has, on another number of threads; files come in an order of the day.
"""

import os
import random
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Environment variables, and torch's threads.
SETTINGS: tuple[tuple[dict[str, str], int], ...] = (
    ({"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, 1),
    ({"ATEN_CPU_CAPABILITY": "avx2", "DUQPP_CPU_ISA": "portable"}, 2),
    ({"ATEN_CPU_CAPABILITY": "default", "DUQPP_CPU_ISA": "avx2"}, 2),
)
PLACES = (
    "calibration",
    "format",
    "integrations/test_running.py",
    "job/test_golden.py",
    "methods",
    "nn",
    "ops",
    "rotation",
)


class Threads:
    """A plugin: so many threads for torch, after the tests' own setting."""

    def __init__(self, count: int) -> None:
        self.count = count

    def pytest_sessionstart(self) -> None:
        import torch

        torch.set_num_threads(self.count)


def files(seed: int) -> list[str]:
    """The test files in an order that the seed gives."""
    places = [ROOT / "tests" / place for place in PLACES]
    found = [f for p in places for f in (sorted(p.rglob("test_*.py")) if p.is_dir() else [p])]
    random.Random(seed).shuffle(found)
    return [str(file.relative_to(ROOT)) for file in found]


def main(arguments: list[str]) -> int:
    day = int(time.time()) // 86400
    number = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else day
    environment, threads = SETTINGS[number % len(SETTINGS)]
    os.environ.update(environment)  # before torch is imported
    shown = " ".join(f"{name}={value}" for name, value in environment.items())
    print(f"{shown}, {threads} threads, files in the order of day {day}", flush=True)
    return pytest.main([*files(day), *arguments], plugins=[Threads(threads)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
