"""The command `duqpp compare`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from duqpp.calibration.tokens import BUILTIN
from duqpp.cli.options import (
    TEXT_HELP,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    WindowsOption,
    check_calibration,
    parse_methods,
    resumable,
    takes_fields,
)
from duqpp.cli.progress import Bars
from duqpp.cli.tables import ComparisonTable, print_json
from duqpp.config import DESCRIPTIONS, QuantizeConfig
from duqpp.errors import InputError
from duqpp.placement.devices import AUTO

_METHODS = ["rtn", "hadamard", "duquant++", "duquant++ --gptq"]


@takes_fields("samples", "max_steps", "damping", "skip", "dtype")
def compare(
    model: ModelArgument,
    *,
    method: Annotated[
        list[str],
        typer.Option(
            metavar="SPEC",
            help="A method and its options as `duqpp quantize` takes them, such as "
            "'duqpp --refine distill'; repeatable.",
            autocompletion=lambda: list(DESCRIPTIONS["method"].choices),
        ),
    ] = _METHODS,
    config: dict[str, Any],
    calib: CalibrationOption = BUILTIN,
    calib_seq_len: Annotated[
        int, typer.Option(help=DESCRIPTIONS["seq_len"].help)
    ] = QuantizeConfig.seq_len,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help=f"{TEXT_HELP}; repeatable, each model is evaluated on every text."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in an evaluation window.")] = 2048,
    windows: WindowsOption = None,
    seeds: Annotated[str, typer.Option(help="Seeds, as in 0,1,2.")] = "0",
    work: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the results, so that --resume can go on with it."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted comparison in --work.")
    ] = False,
    device: DeviceOption = AUTO,
    as_json: JsonOption = False,
) -> None:
    """Quantize a float MODEL by several methods, and set their evaluations side by side.

    Perplexity, its ratio to the float model's, KL divergence from it in nats per token, and the
    share of tokens where both expect the same next one most. The quantized models are removed
    after their evaluation.
    """
    from duqpp.evaluation.compare import Plan
    from duqpp.evaluation.compare import compare as run
    from duqpp.evaluation.folder import COMPARISON_FILE
    from duqpp.evaluation.scores import Row
    from duqpp.models.source import open_source

    if resume and work is None:
        raise InputError("--resume needs --work, the folder of the comparison to continue")
    plan = Plan(
        methods=parse_methods(method, **config, seq_len=calib_seq_len),
        calibration=calib,
        texts=text or [BUILTIN],
        seq_len=seq_len,
        windows=windows,
        seeds=_parse_seeds(seeds),
    )
    check_calibration(calib, plan.methods.values())
    table = ComparisonTable(plan.methods, plan.texts, sys.stderr if as_json else sys.stdout)
    with Bars() as bars, resumable(work and work / COMPARISON_FILE):

        def show(row: Row) -> None:
            bars.stop()
            table.print(row)

        bars.open(model)
        source = open_source(model)
        options: dict[str, Any] = {"work": work, "resume": resume, "device": device}
        found = run(source, plan, **options, progress=bars, on_row=show)
    if as_json:
        print_json({"model": model, "seeds": plan.seeds, **found.to_dict()})
        return
    for scores in found.rows[0].texts:
        print(f"evaluated on {scores.windows} windows of {seq_len} tokens from {scores.text}")
    print(f"convention: {found.convention}")


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds must be whole numbers, as in 0,1,2, got {text!r}") from error
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds names a seed twice: {text}")
    return seeds
