"""Channels that no calibration token excites keep their weights, in every method."""

from pathlib import Path

import pytest
import torch

import duqpp
from duqpp.methods import METHODS
from duqpp.models import stack
from tests import inputs
from tests.checkpoint import damage

GATE, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "down"))
# Of the three blocks that down_proj reads.
SILENT = {
    "a block": list(range(32)),
    "a channel of a block": [40],
    "half of a block": list(range(64, 96, 2)),
}


@pytest.fixture(scope="module")
def model(make_tiny, tmp_path_factory) -> Path:
    """A tiny model whose first MLP has closed gates."""
    tiny = make_tiny("llama", num_hidden_layers=1)
    folder = damage.copy_of(tiny, tmp_path_factory.mktemp("silent") / "model")

    def close(tensors: damage.Tensors) -> None:
        for channels in SILENT.values():
            tensors[GATE][channels] = 0.0  # silu(0) is 0

    damage.edit_tensors(folder, GATE, close)
    return folder


@pytest.fixture(autouse=True)
def many_batches(monkeypatch):
    """Few tokens each: what is trained is trained for many steps."""
    monkeypatch.setattr(stack, "TOKENS_PER_BATCH", 96)


def lost(model: Path, out: Path, sequences: int = 16, **options) -> dict[str, float]:
    """The relative error of silent channels' weights after a quantization."""
    tokens = torch.randint(0, 300, (sequences, 48), generator=inputs.generator(1))
    config = duqpp.QuantizeConfig(**options)
    duqpp.quantize_model(str(model), out, config, calibration=tokens)
    made = duqpp.from_pretrained(out).model.layers[0].mlp.down_proj.float_weight()
    exact = damage.get_tensor(model, DOWN)
    return {
        name: float((made - exact)[:, columns].norm() / exact[:, columns].norm())
        for name, columns in SILENT.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        *({"method": method} for method in METHODS),
        {"method": "rtn", "smooth_alpha": 0.5, "hessian": "quantized"},
        {"method": "hadamard", "rotation": "per-block", "block_order": "channels"},
        {"method": "duquant++", "rotation": "per-block", "hessian": "quantized"},
        {"method": "duqpp", "hessian": "float", "drift": 1.0},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_gptq_costs_silent_channels_no_more_than_rounding_to_nearest(options, model, tmp_path):
    options = {"max_steps": 8} | options
    plain = {k: v for k, v in options.items() if k not in ("hessian", "drift", "block_order")}
    nearest = lost(model, tmp_path / "nearest", gptq=False, **plain)
    found = lost(model, tmp_path / "gptq", gptq=True, **options)
    for name, error in nearest.items():
        assert error < 0.2, f"{name}: no basis gives it up"
        assert found[name] < 1.1 * error, name


def test_training_keeps_silent_channels(model, tmp_path):
    """Adam moves every weight of a rotated block, also along directions without a gradient."""
    found = lost(model, tmp_path / "out", 256, method="duqpp", samples=8, refine="blocks")
    assert max(found.values()) < 0.2
