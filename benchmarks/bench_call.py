"""Microseconds of a call of small linears on the CPU, where it is the host's work that takes time.

Sources of duqpp in several folders, each with its compiled library, take turns in one run:
python benchmarks/bench_call.py --sources before=../old after=.

A row has the time of a call of `MXFP4Linear`, that of `nn.Linear` in the same process and turn, and
how many times as long the first takes: the median, over turns, of the quotient. With linears 3, a
module hands one input to three of them, as attention does to q, k and v.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, Case, Table, parser, report, start
from timing import Timing
from torch import nn

COLUMNS = {
    "sources": "s",
    "linears": "d",
    "size": "d",
    "dtype": "s",
    "time_us": ".1f",
    "torch_us": ".1f",
    "times_torch": ".2f",
}
QUOTIENTS = ("times_torch", "times_torch_q25", "times_torch_q75")
CALLS = 50  # in a sample


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument(
        "--sources", nargs="+", default=[f"here={ROOT}"], metavar="NAME=FOLDER", help="of duqpp"
    )
    options.add_argument("--sizes", type=int, nargs="+", default=(64, 576), help="N and K")
    options, _ = start(options, arguments)
    sources = dict(source.split("=", 1) for source in options.sources)
    workers = {name: Worker(folder, options.threads) for name, folder in sources.items()}
    table = Table(COLUMNS, options)
    try:
        for linears in (1, 3):
            for size in options.sizes:
                for dtype in ("bfloat16", "float32"):
                    case = {"linears": linears, "size": size, "dtype": dtype}
                    for row in measured(workers, case, options.seconds):
                        table.add(row)
    finally:
        for worker in workers.values():
            worker.close()
    report(table.rows, options, bench="call")


def measured(workers: dict[str, "Worker"], case: Case, seconds: float) -> list[Case]:
    """A row for each worker: in turn, a sample of either linear from each, for `seconds` each."""
    samples: dict[str, list[list[float]]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.ask(case)
    end = time.perf_counter() + seconds * len(workers)
    while min(map(len, samples.values())) < 5 or time.perf_counter() < end:
        for name, worker in workers.items():
            samples[name].append(worker.ask("sample"))
    return [{"sources": name, **case, **figures(taken)} for name, taken in samples.items()]


def figures(samples: list[list[float]]) -> dict[str, float]:
    """Of samples, each the seconds of a call of MXFP4Linear and of nn.Linear."""
    ours, theirs = zip(*samples, strict=True)
    row = timing(ours).microseconds("time") | timing(theirs).microseconds("torch")
    quotients = timing([one / other for one, other in samples])
    return row | dict(zip(QUOTIENTS, (quotients.median, quotients.q25, quotients.q75), strict=True))


def timing(values: list[float]) -> Timing:
    q25, median, q75 = statistics.quantiles(values, n=4)
    return Timing(median, q25, q75, len(values))


class Worker:
    """A process that has imported the sources of one folder, and times what it is asked to."""

    def __init__(self, folder: str, threads: int) -> None:
        path = os.pathsep.join([str(Path(folder).resolve()), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import bench_call; bench_call.serve({threads})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
            cwd=folder,
        )

    def ask(self, question: Any) -> Any:
        """What it answers; an error of its own is on its standard error."""
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise SystemExit("bench_call: a worker has ended")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@torch.no_grad()
def serve(threads: int) -> None:
    """Answer `Worker.ask`: a case makes its calls, anything else is a sample of them."""
    torch.set_num_threads(threads)
    calls = []
    for line in sys.stdin:
        question = json.loads(line)
        if question != "sample":
            calls = modules(**question)
            for call in calls * CALLS:
                call()
        answer = [seconds_of(call) for call in calls] if question == "sample" else None
        print(json.dumps(answer), flush=True)


def seconds_of(call: Any) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS


class Siblings(nn.Module):
    """Linears that read one input."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x) for linear in self.linears]


def modules(linears: int, size: int, dtype: str) -> list[Any]:
    """Calls of MXFP4Linears and of nn.Linears on one token, of random weights."""
    from duqpp.nn import MXFP4Linear, share_input

    generator, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    x = torch.randn(1, 1, size, generator=generator).to(kind)
    ours = [quantized(MXFP4Linear, size, kind, generator) for _ in range(linears)]
    theirs = [nn.Linear(size, size, bias=False, dtype=kind) for _ in range(linears)]
    if linears == 1:
        return [lambda: ours[0](x), lambda: theirs[0](x)]
    owner, other = Siblings(ours), Siblings(theirs)
    share_input(owner, ours)
    return [lambda: owner(x), lambda: other(x)]


def quantized(kind: Any, size: int, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    from duqpp.format import ScaleRule
    from duqpp.rotation.basis import random_orthogonal

    linear = kind(size, size, bias=False, rule=ScaleRule.EVEN, rotation=(32, 32), dtype=dtype)
    codes, scales = linear.weight_packed.data, linear.weight_scale.data
    codes.random_(0, 256, generator=generator)
    scales.random_(118, 124, generator=generator)
    linear.rotation.data = random_orthogonal(32, generator).bfloat16().contiguous()
    linear.prepare()
    return linear


if __name__ == "__main__":
    main()
