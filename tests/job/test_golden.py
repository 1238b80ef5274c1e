"""Checkpoints of today against bytes of yesterday, on every machine.

tests/golden/checkpoints.json holds what duqpp 0.1.0 wrote for a tiny model whose weights are small
integers times powers of two. Rounding them, and rounding their folds by a Hadamard matrix, decides
no case by the last bits of a sum: the files are the same whatever the CPU and its threads. Only a
change of the format, with a new `format_version`, may change them.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import duqpp
from duqpp.config import QuantizeConfig
from tests import decoder
from tests.checkpoint import damage

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "checkpoints.json").read_text())
# By name: the largest integer among the weights, and the options. Without calibration.
CASES = {
    "rtn": (13, {"method": "rtn"}),
    "rtn, ceil and floor": (
        13,
        {"method": "rtn", "weight_rule": "ceil", "activation_rule": "floor"},
    ),
    "rtn, linears left out": (13, {"method": "rtn", "skip": ("down_proj", "self_attn.q_proj")}),
    "hadamard": (5, {"method": "hadamard", "weight_rule": "even"}),
    "hadamard per block": (
        5,
        {"method": "hadamard", "weight_rule": "even", "rotation": "per-block"},
    ),
}


def weights(rows: int, columns: int, most: int, seed: int) -> torch.Tensor:
    """Integers in [-most, most], each block of 32 times a power of two: float32 [rows, columns].

    The sum of each block's integers is odd, so that no sum of them with any signs is 0. Up to 5,
    such sums end at 160: divided by 181 (the Hadamard matrix in bfloat16 has 181 / 1024 in all
    places), none is a multiple of a power of two, where roundings change.
    """
    n, k = seed + torch.arange(rows)[:, None], torch.arange(columns)[None]
    integers = ((37 * n + 101 * k + 7 * n * k + k * k) % (2 * most + 1) - most).view(rows, -1, 32)
    integers[..., 0] = 0
    integers[..., 0] = 1 - integers.sum(-1) % 2
    power = (n + 3 * torch.arange(columns // 32)) % 7 - 5
    return (integers * 2.0 ** power[..., None]).view(rows, columns).float()


def exact_model(tiny: Path, folder: Path, most: int) -> Path:
    """A copy of a tiny model, in one file, with such weights, and other ones that are exact."""
    damage.copy_of(tiny, folder)

    def fill(tensors: damage.Tensors) -> None:
        for seed, (name, tensor) in enumerate(sorted(tensors.items())):
            if tensor.dim() == 2:
                tensors[name] = weights(*tensor.shape, most, seed)
            else:
                tensors[name] = 1 + (torch.arange(tensor.numel()) + seed) % 8 / 8

    damage.edit_tensors(folder, "model.norm.weight", fill)
    return folder


def described(folder: Path) -> dict:
    """What must stay: the files of weights, byte by byte; and where something changed, what."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    provenance = quantization.pop("provenance")
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {}
    for shard in shards:
        entries, metadata, _ = decoder.read_shard(shard)
        checksums = json.loads(metadata["duqpp.crc32"])
        for name, entry in entries.items():
            tensors[name] = [entry["dtype"], entry["shape"], checksums[name]]
    return {
        "quantization_config": quantization,
        "provenance": sorted(provenance),
        "tensors": tensors,
        "sha256": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in [*shards, folder / "model.safetensors.index.json"]
        },
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_what_it_was(name, threads, make_tiny, tmp_path):
    most, options = CASES[name]
    model = exact_model(make_tiny("llama", num_hidden_layers=1), tmp_path / "model", most)
    torch.set_num_threads(threads)
    try:
        duqpp.quantize_model(str(model), tmp_path / "out", QuantizeConfig(**options))
    finally:
        torch.set_num_threads(1)
    assert described(tmp_path / "out") == GOLDEN[name]
