"""How many codes differ when a job is shared among ranks, for random models of two decoder blocks.

python benchmarks/bench_ranks.py --widths 256x896 --ranks 1 2 4

Each job is started by torchrun, on the CPU; "codes differ" counts the 4-bit codes of all linears
that are not those of the first number of ranks.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_quantize import save_model
from harness import Table, parser, report, start
from safetensors.torch import load_file

COLUMNS = {"options": "s", "hidden": "d", "intermediate": "d", "tokens": "d", "ranks": "d"}
COLUMNS |= {"codes": "d", "codes differ": "d"}
METHODS = (
    "--method hadamard",
    "--method duquant++ --gptq",
    "--method duquant++ --gptq --hessian quantized",
    "--method duqpp",
    "--method learned",
    "--method duqpp --refine blocks --refine-samples 64",
    "--method duqpp --refine distill --refine-samples 64",
)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--widths", nargs="+", default=["256x896"], help="hidden x intermediate")
    options.add_argument("--methods", nargs="+", default=METHODS, help="options of duqpp quantize")
    options.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--seq-len", type=int, default=256)
    options, _ = start(options, arguments)
    table = Table(COLUMNS, options)
    with tempfile.TemporaryDirectory() as folder:
        for width in options.widths:
            hidden, intermediate = map(int, width.split("x"))
            model = Path(folder) / width
            save_model(model, hidden, intermediate, options.seed)
            for method in options.methods:
                expected = None
                for ranks in options.ranks:
                    found = codes(model, model / f"out-{ranks} {method}", ranks, method, options)
                    expected = found if expected is None else expected
                    table.add(
                        {
                            "options": method,
                            "hidden": hidden,
                            "intermediate": intermediate,
                            "tokens": options.samples * options.seq_len,
                            "ranks": ranks,
                            "codes": len(found),
                            "codes differ": int((found != expected).sum()),
                        }
                    )
    report(table.rows, options, bench="ranks")


def codes(model: Path, out: Path, ranks: int, method: str, options) -> torch.Tensor:
    """Every 4-bit code of a quantization on so many ranks: uint8 [codes]."""
    arguments = ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "duqpp", "quantize", str(model), str(out)]
    subprocess.run(
        [*command, *arguments, *shlex.split(method), "--device", "cpu"],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )
    shards = [load_file(shard) for shard in sorted(out.glob("*.safetensors"))]
    packed = [
        tensor.flatten()
        for tensors in shards
        for name, tensor in sorted(tensors.items())
        if name.endswith("weight_packed")
    ]
    two = torch.cat(packed)
    return torch.stack((two & 15, two >> 4), 1).flatten()


if __name__ == "__main__":
    main()
