"""The command `duqpp inspect`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from duqpp.calibration.tokens import BUILTIN
from duqpp.cli.options import (
    CalibrationOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    takes_fields,
)
from duqpp.cli.progress import Bars
from duqpp.cli.tables import console, percent, print_json
from duqpp.config import DESCRIPTIONS, QuantizeConfig
from duqpp.placement.devices import AUTO
from duqpp.tools.inspection import Inspection, layer_and_kind

# Not those of whole models, and of what follows a block.
_FIELDS = [n for n in DESCRIPTIONS if n not in ("drift", "next_inputs", "refine", "refine_samples")]


@takes_fields(*_FIELDS)
def inspect(
    model: ModelArgument,
    config: dict[str, Any],
    calib: CalibrationOption = BUILTIN,
    layers: Annotated[
        int | None, typer.Option(help="Only this many decoder blocks, from the first.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a .png, .pdf or .svg.")] = None,
    device: DeviceOption = AUTO,
    as_json: JsonOption = False,
) -> None:
    """Outliers and errors of each linear group, before and after rotation.

    A quantized MODEL has them in its report. A float MODEL is calibrated and quantized in memory,
    with the options given; nothing is written.
    """
    from duqpp.tools.inspection import inspect_model

    if plot is not None:
        from duqpp.tools.plot import check_plot_file
        from duqpp.tools.plot import plot as draw

        check_plot_file(plot)
    with Bars() as bars:
        bars.open(model)
        found = inspect_model(
            model,
            QuantizeConfig(**config),
            calibration=calib,
            layers=layers,
            device=device,
            progress=bars,
        )
        if plot is not None:
            bars.wait("drawing")
            draw(found, plot)
    if as_json:
        print_json(found.to_dict())
    else:
        console().print(inspection_table(found))
    if plot is not None:
        print(f"plot: {plot}", file=sys.stderr)


def inspection_table(inspection: Inspection) -> Table:
    """A line per linear group."""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{inspection.model}: {inspection.method}",
        caption="max |x|: largest input magnitude; after: smoothed and rotated\n"
        "relative errors of inputs x, weights W and outputs y",
    )
    table.add_column("layer", justify="right")
    table.add_column("linears")
    for head in ("max |x|", "after", "x error", "after", "W error", "y error"):
        table.add_column(head, justify="right")
    for group in inspection.groups:
        layer, kind = layer_and_kind(group)
        amax = [group.block_amax_before, group.block_amax]
        errors = (
            group.activation_error_before,
            group.activation_error,
            group.weight_error,
            group.output_error,
        )
        table.add_row(
            str(layer),
            kind,
            *("-" if blocks is None else f"{max(blocks):.4g}" for blocks in amax),
            *map(percent, errors),
        )
    return table
