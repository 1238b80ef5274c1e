"""Time and peak memory of `duqpp quantize`, for random models of two decoder blocks.

python benchmarks/bench_quantize.py --widths 1024x3584 2048x7168 --methods duquant++ duqpp

Shapes are those of LLaMA-3 8B, 4096x14336, scaled down: what grows with them is what a large model
costs. Each model is written as bfloat16 safetensors, and each job is a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import Table, parser, report, start

COLUMNS = {"method": "s", "hidden": "d", "intermediate": "d", "tokens": "d"}
COLUMNS |= {"seconds/block": ".1f", "CPU s/block": ".1f", "peak GB": ".2f", "model GB": ".2f"}
BLOCKS, VOCABULARY = 2, 2048


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--widths", nargs="+", default=["1024x3584"], help="hidden x intermediate")
    options.add_argument("--methods", nargs="+", default=["duquant++", "duqpp"])
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--seq-len", type=int, default=1024)
    options, _ = start(options, arguments)
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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    heads = hidden // 128
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=BLOCKS,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
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


if __name__ == "__main__":
    main()
