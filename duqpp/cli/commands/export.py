"""The command `duqpp export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from duqpp.cli.options import JsonOption
from duqpp.cli.progress import Bars
from duqpp.cli.tables import print_json, size


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="duqpp checkpoint or hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    kind: Annotated[
        Literal["compressed-tensors"], typer.Option("--format", help="Format to write.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Write a duqpp checkpoint in a format that other software reads.

    compressed-tensors is for vLLM without duqpp: activations are approximate there. With duqpp
    installed, `vllm serve` runs the checkpoint itself, exactly.
    """
    from duqpp.integrations.compressed_tensors import export_compressed_tensors

    with Bars() as bars:
        bars.open(model)
        report = export_compressed_tensors(model, out, progress=bars)
    if as_json:
        print_json(
            {
                "out": str(out),
                "format": kind,
                "bytes": report.weight_bytes,
                "transforms": report.transforms,
                "remarks": report.remarks,
            }
        )
        return
    print(f"{out}: {size(report.weight_bytes)}, {report.transforms} transforms")
    print(*report.remarks, sep="\n")
