"""Products that run every kernel of mxfp4_gemm of a GPU, taken from the table that chooses them.

What a kernel does for its first tile is not all of it: its stages of shared memory come round after
some tiles along K, a CTA of a persistent kernel goes on to a second output tile, and to a third,
which has the accumulators of the first. So each kernel is to be run with one tile along K and with
several, and with one, two, and more rounds of tiles for the SMs ("waves"). All of these products
are ragged: the last tile has 8 rows of W, 1 row of x or one more than half, and along K 32 columns
or 96.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

from duqpp.format import BLOCK_SIZE
from duqpp.ops.crossover import crossover
from duqpp.ops.kernels import Machine
from duqpp.ops.native import compiled_library

MOST_WAVES = 3  # that are told apart: 3 stands for more
_SHORT_K = 3 * BLOCK_SIZE  # of one tile, an odd number of blocks
_LONG_TILES = 9  # along K: more than any kernel has stages, or warps that split it
_FEW = 3  # tiles along one dimension, where there are many along the other
_STEP = 4  # between numbers of many: all that a GPU could be given are some 10 000 products


@dataclass(frozen=True)
class Cell:
    """What of a kernel is run. splits: of K, by stream-K; 1 for others. waves: 1, 2 or 3."""

    kernel: str
    splits: int
    several_k_tiles: bool
    waves: int


@dataclass(frozen=True)
class Product:
    """x [M, K] by a weight [N, K]."""

    M: int
    N: int
    K: int

    def cell(self, machine: Machine, *, streamk: bool | None = None) -> Cell | None:
        """What an op of this shape runs there; None where torch multiplies (`large_gemm`).

        Args: streamk: whether it may be stream-K; None is what DUQPP_STREAMK says.
        """
        known = crossover(machine.capability)
        if known is not None and known.at(self.N, self.K) <= self.M:
            return None
        plan = _plan(machine, self, streamk)
        waves = min(MOST_WAVES, compiled_library().gemm_waves(plan, self.M, self.N))
        return Cell(plan.kernel, plan.splits, plan.tile[2] < self.K, waves)


def _plan(machine: Machine, shape: Product, streamk: bool | None = None) -> Any:
    """The library's GemmPlan."""
    return compiled_library().select_gemm(
        shape.M, shape.N, shape.K, arch=machine.arch, sm_count=machine.sm_count, streamk=streamk
    )


def cover(machine: Machine, *, streamk: bool) -> dict[Cell, Product]:
    """For each cell that a GPU can reach, the product with the fewest outputs that does.

    Of those that have more than one tile along both dimensions, and more than one row of x, where
    there are any.

    Args: streamk: the cells of stream-K, or all others, as they are reached without it.
    """
    found: dict[Cell, tuple[tuple[bool, bool, int], Product]] = {}
    for product, is_flat in _candidates(machine):
        cost = is_flat, product.M == 1, product.M * product.N
        cell = product.cell(machine, streamk=streamk)
        if cell is None or (cell.splits > 1) != streamk:
            continue
        if cell not in found or cost < found[cell][0]:
            found[cell] = cost, product
    return {cell: found[cell][1] for cell in sorted(found, key=astuple)}


def _candidates(machine: Machine) -> Iterator[tuple[Product, bool]]:
    """Ragged products for every tile shape there, and whether they are one tile high or wide."""
    for rows, columns, k, at_once in _tile_shapes(machine):
        for few in range(1, _FEW + 1):
            for many in range(1, MOST_WAVES * at_once // few + 1, _STEP):
                for high, wide in {(few, many), (many, few)}:
                    n = (wide - 1) * columns + 8
                    for last in (1, rows // 2 + 1):
                        m = (high - 1) * rows + last
                        for length in (_SHORT_K, (_LONG_TILES - 1) * k + BLOCK_SIZE):
                            yield Product(m, n, length), 1 in (high, wide)


def _tile_shapes(machine: Machine) -> set[tuple[int, int, int, int]]:
    """Rows of x, rows of W, columns along K of a tile, and how many of them run at once."""
    library, found = compiled_library(), set()
    arch = _plan(machine, Product(1, 8, BLOCK_SIZE)).arch
    for name in library.gemm_kernels():
        plan = library.GemmPlan(name, sm_count=machine.sm_count)
        if plan.arch == arch:
            one, other, k = plan.tile
            rows, columns = (other, one) if plan.swapped else (one, other)
            found.add((rows, columns, k, max(1, machine.sm_count // plan.sms)))
    return found
