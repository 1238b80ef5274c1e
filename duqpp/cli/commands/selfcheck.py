"""The command `duqpp selfcheck`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from duqpp.cli.options import JsonOption
from duqpp.cli.progress import Bars
from duqpp.cli.tables import print_json, selfcheck_table, timings_table
from duqpp.errors import InputError


def selfcheck(
    report: Annotated[Path | None, typer.Option(help="Write the JSON report here.")] = None,
    timings: Annotated[bool, typer.Option(help="Time LLaMA-3's linears on a GPU.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run every kernel of this machine against the reference, and time it on a GPU.

    Exits with 1 when a kernel is wrong. On a Blackwell GPU its report is what we would like to see.
    """
    from duqpp.tools.selfcheck import check_report_file
    from duqpp.tools.selfcheck import selfcheck as run

    if report is not None:
        check_report_file(report)
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
        Console().print(selfcheck_table(found))
        if found.timings:
            Console().print(timings_table(found))
        for line in found.skipped:
            print(f"skipped: {line}")
    if not found.passed:
        raise typer.Exit(1)
