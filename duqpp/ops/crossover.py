"""From how many rows of x on `large_gemm` is faster than the kernels for few: a table of GPUs.

Say that the kernels for few rows multiply at some `small` FLOP/s, and that the other way multiplies
at `large`, after `start` seconds of launches, and after it has moved `moved` bytes a weight (4.25
bits read, then written and read again in the wider format) at `bandwidth`. Then with
``d = 2 / small - 2 / large`` they take equally long at

    M = moved / bandwidth / d + start / d / (N K) = rows + fixed * 2**24 / (N K).

crossover.json has `rows` and `fixed` by compute capability, and where they come from: a model, with
its small and large, moved and bandwidth, and a start of 6 us; or a measurement, to which
benchmarks/bench_gemm_routes.py fits them, and with --adopt writes them there.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
WEIGHTS = 1 << 24  # of the weight that `fixed` is about


@dataclass(frozen=True)
class Crossover:
    """Of one GPU. source: the model or the measurement, to be read after "by"."""

    rows: int
    fixed: int
    source: str

    def at(self, n: int, k: int) -> int:
        """Rows of x from which on a product by a weight [n, k] is one for `large_gemm`."""
        return self.rows + self.fixed * WEIGHTS // max(1, n * k)


@functools.cache
def table() -> dict[str, Crossover]:
    """By compute capability, as in "9.0"."""
    entries = json.loads(TABLE.read_text(encoding="utf-8"))
    return {capability: Crossover(**entry) for capability, entry in entries.items()}


def crossover(capability: tuple[int, int]) -> Crossover | None:
    """None for other architectures than 8.x and 9.0; 8.7, an embedded 8.6, is taken for it."""
    major, minor = (8, 6) if capability == (8, 7) else capability
    return table().get(f"{major}.{minor}")
