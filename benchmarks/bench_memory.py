"""Peak memory of quantizations of small random models, beside what `duqpp.job.plan` says.

python benchmarks/bench_memory.py --ranks 1 2 --out benchmarks/results/memory.json

Each job is a process of its own, in which a small one has loaded what there is to load, and in
which freed memory goes back to the system at once: its peak is then that of the tensors. Training
of the whole model is measured on several ranks, too, started by torchrun: of the rank that takes
most. `--measured FILE` measures nothing, and sets the plans of today beside what that file has.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_quantize
from harness import RESULTS, Table, parser, report, start, write_json

from duqpp.config import QuantizeConfig
from duqpp.job.plan import GPUS, plan_job, shaped

COLUMNS = {"h x f": "s", "options": "s", "ranks": "d"}
COLUMNS |= {"measured MB": ".0f", "planned MB": ".0f", "ratio": ".2f"}
JOBS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "duquant++": {"method": "duquant++", "max_steps": 8},
    "duquant++ --gptq": {"method": "duquant++", "gptq": True, "max_steps": 8},
    "duqpp": {"method": "duqpp"},
    "duqpp --refine blocks": {"method": "duqpp", "refine": "blocks", "refine_samples": 8},
    "duqpp --refine distill": {"method": "duqpp", "refine": "distill", "refine_samples": 8},
}
SHARED = ("duqpp --refine distill",)  # of which ranks have parts
SMALL = (128, 256)  # of the job that comes first
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ALLOCATOR["MALLOC_TOP_PAD_"] = "0"


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--widths", nargs="+", default=["512x1792", "1024x3584"])
    options.add_argument("--ranks", type=int, nargs="+", default=[1])
    options.add_argument(
        "--measured",
        type=Path,
        help=f"a file that this has written, such as {RESULTS.name}/memory.json",
    )
    options.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--seq-len", type=int, default=1024)
    options, _ = start(options, arguments)
    table = Table(COLUMNS, options)
    if options.measured:
        earlier = json.loads(options.measured.read_text(encoding="utf-8"))
        for row in earlier["rows"]:
            table.add(beside_plan(row))
        write_json({**earlier, "rows": table.rows}, options.out or options.measured)
        return
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        bench_quantize.save_model(small, *SMALL, options.seed)
        for width in options.widths:
            hidden, intermediate = map(int, width.split("x"))
            model = Path(folder) / width
            bench_quantize.save_model(model, hidden, intermediate, options.seed)
            for job, ranks in itertools.product(options.jobs, options.ranks):
                if ranks > 1 and job not in SHARED:
                    continue
                config = {"samples": options.samples, "seq_len": options.seq_len, **JOBS[job]}
                out = Path(folder) / f"{width}-{len(table.rows)}"
                row = {"h x f": width, "options": job, "config": config, "ranks": ranks}
                peak = measured(small, model, out, config, ranks)
                table.add(beside_plan({**row, "measured MB": peak / 1e6}))
    report(table.rows, options, bench="memory")


def beside_plan(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what the plan says, and the ratio of what was measured to that."""
    model = bench_quantize.config_of(*map(int, row["h x f"].split("x")))
    plan = planned(model, row["config"], row["ranks"]) / 1e6
    return {**row, "planned MB": plan, "ratio": row["measured MB"] / plan}


def planned(model: Any, options: dict[str, Any], ranks: int = 1) -> float:
    """Bytes of tensors of one rank by the plan, on a CPU. Args: model: its configuration."""
    cpu = replace(GPUS["H100"], name="cpu", memory=None)
    config = QuantizeConfig(**options)
    return plan_job(shaped(model, config), config, machine=cpu, ranks=ranks).tensors


JOB = """
import ctypes, gc, json, sys, torch
from duqpp import QuantizeConfig, quantize_model
from duqpp.models.source import fingerprint, open_source
from duqpp.placement.ranks import joined
def memory():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return [int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssFile")]
small, model, out, options = *sys.argv[1:4], json.loads(sys.argv[4])
with joined(torch.device("cpu")) as ranks:
    more = {"device": "cpu", "ranks": ranks}
    quantize_model(small, out + "-small", QuantizeConfig(**options), **more)
    source = open_source(model)
    fingerprint(source)  # its pages are mapped from here on
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    _, before, mapped = memory()
    quantize_model(source, out, QuantizeConfig(**options), **more)
    peak, _, still_mapped = memory()
    peaks = ranks.all(peak - before - (still_mapped - mapped))
    if ranks.is_first:
        print(json.dumps(max(peaks)))
"""


def measured(small: Path, model: Path, out: Path, options: dict[str, Any], ranks: int = 1) -> int:
    """Bytes of memory at the peak of a job, of one rank, beyond what there was before it."""
    script = out.with_suffix(".py")
    script.write_text(JOB, encoding="utf-8")
    shared = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    python = [sys.executable, *(shared if ranks > 1 else [])]
    done = subprocess.run(
        [*python, str(script), str(small), str(model), str(out), json.dumps(options)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **ALLOCATOR},
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
