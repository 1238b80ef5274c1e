"""Small quantized checkpoints that the tests of integrations share."""

from pathlib import Path

import pytest
import torch

import duqpp


@pytest.fixture(scope="session")
def hadamard(make_tiny, tmp_path_factory) -> Path:
    """A checkpoint of a tiny Qwen2 (with biases), by a method that reads no activations."""
    out = tmp_path_factory.mktemp("hadamard") / "out"
    duqpp.quantize_model(str(make_tiny("qwen2")), out, duqpp.QuantizeConfig(method="hadamard"))
    return out


@pytest.fixture(scope="session")
def permuted(make_tiny, tmp_path_factory) -> Path:
    """A checkpoint with two rotations per block and a permutation."""
    out = tmp_path_factory.mktemp("permuted") / "out"
    tokens = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
    config = duqpp.QuantizeConfig(method="duquant", rotation="per-block", max_steps=2)
    duqpp.quantize_model(str(make_tiny("qwen2")), out, config, calibration=tokens)
    return out
