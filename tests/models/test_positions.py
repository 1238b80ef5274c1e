"""How long sequences may be, and that every command asks before it begins."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.evaluation.compare import Plan, compare
from duqpp.evaluation.perplexity import perplexity
from duqpp.models.positions import check_seq_len, positions
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from duqpp.tools.inspection import inspect_model
from tests.checkpoint import damage

ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("own", "scaling", "expected"),
    [
        (4096, None, 4096),
        (4096, {"type": "linear", "factor": 4.0}, 16384),  # vicuna-7b-v1.5-16k
        (4096, {"type": "dynamic", "factor": 2.0}, None),
        # Qwen2.5, whose positions are those before; and a model whose positions are those after.
        (32768, {"type": "yarn", "factor": 4.0, ORIGINAL: 32768}, 131072),
        (
            131072,
            {"type": "yarn", "factor": 4.0, ORIGINAL: 32768},
            131072,
        ),
        (32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        (
            131072,  # Llama 3.1
            {"rope_type": "llama3", "factor": 8.0, ORIGINAL: 8192} | LLAMA3,
            131072,
        ),
        (131072, {"type": "longrope", ORIGINAL: 4096} | FACTORS, 131072),
    ],
)
def test_positions(own, scaling, expected, tiny_llama, tmp_path):
    values = json.loads((tiny_llama / "config.json").read_text()) | {"max_position_embeddings": own}
    if scaling:
        del values["rope_parameters"]
        values |= {"rope_scaling": scaling, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path)
    assert positions(config) == expected
    for limit in [expected] if expected else []:
        check_seq_len(config, limit, "windows")
        with pytest.raises(InputError, match=f"windows of {limit + 1} tokens exceed the model's"):
            check_seq_len(config, limit + 1, "windows")


def test_positions_of_other_configurations():
    assert positions(AutoConfig.for_model("bloom")) is None
    assert positions(AutoConfig.for_model("gpt2")) == 1024
    assert positions(AutoConfig.for_model("gemma3_text")) == 131072  # rope by kind of layer


@pytest.fixture
def short(make_tiny, tmp_path):
    """A model of 64 positions."""
    folder = damage.copy_of(make_tiny("llama"), tmp_path / "model")
    damage.edit_json(folder / "config.json", lambda c: c.update(max_position_embeddings=64))
    return folder


def test_a_limit_of_calibration_is_one_of_evaluation(short, tmp_path):
    source, tokens = open_source(str(short)), torch.randint(0, 300, (2, 65))
    config = QuantizeConfig(samples=2, seq_len=65)
    message = "calibration sequences of 65 tokens exceed the model's 64 positions: lower `seq_len`"
    for calibration in ("builtin", tokens):
        with pytest.raises(InputError, match=message):
            duqpp.quantize_model(source, tmp_path / "out", config, calibration=calibration)
    with pytest.raises(InputError, match=message):
        inspect_model(str(short), config)
    with pytest.raises(InputError, match=message):
        compare(source, Plan(methods={"duquant++": config}, seq_len=64))
    with pytest.raises(InputError, match=message.replace("calibration sequences", "windows")):
        compare(source, Plan(methods={"rtn": QuantizeConfig(method="rtn", seq_len=65)}, seq_len=65))
    rtn = QuantizeConfig(method="rtn", seq_len=65)  # reads no text
    duqpp.quantize_model(source, tmp_path / "out", rtn)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_sequences_that_rope_scaling_makes_room_for(kind, short, tmp_path):
    """Blocks one by one give what transformers gives, and each command takes them."""
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    damage.edit_json(short / "config.json", lambda c: c.update(rope_parameters=rope))
    tokens = torch.randint(0, 300, (2, 100))
    plain = AutoModelForCausalLM.from_pretrained(short).eval()
    stack = DecoderStack(open_source(str(short)))
    with torch.no_grad():
        inputs = stack.first_inputs(tokens)
        for index in range(len(stack)):
            inputs.advance(stack.block(index), index)
        found, expected = stack.head()(torch.cat(inputs.hidden)), plain(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    config = QuantizeConfig(max_steps=2)
    duqpp.quantize_model(str(short), tmp_path / "out", config, calibration=tokens)
    model = duqpp.from_pretrained(tmp_path / "out")
    assert perplexity(model, tokens.flatten(), seq_len=100).windows == 2
    inspect_model(str(short), QuantizeConfig(samples=2, seq_len=100, max_steps=2), layers=1)
