"""What benchmarks share: options, rows that resume and fit a budget, JSON that says where."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from duqpp.tools.doctor import doctor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INCOMPLETE = 3  # exit status: the budget is spent, and another run goes on from there
Case = dict[str, Any]  # what tells a row from the others


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument(
        "--out",
        type=Path,
        help="write the JSON object to this file, too; into a folder as DEVICE_BENCHMARK.json",
    )
    options.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--commit", help="of the sources, where git cannot say")
    return options


def add_shapes(options: argparse.ArgumentParser) -> None:
    """Options of a benchmark over activations [M, K]."""
    options.add_argument("--rows", type=int, nargs="+", default=(1, 16, 512, 2048), help="M")
    options.add_argument("--columns", type=int, nargs="+", default=(4096, 14336), help="K")


def add_device(options: argparse.ArgumentParser, *, cpu_cache: str) -> None:
    """Options of a benchmark that runs on a GPU, too. cpu_cache: the default on the CPU."""
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument(
        "--cache",
        choices=("cold", "warm"),
        nargs="+",
        help="whether inputs turn through more memory than the caches hold, or are the same each "
        f"time (default: {cpu_cache} on the CPU, both on a GPU)",
    )
    options.set_defaults(cpu_cache=cpu_cache)
    add_resume(options)


def add_resume(options: argparse.ArgumentParser) -> None:
    """Options of a benchmark whose rows are a `Run`."""
    options.add_argument("--budget", type=float, help="seconds for all rows; those left are named")
    options.add_argument(
        "--resume", action="store_true", help="keep the rows that --out has from this machine"
    )
    options.set_defaults(device="cpu")


def start(
    options: argparse.ArgumentParser, arguments: list[str] | None = None
) -> tuple[argparse.Namespace, torch.Generator]:
    """The options, and the generator, on their device, of what is random; sets the threads.

    Where a GPU is asked for and there is none, this says so and ends the program.
    """
    chosen = options.parse_args(arguments)
    device = getattr(chosen, "device", "cpu")
    if device == "cuda" and (why := why_no_gpu()):
        skip(why)
    if hasattr(chosen, "cpu_cache"):
        chosen.cache = chosen.cache or (
            ["cold", "warm"] if device == "cuda" else [chosen.cpu_cache]
        )
    torch.set_num_threads(chosen.threads)
    return chosen, torch.Generator(device).manual_seed(chosen.seed)


def skip(why: str) -> None:
    """End the program without a measurement."""
    print(f"skipped: {why}")
    raise SystemExit(0)


def why_no_gpu() -> str | None:
    """Why torch has no GPU to run on; None where it has one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return f"torch {torch.__version__} is a build for CPUs; install torch's CUDA build"
    return "torch sees no CUDA device"


def environment(commit: str | None = None) -> dict[str, Any]:
    """Device, versions and commit."""
    facts = doctor()
    about = {
        "cpu": facts["cpu"],
        "library": facts["library"],
        "threads": torch.get_num_threads(),
        "gpus": facts["gpus"],
        "cuda": torch.version.cuda,
        **_driver(),
        "versions": facts["versions"],
        "platform": platform.platform(),
        "commit": _described() or commit,
    }
    return json.loads(json.dumps(about))  # as it is when it is read from a file


def _described() -> str:
    """The commit, and whether sources were changed since: results and pages are written here.

    "" where there is no git, or no repository.
    """
    if shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    others = (":(exclude)benchmarks/results", ":(exclude)docs")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return git("describe", "--always") + ("-dirty" if changed else "")


def _driver() -> dict[str, str | None]:
    """The NVIDIA driver's version, and the limits that the first GPU runs under."""
    fields = {"driver": "driver_version", "power_limit": "power.limit", "clock": "clocks.max.sm"}
    if not torch.cuda.is_available() or not (tool := shutil.which("nvidia-smi")):
        return dict.fromkeys(fields)
    query = [f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run([tool, *query], capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.split(",")]
    if done.returncode != 0:
        return dict.fromkeys(fields)
    return dict(zip(fields, values, strict=True))


def device_slug(device: str) -> str:
    """The device in a file's name: "NVIDIA H100 80GB HBM3" is h100-80gb-hbm3."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return re.sub(r"[^a-z0-9]+", "-", name.removeprefix("nvidia ").removeprefix("geforce ")).strip(
        "-"
    )


def write_json(result: dict[str, Any], file: Path) -> None:
    """Replace a file whole, so that a program that is stopped leaves the earlier one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)


def report(rows: list[Case], options: argparse.Namespace, **facts: Any) -> None:
    """Print the rows as JSON, and write them to a file, where that was asked for."""
    result = {"rows": rows, **facts, "environment": environment(options.commit)}
    if options.json:
        print(json.dumps(result, indent=1))
    if options.out:
        write_json(result, options.out)


