"""The commands `duqpp eval` and `duqpp compare`."""

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from duqpp.calibration.tokens import BUILTIN
from duqpp.cli.options import (
    OPTIONS,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    check_calibration,
    choose_device,
    resumable,
    takes_config,
)
from duqpp.cli.progress import Bars
from duqpp.cli.tables import ComparisonTable, perplexity_lines, print_json, task_lines
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError

_TEXT_HELP = "Evaluation text: a file, hf:NAME[:CONFIG[:SPLIT]], builtin (the default)"
WindowsOption = Annotated[
    int | None, typer.Option("--windows", help="How many windows; all of the text by default.")
]


def evaluate(
    model: ModelArgument,
    text: Annotated[str | None, typer.Option("--text", help=f"{_TEXT_HELP}.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: WindowsOption = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The float model: adds KL divergence from it, and top-1 agreement."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval tasks, patterns or YAML files, as in arc_easy,my_task.yaml."),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="For --tasks: a folder with more task files.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="For --tasks: samples of each.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a float or quantized MODEL, divergence from its float model, lm-eval tasks.

    With --tasks, perplexity is left out unless --text or --reference asks for it.
    """
    from duqpp.calibration.tokens import read_text, tokenize
    from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference
    from duqpp.integrations.transformers import load_model

    if tasks is None and (tasks_dir is not None or limit is not None):
        raise InputError("--tasks-dir and --limit are for --tasks")
    where = choose_device(device)
    found: dict[str, Any] = {"model": model}
    lines = []
    with_text = tasks is None or text is not None or reference is not None
    content = read_text(text or BUILTIN, part="evaluation") if with_text else ""
    settings: dict[str, Any] = {"seq_len": seq_len, "windows": windows}
    with Bars() as bars:
        if tasks is not None:
            from duqpp.evaluation.tasks import Tasks

            bars.wait("reading the tasks")
            opened = Tasks(_task_names(tasks), tasks_dir, limit=limit)
        kept = None
        if reference is not None:
            bars.open(reference, "reference")
            loaded, tokenizer = load_model(reference, device=where, progress=bars)
            tokens = tokenize(tokenizer, content)
            _, kept = perplexity_and_reference(loaded, tokens, **settings, progress=bars)
            del loaded
            gc.collect()  # a model's modules refer to each other
        bars.open(model)
        loaded, tokenizer = load_model(model, device=where, progress=bars)
        found["device"] = str(loaded.device)
        if with_text:
            bars.wait("tokenizing the text")
            tokens = tokenize(tokenizer, content)
            result = perplexity(loaded, tokens, **settings, reference=kept, progress=bars)
            found |= {"text": text or BUILTIN, "reference": reference, **result.to_dict()}
            lines += perplexity_lines(result)
        if tasks is not None:
            bars.stop()
            if not bars.console.is_terminal:  # lm-eval draws bars of its own, on a terminal alone
                bars.wait("running the tasks")
            scores = opened.run(loaded, tokenizer)
            found["tasks"] = [score.to_dict() for score in scores]
            lines += task_lines(scores)
    if as_json:
        print_json(found)
        return
    print("\n".join(lines))


def _task_names(tasks: str) -> list[str]:
    """ "arc_easy, piqa" as names."""
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise InputError(f"--tasks must be names with commas between, got {tasks!r}")
    return names


@takes_config("samples", "max_steps", "damping", "skip")
def compare(
    model: ModelArgument,
    config: QuantizeConfig,
    methods: Annotated[
        str,
        typer.Option(
            help="METHOD[:OPTION...],... with the options gptq, rtn, per-block, shared, "
            "alpha=A, weights=RULE, activations=RULE, hessian=float|quantized, drift=SHARE, "
            "order=diagonal|channels, next=quantized|float, refine=blocks|distill."
        ),
    ] = "rtn,hadamard,duquant++,duquant++:gptq",
    calib: CalibrationOption = BUILTIN,
    calib_seq_len: Annotated[
        int, typer.Option(help=OPTIONS["seq_len"][1])
    ] = QuantizeConfig.seq_len,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help=f"{_TEXT_HELP}; repeatable, each model is evaluated on every text."
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
    as_json: JsonOption = False,
) -> None:
    """Quantize a float MODEL by several methods, and set their evaluations side by side.

    Perplexity, its ratio to the float model's, KL divergence from it in nats per token, and the
    share of tokens where both expect the same next one most. The quantized models are removed
    after their evaluation. All of it runs on the CPU; `duqpp eval` can use a GPU.
    """
    from duqpp.evaluation.compare import compare as run
    from duqpp.evaluation.compare import parse_methods
    from duqpp.evaluation.folder import COMPARISON_FILE
    from duqpp.evaluation.scores import Row
    from duqpp.models.source import open_source

    if resume and work is None:
        raise InputError("--resume needs --work, the folder of the comparison to continue")
    configs = parse_methods(methods, replace(config, seq_len=calib_seq_len))
    numbers = _parse_seeds(seeds)
    check_calibration(calib, configs.values())
    texts = text or [BUILTIN]
    table = ComparisonTable(configs, texts, sys.stderr if as_json else sys.stdout)
    with Bars() as bars, resumable(work and work / COMPARISON_FILE):

        def show(row: Row) -> None:
            bars.stop()
            table.print(row)

        bars.open(model)
        found = run(
            open_source(model),
            configs,
            calibration=calib,
            texts=texts,
            seq_len=seq_len,
            windows=windows,
            seeds=numbers,
            work=work,
            resume=resume,
            progress=bars,
            on_row=show,
        )
    if as_json:
        print_json({"model": model, "seeds": numbers, **found.to_dict()})
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
