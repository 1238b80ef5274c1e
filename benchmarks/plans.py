"""What quantizing LLaMA-3 8B, 70B and 405B takes, by `duqpp.job.plan`: no weights, no measurement.

python benchmarks/plans.py        writes results/plans.json, from which render.py makes the pages
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from harness import write_json

from duqpp.cli.plan import duration
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.job.plan import GPUS, JobPlan, plan_job
from duqpp.models.shapes import ShapedModel

FILE = Path(__file__).parent / "results" / "plans.json"
# hidden, intermediate, blocks, heads, heads of keys and values; a vocabulary of 128256.
MODELS = {
    "8B": (4096, 14336, 32, 32, 8),
    "70B": (8192, 28672, 80, 64, 8),
    "405B": (16384, 53248, 126, 128, 8),
}
JOBS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "duquant++": {"method": "duquant++"},
    "duquant++ --gptq": {"method": "duquant++", "gptq": True},
    "learned": {"method": "learned"},
    "duqpp": {"method": "duqpp"},
    "duqpp --refine blocks": {"method": "duqpp", "refine": "blocks"},
    "duqpp --refine distill": {"method": "duqpp", "refine": "distill"},
}
SHOWN = "duqpp"  # whose stages are shown
MACHINES = ("H100", "H200", "B200")
RANKS = (1, 8)
TOO_FEW = "more text"  # is needed


def config_of(name: str) -> Any:
    """The configuration of a LLaMA-3 model, in bfloat16."""
    from transformers import LlamaConfig

    hidden, intermediate, blocks, heads, kv_heads = MODELS[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=128256,
        dtype=torch.bfloat16,
    )


def gigabytes(size: float) -> str:
    """Bytes, for people."""
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e12:.3g} TB"


def tables(models: Iterable[str] = MODELS) -> dict[str, Any]:
    """What the pages show: a row for each model and job."""
    memory, seconds, disk, stages = [], [], [], []
    for name in models:
        model = ShapedModel(config_of(name), torch.bfloat16, QuantizeConfig().seq_len)
        for job, options in JOBS.items():
            config = QuantizeConfig(**options)
            plans = [
                planned(model, config, machine, ranks) for machine in MACHINES for ranks in RANKS
            ]
            one, eight = plans[: len(RANKS)]
            label = f"`{job}`"
            memory.append([name, label, gigabytes(one.device)])
            memory[-1].append(gigabytes(eight.device) if eight else TOO_FEW)
            memory[-1] += [gigabytes(one.activations), gigabytes(one.host)]
            seconds.append([name, label, *map(_time, plans)])
            disk.append([name, label, *map(gigabytes, (one.read, one.written, one.disk))])
            if job == SHOWN and name == "70B":
                stages = [
                    [
                        s.name,
                        gigabytes(s.device),
                        f"{s.operations / 1e12:.0f}",
                        f"{s.seconds:.0f} s",
                    ]
                    for s in one.stages
                ]
    machines = [f"{m}, {'one' if r == 1 else r}" for m in MACHINES for r in RANKS]
    return {
        "memory": {
            "columns": [
                "model",
                "options",
                "GPU, one",
                "GPU, each of 8",
                "of it activations",
                "host",
            ],
            "rows": memory,
        },
        "time": {"columns": ["model", "options", *machines], "rows": seconds},
        "disk": {"columns": ["model", "options", "read", "written", "needed"], "rows": disk},
        "stages": {"columns": ["stage", "GPU", "TFLOP", "time"], "rows": stages},
    }


def planned(model: ShapedModel, config: QuantizeConfig, gpu: str, ranks: int) -> JobPlan | None:
    """A plan; None where there is not enough text for so many ranks."""
    try:
        return plan_job(model, config, machine=GPUS[gpu], ranks=ranks)
    except InputError:
        return None


def _time(plan: JobPlan | None) -> str:
    if plan is None:
        return TOO_FEW
    return duration(plan.total_seconds) if plan.fits else "no room"


def result() -> dict[str, Any]:
    """The file's contents."""
    computed = (
        "from shapes, by duqpp.job.plan, for 16 sequences of 1024 tokens (72 with `--refine`), a "
        "disk of 1 GB/s, and 40 % of the dense peaks that the GPUs' maker states; no GPU has run it"
    )
    return {
        "bench": "record",
        "environment": {"machine": None, "computed": computed},
        "tables": tables(),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_json(result(), FILE)


if __name__ == "__main__":
    main()
