"""The command `duqpp eval`."""

import gc
from pathlib import Path
from typing import Annotated, Any

import typer

from duqpp.calibration.tokens import BUILTIN, read_text, tokenize
from duqpp.cli.options import (
    TEXT_HELP,
    DeviceMapOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    WindowsOption,
    placed,
)
from duqpp.cli.progress import Bars
from duqpp.cli.tables import percent, print_json
from duqpp.errors import InputError
from duqpp.evaluation.divergence import Reference
from duqpp.evaluation.perplexity import (
    PerplexityResult,
    check_windowing,
    perplexity,
    perplexity_and_reference,
)
from duqpp.evaluation.tasks import Tasks, TaskScore
from duqpp.placement.devices import AUTO


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
    device: DeviceOption = AUTO,
    device_map: DeviceMapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a float or quantized MODEL, divergence from its float model, lm-eval tasks.

    With --tasks, perplexity is left out unless --text or --reference asks for it. A model goes
    through the text block by block, and need not fit into the memory; for --tasks and --device-map
    it is loaded whole.
    """
    from duqpp.evaluation.models import open_model
    from duqpp.integrations.transformers import load_model

    if tasks is None and (tasks_dir is not None or limit is not None):
        raise InputError("--tasks-dir and --limit are for --tasks")
    where = placed(device, device_map)
    asked: list[_TextEvaluation | _TaskEvaluation] = []
    with Bars() as bars:
        if tasks is None or text is not None or reference is not None:
            asked.append(_TextEvaluation(text or BUILTIN, seq_len, windows, reference))
        if tasks is not None:
            asked.append(_TaskEvaluation(tasks, tasks_dir, limit, bars))
        for evaluation in asked:
            evaluation.prepare(where, bars)
        bars.open(model)
        load = open_model if tasks is None else load_model  # lm-eval takes a whole model
        loaded, tokenizer = load(model, **where, progress=bars)
        found: dict[str, Any] = {"model": model, "device": str(loaded.device)}
        lines: list[str] = []
        for evaluation in asked:
            values, printed = evaluation.run(loaded, tokenizer, bars)
            found |= values
            lines += printed
    if as_json:
        print_json(found)
    else:
        print("\n".join(lines))


class _TextEvaluation:
    """Perplexity on a text, and divergence from a reference model, if one is named."""

    def __init__(self, text: str, seq_len: int, windows: int | None, reference: str | None) -> None:
        check_windowing(seq_len, windows)
        self._text, self._content = text, read_text(text, part="evaluation")
        self._windowing: dict[str, Any] = {"seq_len": seq_len, "windows": windows}
        self._reference = reference
        self._kept: Reference | None = None

    def prepare(self, where: dict[str, Any], bars: Bars) -> None:
        """Evaluate the reference: it is gone before the model is loaded."""
        from duqpp.evaluation.models import open_model

        if self._reference is None:
            return
        bars.open(self._reference, "reference")
        model, tokenizer = open_model(self._reference, **where, progress=bars)
        tokens = tokenize(tokenizer, self._content)
        _, self._kept = perplexity_and_reference(model, tokens, **self._windowing, progress=bars)
        del model
        gc.collect()  # modules of a whole model refer to each other

    def run(self, model: Any, tokenizer: Any, bars: Bars) -> tuple[dict[str, Any], list[str]]:
        """Of a model: as JSON, and as lines for people."""
        bars.wait("tokenizing the text")
        tokens = tokenize(tokenizer, self._content)
        options = {**self._windowing, "reference": self._kept}
        result = perplexity(model, tokens, **options, progress=bars)
        asked = {"text": self._text, "reference": self._reference}
        return {**asked, **result.to_dict()}, perplexity_lines(result)


class _TaskEvaluation:
    """lm-eval tasks, named as in "arc_easy, piqa"; opened before time is spent on a model."""

    def __init__(self, tasks: str, folder: Path | None, limit: int | None, bars: Bars) -> None:
        names = [name.strip() for name in tasks.split(",")]
        if not all(names):
            raise InputError(f"--tasks must be names with commas between, got {tasks!r}")
        bars.wait("reading the tasks")
        self._tasks = Tasks(names, folder, limit=limit)

    def prepare(self, where: dict[str, Any], bars: Bars) -> None:
        """Nothing is to be done."""

    def run(self, model: Any, tokenizer: Any, bars: Bars) -> tuple[dict[str, Any], list[str]]:
        """Of a model: as JSON, and as lines for people."""
        bars.stop()
        if not bars.console.is_terminal:  # lm-eval draws bars of its own, on a terminal alone
            bars.wait("running the tasks")
        scores = self._tasks.run(model, tokenizer)
        return {"tasks": [score.to_dict() for score in scores]}, task_lines(scores)


def perplexity_lines(result: PerplexityResult) -> list[str]:
    """What `duqpp eval` prints of a text."""
    lines = [
        f"perplexity {result.perplexity:.4f} over {result.windows} windows of {result.seq_len} "
        f"tokens ({result.seconds:.1f} s)"
    ]
    if result.divergence:
        lines.append(
            f"KL divergence from the reference {result.divergence.kl:.4f} nats per token, top-1 "
            f"agreement {percent(result.divergence.agreement)}"
        )
    return [*lines, f"convention: {result.convention}"]


def task_lines(scores: list[TaskScore]) -> list[str]:
    """A line for each metric; after +-, the standard error over the samples."""
    lines = []
    for score in scores:
        kind = "" if score.filter == "none" else f" ({score.filter})"
        error = "" if score.stderr is None else f" +- {score.stderr:.4f}"
        count = "" if score.samples is None else f", {score.samples} samples, {score.shots} shots"
        lines.append(f"{score.task}: {score.metric}{kind} {score.value:.4f}{error}{count}")
    return lines
