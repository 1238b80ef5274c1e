"""Time and peak memory of `duqpp quantize`; of a given model, the time of each stage.

python benchmarks/bench_quantize.py --widths 1024x3584 2048x7168 --methods duquant++ duqpp
python benchmarks/bench_quantize.py --model MODEL --blocks 4 --sources before=../old after=.

Random models have two decoder blocks, in shapes of LLaMA-3 8B, 4096x14336, scaled down: what grows
with them is what a large model costs. Each is written as bfloat16 safetensors.

Of a model that is given, sources of duqpp in several folders take turns, so that a busy machine is
as busy for each; what is counted is processor time. Every job is a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, Case, Table, parser, report, start

COLUMNS = {"method": "s", "hidden": "d", "intermediate": "d", "tokens": "d"}
COLUMNS |= {"seconds/block": ".1f", "CPU s/block": ".1f", "peak GB": ".2f", "model GB": ".2f"}
STAGE_COLUMNS = {"method": "s", "sources": "s", "CPU s": ".1f", "CPU s/block": ".2f"}
BLOCKS, VOCABULARY = 2, 2048


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--widths", nargs="+", default=["1024x3584"], help="hidden x intermediate")
    options.add_argument("--methods", nargs="+", default=["duquant++", "duqpp"])
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--seq-len", type=int, default=1024)
    options.add_argument("--model", help="measure the stages of this model instead")
    options.add_argument("--blocks", type=int, default=4, help="only its first; default: 4")
    options.add_argument(
        "--sources", nargs="+", default=[f"here={ROOT}"], metavar="NAME=FOLDER", help="of duqpp"
    )
    options.add_argument("--rounds", type=int, default=2, help="turns; the faster one counts")
    options, _ = start(options, arguments)
    if options.model:
        rows = stage_rows(options)
        report(rows, options, bench="quantize_stages", model=Path(options.model).name)
        return
    table = Table(COLUMNS, options)
    with tempfile.TemporaryDirectory() as folder:
        for index, width in enumerate(options.widths):
            hidden, intermediate = map(int, width.split("x"))
            model = Path(folder) / f"{index}"
            save_model(model, hidden, intermediate, options.seed)
            for method in options.methods:
                out = Path(folder) / f"{index}-{method}"
                table.add(
                    {
                        "method": method,
                        "hidden": hidden,
                        "intermediate": intermediate,
                        "tokens": options.samples * options.seq_len,
                        "model GB": (model / "model.safetensors").stat().st_size / 1e9,
                        **measured(model, out, method, options),
                    }
                )
    report(table.rows, options)


def save_model(folder: Path, hidden: int, intermediate: int, seed: int) -> None:
    """A random Llama of these widths, with heads of 128 and a byte's worth of tokenizer."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(config_of(hidden, intermediate)).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)


def config_of(hidden: int, intermediate: int) -> Any:
    """The configuration of `save_model`'s."""
    from transformers import LlamaConfig

    heads = hidden // 128
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=BLOCKS,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of a byte a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


JOB = """
import json, resource, sys, time
from duqpp import QuantizeConfig, quantize_model
model, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
began, cpu = time.perf_counter(), time.process_time()
quantize_model(model, out, QuantizeConfig(**options))
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu, peak]))
"""


def measured(model: Path, out: Path, method: str, options) -> dict[str, float]:
    """Time of a block, its share of opening and saving the model included; and peak memory."""
    config = {"method": method, "samples": options.samples, "seq_len": options.seq_len}
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(model), str(out), json.dumps(config)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )
    seconds, cpu, peak = json.loads(done.stdout.splitlines()[-1])
    return {"seconds/block": seconds / BLOCKS, "CPU s/block": cpu / BLOCKS, "peak GB": peak / 1e9}


STAGES = """
import json, sys, time
import duqpp.placement.stages as stages
from duqpp import quantize_model
from duqpp.cli.options import parse_methods
from duqpp.models.source import open_source
model, out, method, blocks = sys.argv[1:]
stages._now = time.process_time
began = time.process_time()
source = open_source(model)
opened = time.process_time() - began
source.config.num_hidden_layers = int(blocks)
config = parse_methods([method])[method]
profile = quantize_model(source, out, config, device="cpu", profile=True).profile
print(json.dumps({"opened": opened, **profile}))
"""


def stage_rows(options) -> list[Case]:
    """Processor time by stage, for each method and each folder of sources: the fastest round."""
    table, fastest = Table(STAGE_COLUMNS, options), {}
    sources = dict(source.split("=", 1) for source in options.sources)
    for _ in range(options.rounds):
        for method in options.methods:
            for name, folder in sources.items():
                profile = profiled(Path(folder).resolve(), method, options)
                row = stage_row(method, name, profile)
                table.add(row)
                key = (method, name)
                if key not in fastest or row["CPU s"] < fastest[key]["CPU s"]:
                    fastest[key] = row
    return list(fastest.values())


def profiled(sources: Path, method: str, options) -> dict[str, Any]:
    """The profile of one job by these sources."""
    with tempfile.TemporaryDirectory() as folder:
        words = [options.model, f"{folder}/out", method, str(options.blocks)]
        path = os.pathsep.join([str(sources), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-P", "-c", STAGES, *words],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(options.threads)},
        )
    return json.loads(done.stdout.splitlines()[-1])


def stage_row(method: str, sources: str, profile: dict[str, Any]) -> Case:
    """A row from a profile: seconds in all, and of a block in the mean."""
    blocks = [block["by_stage"] for block in profile["blocks"]]
    names = {name for block in blocks for name in block}
    means = {n: sum(block.get(n, 0.0) for block in blocks) / len(blocks) for n in names}
    return {
        "method": method,
        "sources": sources,
        "blocks": len(blocks),
        "opened": profile["opened"],
        "CPU s": profile["opened"] + profile["seconds"],
        "CPU s/block": sum(means.values()),
        "by_stage": dict(sorted(means.items(), key=lambda item: -item[1])),
    }


if __name__ == "__main__":
    main()
