"""`make gpu`: everything that only a GPU can show, in parts that resume.

python benchmarks/gpu.py --parts tests bench-gemm

Each part is one command, stopped after --limit seconds. A part that has passed on this machine at
this commit is not run again without --force, and a benchmark whose time ran out goes on where it
was. What was skipped, and why, is said at the end and in LOGS/PART.json. --smoke runs the
benchmarks small on the CPU instead: it shows that they work, and measures nothing.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import INCOMPLETE, RESULTS, device_slug, environment, why_no_gpu, write_json

ROOT = Path(__file__).parents[1]
LIMIT = 540  # seconds of a part
RESERVE = 90  # of them that a benchmark leaves for its start, its peaks and its last row

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
TIMED_OUT, LEFT = "timed out", "incomplete"


@dataclass(frozen=True)
class Outcome:
    """How a part ended. why: what it skipped, or what is wrong, a line each."""

    part: str
    state: str
    seconds: float
    why: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    machine: dict = field(default_factory=dict)


def parts(options: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each part, in order."""
    python, here = sys.executable, "benchmarks"
    pytest = [python, "-m", "pytest", "-rs", "tests/ops"]
    bench = ["--out", str(options.results), "--budget", str(max(1, options.limit - RESERVE))]
    bench += [] if options.force else ["--resume"]
    bench += ["--commit", options.commit] if options.commit else []
    small: dict[str, list[str]] = {"rotate": [], "gemm": [], "layer": [], "routes": []}
    small |= {"quantize": []}
    if options.smoke:
        bench += ["--device", "cpu", "--seconds", "0.01", "--cache", "cold", "warm"]
        tiny = ["--models", "tiny"]
        small = {
            "rotate": ["--rows", "1", "--columns", "64"],
            "gemm": [*tiny, "--rows", "1", "4", "--linears", "o", "--fp8"],
            "layer": [*tiny, "--decode", "2", "--prefill", "32", "--context", "32"],
            "routes": [*tiny, "--rows", "1"],
            "quantize": [*tiny, "--compared", "tiny", "--trained", "", "--samples", "3"],
        }
        small["quantize"] += ["--seq-len", "64"]
    else:
        bench += ["--device", "cuda"]
        small["rotate"] = ["--rows", *(str(2**i) for i in range(15))]
        small["rotate"] += ["--columns", "4096", "14336", "8192", "28672"]
    routes = [word for route in options.route for word in ("--route", route)]
    render = ["--plots", str(options.plots), *(["--pages"] if options.smoke else [])]
    found = sorted(options.results.glob(f"{_slug(options)}_*.json"))
    files = [str(f) for f in found if f.name != f"{_slug(options)}_quantize.json"]  # has no plot
    return {
        "tests": [*pytest, "-k", "not sanitizer"],
        "memcheck": [*pytest, "-k", "sanitizer and memcheck"],
        "racecheck": [*pytest, "-k", "sanitizer and racecheck"],
        "selfcheck": [
            *(python, "-m", "duqpp", "selfcheck", "--report"),
            str(options.logs / "selfcheck-report.json"),
        ],
        "bench-rotate": [python, f"{here}/bench_rotate_quantize.py", *bench, *small["rotate"]],
        "bench-gemm": [python, f"{here}/bench_mxfp4_gemm.py", *bench, *small["gemm"]],
        "bench-layer": [python, f"{here}/bench_decoder_layer.py", *bench, *small["layer"]],
        "bench-routes": [python, f"{here}/bench_gemm_routes.py", *bench, *small["routes"], *routes],
        "quantize": [python, f"{here}/bench_quantize_device.py", *bench, *small["quantize"]],
        "render": [python, f"{here}/render.py", *files, *render] if files else [],
    }


NAMES = ("tests", "memcheck", "racecheck", "selfcheck")
NAMES += ("bench-rotate", "bench-gemm", "bench-layer", "bench-routes", "quantize", "render")
ALWAYS = ("render",)  # takes seconds, and depends on the other parts


