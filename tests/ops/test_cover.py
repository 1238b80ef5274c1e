"""The products that run every kernel of a GPU, as the library's own table chooses them."""

from itertools import product

import pytest

from duqpp.ops.cover import Cell, Product, cover
from duqpp.ops.kernels import Machine
from duqpp.tools import gemm_checks
from tests.cuda.library import extension

SMS = (132, 148, 160, 170, 188)
BLACKWELL = {
    (10, 0): ("sm100_swapped_128x64", "sm100_256x128", "sm100_256x192", "sm100_256x256"),
    (10, 3): ("sm100_swapped_128x64", "sm100_256x128", "sm100_256x192", "sm100_256x256"),
    (12, 0): ("sm120_128x128",),
}
STREAMK = "sm100_swapped_128x64_streamk"
MACHINES = [Machine(capability, sms) for capability, sms in product(BLACKWELL, SMS)]


def cells_of_selfcheck(monkeypatch, machine: Machine, *, streamk: bool) -> set[Cell]:
    """What selfcheck would run of a GPU's kernels, by what the table says of its products."""
    monkeypatch.setattr(gemm_checks, "machines_here", lambda: [Machine(), machine])
    runs = gemm_checks._kernel_checks("cuda", streamk=streamk)
    found = set()
    for run in runs:
        cells = {shape.cell(machine, streamk=streamk) for shape in run.keywords["shapes"]}
        assert {cell.kernel for cell in cells} == {run.keywords["kernel"]}
        if run.func is gemm_checks.check_kernel:
            found |= cells
    return found


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_every_kernel_of_blackwell_runs_one_and_several_tiles_and_waves(machine, monkeypatch):
    extension()
    kernels = BLACKWELL[machine.capability]
    cells = cells_of_selfcheck(monkeypatch, machine, streamk=False)
    assert cells == {Cell(*cell) for cell in product(kernels, (1,), (False, True), (1, 2, 3))}
    # Stream-K splits at least four tiles along K, and only where its parts run at once.
    splits = (2, 3, 4) if machine.capability[0] == 10 else ()
    cells = cells_of_selfcheck(monkeypatch, machine, streamk=True)
    assert cells == {Cell(STREAMK, parts, True, 1) for parts in splits}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_every_kernel_of_older_gpus_runs_one_and_several_segments(capability, monkeypatch):
    """Of waves those that the table can come to: wide CTAs end first where narrow ones have two."""
    kernels = [name for name in extension().gemm_kernels() if name.startswith("sm80")]
    machine = Machine(capability, 132)
    cells = cells_of_selfcheck(monkeypatch, machine, streamk=False)
    assert {Cell(kernel, 1, k, 1) for kernel in kernels for k in (False, True)} <= cells
    assert {cell.kernel for cell in cells if cell.waves > 1} >= {"sm80_64x8", "sm80_32x32"}
    assert not cover(machine, streamk=True)


def test_products_of_many_rows_are_not_for_a_kernel():
    machine = Machine((9, 0), 132)  # docs/speed.md: from some 50 rows on
    assert Product(300, 4096, 4096).cell(machine) is None
    assert Product(16, 4096, 4096).cell(machine) is not None


@pytest.mark.parametrize("machine", MACHINES[::4], ids=lambda machine: machine.name)
def test_products_are_ragged(machine):
    kernels = extension().GemmPlan
    for cell, shape in cover(machine, streamk=False).items():
        plan = kernels(cell.kernel, sm_count=machine.sm_count)
        one, other, k = plan.tile
        rows, columns = (other, one) if plan.swapped else (one, other)
        assert shape.M % rows and shape.N % columns and shape.K % k, (cell, shape)
