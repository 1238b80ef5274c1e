"""The command `duqpp eval`."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from duqpp.calibration.tokens import BUILTIN, read_text, tokenize
from duqpp.cli.options import (
    TEXT_HELP,
    DeviceOption,
    JsonOption,
    ModelArgument,
    WindowsOption,
    choose_device,
)
from duqpp.cli.progress import Bars
from duqpp.cli.tables import perplexity_lines, print_json, task_lines
from duqpp.errors import InputError
from duqpp.evaluation.divergence import Reference
from duqpp.evaluation.perplexity import PerplexityResult, perplexity, perplexity_and_reference
from duqpp.evaluation.tasks import Tasks, TaskScore


def evaluate(
    model: ModelArgument,
    text: Annotated[str | None, typer.Option("--text", help=f"{TEXT_HELP}.")] = None,
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
    from duqpp.integrations.transformers import load_model

    if tasks is None and (tasks_dir is not None or limit is not None):
        raise InputError("--tasks-dir and --limit are for --tasks")
    where = choose_device(device)
    found: dict[str, Any] = {"model": model}
    lines = []
    measured = None
    if tasks is None or text is not None or reference is not None:
        content = read_text(text or BUILTIN, part="evaluation")
        measured = _Text(content, {"seq_len": seq_len, "windows": windows})
    with Bars() as bars:
        opened = None if tasks is None else _open_tasks(tasks, tasks_dir, limit, bars)
        against = None
        if measured and reference is not None:
            bars.open(reference, "reference")
            against = measured.reference(*load_model(reference, device=where, progress=bars), bars)
            gc.collect()  # a model's modules refer to each other
        bars.open(model)
        loaded, tokenizer = load_model(model, device=where, progress=bars)
        found["device"] = str(loaded.device)
        if measured:
            result = measured.perplexity(loaded, tokenizer, against, bars)
            found |= {"text": text or BUILTIN, "reference": reference, **result.to_dict()}
            lines += perplexity_lines(result)
        if opened is not None:
            scores = _run_tasks(opened, loaded, tokenizer, bars)
            found["tasks"] = [score.to_dict() for score in scores]
            lines += task_lines(scores)
    if as_json:
        print_json(found)
    else:
        print("\n".join(lines))


@dataclass(frozen=True)
class _Text:
    """A text to evaluate models on. windowing: seq_len and windows, as for `perplexity`."""

    content: str
    windowing: dict[str, Any]

    def perplexity(
        self, model: Any, tokenizer: Any, reference: Reference | None, bars: Bars
    ) -> PerplexityResult:
        """Of a model, and its divergence from a reference, if there is one."""
        bars.wait("tokenizing the text")
        tokens = tokenize(tokenizer, self.content)
        return perplexity(model, tokens, **self.windowing, reference=reference, progress=bars)

    def reference(self, model: Any, tokenizer: Any, bars: Bars) -> Reference:
        """A float model, as what to compare another one with."""
        tokens = tokenize(tokenizer, self.content)
        return perplexity_and_reference(model, tokens, **self.windowing, progress=bars)[1]


def _open_tasks(tasks: str, folder: Path | None, limit: int | None, bars: Bars) -> Tasks:
    """Tasks named as in "arc_easy, piqa": before time is spent on a model."""
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise InputError(f"--tasks must be names with commas between, got {tasks!r}")
    bars.wait("reading the tasks")
    return Tasks(names, folder, limit=limit)


def _run_tasks(tasks: Tasks, model: Any, tokenizer: Any, bars: Bars) -> list[TaskScore]:
    """lm-eval draws bars of its own, on a terminal alone."""
    bars.stop()
    if not bars.console.is_terminal:
        bars.wait("running the tasks")
    return tasks.run(model, tokenizer)