def _slug(options: argparse.Namespace) -> str:
    return "cpu" if options.smoke else device_slug("cuda")


def follow(
    command: list[str], limit: float, say: Callable[[str], None]
) -> tuple[int | None, list[str]]:
    """Run a command, passing its lines on as they come.

    Returns: its exit status, None where it was stopped after `limit` seconds; and its lines.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # so that what it has started is stopped with it
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            say(lines[-1])
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # interrupted
            os.killpg(process.pid, signal.SIGKILL)
    return (None if stopped.is_set() else status), lines


def judge(status: int | None, lines: list[str]) -> tuple[str, tuple[str, ...]]:
    """State of a part, and why, from how its command ended and what it printed."""
    skips = [line for line in lines if re.match(r"(SKIPPED \[|skipped: |not measured: )", line)]
    if status is None:
        return TIMED_OUT, (f"after: {lines[-1] if lines else 'nothing'}",)
    if status == INCOMPLETE:
        return LEFT, tuple(line for line in lines if "rows are left" in line)
    if status:
        wrong = [line for line in lines if re.match(r"(FAILED|ERROR|[\w.]*Error)", line)]
        return FAILED, tuple(wrong[:5] or lines[-1:])
    last = lines[-1] if lines else ""
    none = last.startswith("skipped: ") or ("skipped" in last and "passed" not in last)
    return (SKIPPED if none else PASSED), tuple(skips)


def run(part: str, options: argparse.Namespace, machine: dict) -> Outcome:
    """Run a part, or say why it is not run."""
    file = options.logs / f"{part}.json"
    command = parts(options)[part]
    if not command:
        return Outcome(part, SKIPPED, 0, (f"{options.results} has no results of this device",))
    if part not in ALWAYS and not options.force and file.exists():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        same = {"state": PASSED, "machine": machine, "command": command}
        if all(earlier[name] == value for name, value in same.items()):
            why = (f"passed already ({file}); --force runs it again", *earlier["why"])
            return Outcome(part, PASSED, earlier["seconds"], why)
    print(f"=== {part}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    status, lines = follow(command, options.limit, lambda line: print(line, flush=True))
    state, why = judge(status, lines)
    outcome = Outcome(part, state, time.monotonic() - start, why, tuple(command), machine)
    write_json(asdict(outcome), file)
    (options.logs / f"{part}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return outcome


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--results", type=Path, help="folder of the JSON: benchmarks/results")
    parser.add_argument("--plots", type=Path, help="folder of the plots: docs")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a part")
    parser.add_argument("--force", action="store_true", help="run what has passed already, too")
    parser.add_argument("--smoke", action="store_true", help="small, and on the CPU")
    parser.add_argument("--commit", help="of the sources, where git cannot say")
    parser.add_argument("--route", action="append", default=[], help="of bench_gemm_routes.py")
    options = parser.parse_args(arguments)
    if not options.smoke and (why := why_no_gpu()):
        for part in options.parts:
            print(f"{part}: skipped: {why}")
        return 0
    # What is measured small says nothing, and must not replace what is committed.
    options.results = options.results or (options.logs / "smoke" if options.smoke else RESULTS)
    options.plots = options.plots or (options.results if options.smoke else ROOT / "docs")
    for name in ("logs", "results", "plots"):
        folder = getattr(options, name).resolve()  # commands run in ROOT, wherever this does
        folder.mkdir(parents=True, exist_ok=True)
        setattr(options, name, folder)
    about = environment(options.commit)
    machine = {name: about[name] for name in ("gpus", "driver", "versions", "commit")}
    print(f"on {machine}; compiled for {about['library'].get('cuda_architectures') or 'the CPU'}")
    outcomes = [run(part, options, machine) for part in options.parts]
    print("=== summary")
    for outcome in outcomes:
        print(f"{outcome.part}: {outcome.state}, {outcome.seconds:.0f} s")
        for line in outcome.why:
            print(f"    {line}")
    return int(any(outcome.state not in (PASSED, SKIPPED) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
