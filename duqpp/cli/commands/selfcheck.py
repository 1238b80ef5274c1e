"""The command `duqpp selfcheck`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from duqpp.cli.options import JsonOption
from duqpp.cli.progress import Bars
from duqpp.cli.tables import console, print_json
from duqpp.errors import InputError
from duqpp.files import check_writable
from duqpp.tools.selfcheck import Report


def selfcheck(
    report: Annotated[Path | None, typer.Option(help="Write the JSON report here.")] = None,
    timings: Annotated[bool, typer.Option(help="Time LLaMA-3's linears on a GPU.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run every kernel of this machine against the reference, and time it on a GPU.

    Exits with 1 when a kernel is wrong. On a Blackwell GPU its report is what we would like to see.
    """
    from duqpp.tools.selfcheck import selfcheck as run

    if report is not None:
        check_writable(report, "write the report to")
    with Bars() as bars:
        found = run(timings=timings, progress=bars)
    if report is not None:
        try:
            report.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {report}: {error.strerror}") from error
    if as_json:
        print_json(found.to_dict())
    else:
        console().print(selfcheck_table(found))
        if found.timings:
            console().print(timings_table(found))
        for line in found.skipped:
            print(f"skipped: {line}")
    if not found.passed:
        raise typer.Exit(1)


def selfcheck_table(report: Report) -> Table:
    """A line per kernel: how many cases, and the first that failed."""
    table = Table(box=SIMPLE_HEAD)
    for head in ("backend", "op", "cases", "result"):
        table.add_column(head)
    for check in report.checks:
        result = "\n".join(check.failures) or "equal to the reference"
        table.add_row(check.backend, check.op, str(check.cases), result)
    return table


def timings_table(report: Report) -> Table:
    """A line per linear and number of rows: microseconds, and against torch's bfloat16."""
    table = Table(box=SIMPLE_HEAD)
    for head in ("linear", "M", "quantize", "gemm", "both, us", "vs bf16"):
        table.add_column(head, justify="left" if head == "linear" else "right")
    for t in report.timings:
        times = (f"{value:.1f}" for value in (t.quantize_us, t.gemm_us, t.linear_us))
        table.add_row(t.linear, str(t.M), *times, f"{t.bf16_us / t.linear_us:.2f}")
    return table
