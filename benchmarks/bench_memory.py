"""Peak memory of quantizations of small random models, beside what `duqpp.job.plan` says.

python benchmarks/bench_memory.py --out benchmarks/results/memory.json

Each job is a process of its own, in which a small one has loaded what there is to load, and in
which freed memory goes back to the system at once: its peak is then that of the tensors.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_quantize
from harness import Table, parser, report, start

from duqpp.config import QuantizeConfig
from duqpp.job.plan import GPUS, plan_job, shaped
from duqpp.models.source import read_config

COLUMNS = {"h x f": "s", "options": "s", "measured MB": ".0f", "planned MB": ".0f", "ratio": ".2f"}
JOBS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "duquant++": {"method": "duquant++", "max_steps": 8},
    "duquant++ --gptq": {"method": "duquant++", "gptq": True, "max_steps": 8},
    "duqpp": {"method": "duqpp"},
    "duqpp --refine blocks": {"method": "duqpp", "refine": "blocks", "refine_samples": 8},
    "duqpp --refine distill": {"method": "duqpp", "refine": "distill", "refine_samples": 8},
}
SMALL = (128, 256)  # of the job that comes first
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ALLOCATOR["MALLOC_TOP_PAD_"] = "0"


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--widths", nargs="+", default=["512x1792", "1024x3584"])
    options.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--seq-len", type=int, default=1024)
    options, _ = start(options, arguments)
    table = Table(COLUMNS, options)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        bench_quantize.save_model(small, *SMALL, options.seed)
        for width in options.widths:
            hidden, intermediate = map(int, width.split("x"))
            model = Path(folder) / width
            bench_quantize.save_model(model, hidden, intermediate, options.seed)
            for job in options.jobs:
                config = {"samples": options.samples, "seq_len": options.seq_len, **JOBS[job]}
                peak = measured(small, model, Path(folder) / f"{width}-{len(table.rows)}", config)
                plan = planned(model, config)
                figures = {
                    "measured MB": peak / 1e6,
                    "planned MB": plan / 1e6,
                    "ratio": peak / plan,
                }
                table.add({"h x f": width, "options": job, **figures})
    report(table.rows, options)


def planned(model: Path, options: dict[str, Any]) -> float:
    """Bytes of tensors by the plan, on a CPU."""
    cpu = replace(GPUS["H100"], name="cpu", memory=None)
    config = QuantizeConfig(**options)
    return plan_job(shaped(read_config(str(model)), config), config, machine=cpu).tensors


JOB = """
import ctypes, gc, json, sys
from duqpp import QuantizeConfig, quantize_model
from duqpp.models.source import fingerprint, open_source
def memory():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return [int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssFile")]
small, model, out, options = *sys.argv[1:4], json.loads(sys.argv[4])
quantize_model(small, out + "-small", QuantizeConfig(**options), device="cpu")
source = open_source(model)
fingerprint(source)  # its pages are mapped from here on
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
_, before, mapped = memory()
quantize_model(source, out, QuantizeConfig(**options), device="cpu")
peak, _, still_mapped = memory()
print(json.dumps(peak - before - (still_mapped - mapped)))
"""


def measured(small: Path, model: Path, out: Path, options: dict[str, Any]) -> int:
    """Bytes of memory at the peak of a job, beyond what there was before it."""
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(small), str(model), str(out), json.dumps(options)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **ALLOCATOR},
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
