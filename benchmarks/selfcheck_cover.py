"""Which kernels of mxfp4_gemm `duqpp selfcheck` runs on a GPU, and how far into each.

    python benchmarks/selfcheck_cover.py        # benchmarks/results/selfcheck_cover.json

No GPU is needed: the library's own table says which kernel multiplies a shape.
"""

import argparse
from typing import Any

from figures import RESULTS
from harness import write_json

from duqpp.ops.cover import Cell, Product, cover
from duqpp.ops.kernels import Machine
from duqpp.tools.gemm_checks import base_products

FILE = RESULTS / "selfcheck_cover.json"
GPUS = {
    "B200": Machine((10, 0), 148),
    "B300": Machine((10, 3), 160),
    "RTX 5090": Machine((12, 0), 170),
    "H200": Machine((9, 0), 132),
}
COLUMNS = ["GPU", "kernel", "there are", "every backend's shapes", "with the kernel's own"]


def cells(machine: Machine, products: list[Product], *, streamk: bool) -> set[Cell]:
    """What products run, stream-K being allowed or not."""
    found = {product.cell(machine, streamk=streamk) for product in products}
    return found - {None}


def rows_of(gpu: str) -> list[list[str]]:
    """For each kernel of a GPU, how many of its cells there are, and how many are run."""
    machine, base = GPUS[gpu], base_products()
    own = cover(machine, streamk=False) | cover(machine, streamk=True)
    before = cells(machine, base, streamk=True)
    after = set(own) | cells(machine, base, streamk=False)
    there_are = after | before
    return [
        [gpu, f"`{kernel}`", *(_count(of, kernel) for of in (there_are, before, after))]
        for kernel in dict.fromkeys(cell.kernel for cell in own)
    ]


def _count(found: set[Cell], kernel: str) -> str:
    return str(sum(cell.kernel == kernel for cell in found))


def result() -> dict[str, Any]:
    """The file's contents."""
    computed = (
        "from the kernel table. A kernel is counted once for each of: one tile along K and "
        "several, or 2, 3 and 4 parts of K; one, two and more rounds of tiles for the SMs"
    )
    rows = [row for gpu in GPUS for row in rows_of(gpu)]
    return {
        "bench": "record",
        "environment": {"machine": None, "computed": computed},
        "tables": {"cells": {"columns": COLUMNS, "rows": rows}},
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_json(result(), FILE)


if __name__ == "__main__":
    main()
