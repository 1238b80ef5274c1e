"""A float16 model whose activations overflow, computed in float32 when that is asked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import duqpp
from duqpp.cli.main import main
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.evaluation.compare import Plan, compare
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from duqpp.tools.inspection import inspect_model
from tests.checkpoint import damage

UP = "model.layers.1.mlp.up_proj.weight"
TOKENS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
OPTIONS = {"samples": 2, "seq_len": 32, "max_steps": 2}


@pytest.fixture
def overflowing(make_tiny, tmp_path) -> Path:
    """A float16 model, whose up_proj gives more than 65504."""
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "model")

    def enlarge(tensors: damage.Tensors) -> None:
        tensors[UP] *= 6e4 / tensors[UP].abs().max()
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    damage.edit_tensors(folder, UP, enlarge)
    damage.edit_json(folder / "config.json", lambda c: c.update(dtype="float16"))
    return folder


@pytest.mark.parametrize("method", ["duquant++", "duqpp"])
def test_what_overflows_is_computed_in_float32(method, overflowing, tmp_path):
    source, out = open_source(str(overflowing)), tmp_path / "out"
    config = QuantizeConfig(method=method, **OPTIONS)
    with pytest.raises(InputError, match="65504; compute in `dtype=float32`"):
        duqpp.quantize_model(source, tmp_path / "failed", config, calibration=TOKENS)
    duqpp.quantize_model(source, out, replace(config, dtype="float32"), calibration=TOKENS)
    model = duqpp.from_pretrained(out)
    assert model.dtype == torch.float32
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert model(TOKENS).logits.isfinite().all()
    assert torch.equal(model.model.norm.weight, source.tensor("model.norm.weight").float())


def test_a_dtype_is_the_models_that_is_cast_before(overflowing, tmp_path):
    """The shards have the bytes of those of the model in float32."""
    cast = damage.copy_of(overflowing, tmp_path / "cast")
    damage.edit_tensors(
        cast, UP, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()})
    )
    damage.edit_json(cast / "config.json", lambda c: c.update(dtype="float32"))
    plain, asked = (QuantizeConfig(**OPTIONS, dtype=dtype) for dtype in (None, "float32"))
    duqpp.quantize_model(str(cast), tmp_path / "wanted", plain, calibration=TOKENS)
    duqpp.quantize_model(str(overflowing), tmp_path / "out", asked, calibration=TOKENS)
    for shard in (tmp_path / "wanted").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_inspect_and_compare_take_it(overflowing):
    config = QuantizeConfig(**OPTIONS, dtype="float32")
    assert len(inspect_model(str(overflowing), config).groups) == 8
    source = open_source(str(overflowing))
    found = compare(source, Plan(methods={"duquant++": config}, seq_len=32, windows=2))
    assert all(torch.tensor(row.headline.perplexity).isfinite() for row in found.rows)
    assert found.rows[1].headline.kl < 1


def test_stack_computes_in_it(tiny_llama):
    for dtype in ("bfloat16", "float16", None):
        stack = DecoderStack(open_source(str(tiny_llama)), QuantizeConfig(dtype=dtype).torch_dtype)
        assert stack.dtype == getattr(torch, dtype or "float32")


def test_command_line_names_its_option(overflowing, tmp_path, capsys):
    options = ["--samples", "2", "--seq-len", "32", "--max-steps", "2"]
    assert main(["quantize", str(overflowing), str(tmp_path / "out"), *options]) == 2
    assert "compute in --dtype float32" in capsys.readouterr().err
