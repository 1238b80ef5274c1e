"""lm-eval tasks: EleutherAI's evaluation harness on any model that duqpp runs."""

import contextlib
import difflib
import io
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from duqpp.errors import InputError, refusing
from duqpp.models.quiet import quiet_libraries


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task or of a group of tasks, as lm-eval computes it.

    metric: such as "acc", "acc_norm". filter: what was done to the model's answers, mostly "none".
    stderr: standard error over the samples, None where lm-eval has none. samples: evaluated ones;
    None for a group. shots: examples in each prompt; None for a group. version: of the task.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int | None
    shots: int | None
    version: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


class Tasks:
    """Tasks with their data, ready to run: opened before time is spent on a model.

    names: of all tasks, in the order asked for; a pattern stands for what it matches.
    """

    def __init__(
        self, tasks: Sequence[str], tasks_dir: str | Path | None = None, *, limit: int | None = None
    ) -> None:
        """Find tasks and read their data sets, from the hub or its cache, or from local files.

        A YAML file may name Python functions of files beside it, which lm-eval then runs. Relative
        paths to data in it start at the working directory. Where all tasks are YAML files, groups
        in them can only name members from `tasks_dir`: lm-eval's own 15,000 names, which take some
        10 seconds to read, are left out.

        Args:
            tasks: names that lm-eval knows or patterns of them ("arc_*"), or paths to YAML files.
            tasks_dir: folder with more YAML files, which come before lm-eval's own.
            limit: samples of each task, from the first; None is all.
        Raises: InputError without the lm_eval package, for an unknown task, for one whose data
            cannot be read.
        """
        if limit is not None and limit < 1:
            raise InputError(f"`limit` must be at least 1, got {limit}")
        self._limit = limit
        lm_eval = _imported()
        if tasks_dir is not None and not Path(tasks_dir).is_dir():
            raise InputError(f"`tasks_dir`: {tasks_dir} is no folder")
        with _quiet(), refusing(f"lm-eval cannot load {', '.join(tasks)}"):
            manager = lm_eval.TaskManager(
                include_path=None if tasks_dir is None else str(tasks_dir),
                include_defaults=not all(map(_is_file_name, tasks)),
            )
            self.names = [name for task in tasks for name in _names(manager, task)]
            lm_eval.seed()
            self._loaded = manager.load(self.names)  # which runs datasets, YAML and tasks' code
        # As `lm_eval.simple_evaluate` has it, which also runs git, and looks up what is installed.
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=lm_eval.fewshot_seed)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def run(self, model: Any, tokenizer: Any) -> list[TaskScore]:
        """Evaluate a causal language model, one sequence at a time; log-probabilities in float32.

        Raises: InputError when lm-eval cannot run a task.
        """
        lm_eval = _imported()
        with _quiet():
            lm_eval.seed()
            with refusing("lm-eval"):  # a task's own code
                lm = lm_eval.HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
                found = lm_eval.evaluate(lm, self._loaded, limit=self._limit, log_samples=False)
        return _scores(found)


def _names(manager: Any, task: str) -> list[str]:
    """Those that a name, a pattern or a path stands for."""
    if _is_file_name(task):
        if not Path(task).is_file():
            raise InputError(f"no such task file: {task}")
        return [task]
    names: list[str] = manager.match_tasks([task])
    if not names:
        near = difflib.get_close_matches(task, manager.all_tasks)
        hint = f"; there is {', '.join(near)}" if near else ""
        raise InputError(f"lm-eval knows no task {task!r}{hint}")
    return names


def _is_file_name(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    scores = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            scores.append(
                TaskScore(
                    task,
                    metric,
                    kind,
                    float(value),
                    float(stderr) if isinstance(stderr, float) else None,  # it may be "N/A"
                    found["n-samples"].get(task, {}).get("effective"),
                    found["n-shot"].get(task),
                    None if (version := found["versions"].get(task)) is None else str(version),
                )
            )
    return scores


def _imported() -> SimpleNamespace:
    """The parts of lm_eval that are used here, and the seeds of its command line."""
    try:
        with _quiet():
            import numpy
            from lm_eval import evaluate
            from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"`tasks` needs lm-eval: pip install lm-eval datasets ({error})"
        ) from error

    def seed() -> None:
        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)

    return SimpleNamespace(
        evaluate=evaluate,
        HFLM=HFLM,
        TaskManager=TaskManager,
        seed=seed,
        fewshot_seed=DEFAULT_OTHER_SEED,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's advice; its bars are drawn on a terminal only, and never on stdout."""
    stream = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with (
        quiet_libraries(),
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        yield