class Table:
    """Rows printed as they come, unless JSON was asked for."""

    def __init__(self, columns: dict[str, str], options: argparse.Namespace) -> None:
        self._columns, self._quiet = columns, options.json
        self.rows: list[Case] = []
        if not self._quiet:
            print(" ".join(f"{name:>{self._width(name)}}" for name in columns), flush=True)

    def _width(self, name: str) -> int:
        return max(len(name), 9)

    def add(self, row: Case) -> None:
        self.rows.append(row)
        if not self._quiet:
            cells = []
            for name, form in self._columns.items():
                value = row.get(name)
                text = "-" if value is None else format(value, form)
                cells.append(f"{text:>{self._width(name)}}")
            print(" ".join(cells), flush=True)


class Budget:
    """Seconds for each of some rows, so that all of them end in time: more for few, less for many.

    Half of a row's share is left to what comes before its timing.

    Args: seconds: for all rows; None is no limit. rows: how many. most: for one of them.
    """

    def __init__(
        self,
        seconds: float | None,
        rows: int,
        most: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now, self._most, self._rows = now, most, rows
        self._end = None if seconds is None else now() + seconds

    def share(self) -> float | None:
        """Seconds to time the next row for; None when all are spent."""
        rows, self._rows = self._rows, self._rows - 1
        if self._end is None:
            return self._most
        left = self._end - self._now()
        return None if left <= 0 else min(self._most, left / rows / 2)


class Run:
    """Rows measured one by one, printed as they come, each kept in the file as soon as it is there.

    With --resume, rows that the file has from the same device, versions and commit are not measured
    again. Those for which no time is left, or no memory, are named in the result with the reason.

    Args:
        bench: name of the benchmark. columns: of the printed table, and their formats.
        facts: of this run, such as its peaks; each row says which run it is of.
    """

    def __init__(
        self,
        bench: str,
        columns: dict[str, str],
        options: argparse.Namespace,
        facts: dict[str, Any],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._now = options, now
        out = options.out
        if out is not None and out.is_dir():
            out = out / f"{device_slug(options.device)}_{bench}.json"
        self.file = out
        self._result = {
            "bench": bench,
            "device": options.device,
            "rows": [],
            "skipped": [],
            "runs": [],
            "environment": environment(options.commit),
        }
        self._columns = columns
        if options.resume and out is not None and out.exists():
            earlier = json.loads(out.read_text(encoding="utf-8"))
            if earlier.get("environment") == self._result["environment"]:
                self._result |= {name: earlier[name] for name in ("rows", "runs")}
            else:
                self.say(f"{out} is of another machine or commit: all rows are measured anew")
        self._result["runs"].append(facts)

    def say(self, text: str) -> None:
        """Print a line, unless JSON was asked for."""
        if not self._options.json:
            print(text, flush=True)

    def measure(self, cases: Iterable[Case], measured: Callable[..., Case]) -> dict[str, Any]:
        """Measure the cases that are not there yet.

        Args: measured: from seconds=, how long to time for, and a case's fields, to its figures.
        Returns: the result; "complete" says whether it has all rows but those that lack memory.
        """
        cases = list(cases)
        todo = [case for case in cases if not self._has(case)]
        self.say(f"{len(todo)} rows to measure, {len(cases) - len(todo)} are there already")
        budget = Budget(self._options.budget, len(todo), self._options.seconds, self._now)
        table = Table(self._columns, self._options)
        index = len(self._result["runs"]) - 1
        left = 0
        for case in todo:
            seconds = budget.share()
            if seconds is None:
                left += 1
                self._skip(case, "no time was left")
                continue
            try:
                figures = measured(seconds=seconds, **case)
            except torch.OutOfMemoryError as error:
                self._skip(case, f"out of memory: {str(error).splitlines()[0]}")
                self.say(f"not measured: {case}: out of memory")
                torch.cuda.empty_cache()
                continue
            table.add({**case, **figures, "run": index})
            self._result["rows"].append(table.rows[-1])
            self._write(complete=False)
        if left:
            self.say(f"{left} of {len(cases)} rows are left: run it again with --resume")
        self._write(complete=not left)
        return self._result

    def _has(self, case: Case) -> bool:
        return any(case.items() <= row.items() for row in self._result["rows"])

    def _skip(self, case: Case, why: str) -> None:
        self._result["skipped"].append({**case, "why": why})

    def add(self, **facts: Any) -> None:
        """Facts that follow from all rows."""
        self._result |= facts

    def _write(self, *, complete: bool) -> None:
        self._result["complete"] = complete
        if self.file is not None:
            write_json(self._result, self.file)

    def finish(self) -> None:
        """Print the result where JSON was asked for; ends the program if rows are left."""
        self._write(complete=self._result["complete"])
        if self._options.json:
            print(json.dumps(self._result, indent=1))
        if not self._result["complete"]:
            raise SystemExit(INCOMPLETE)
