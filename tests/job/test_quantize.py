"""quantize_model, end to end on tiny models: what is saved is what was computed, and how it is."""

import gc
import hashlib
import itertools
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duqpp
from duqpp.calibration.text import CalibrationText
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import ScaleRule, dequantize
from duqpp.job.blocks import BlockFolder
from duqpp.job.calibration import calibration_tokens
from duqpp.models.family import is_skipped
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from duqpp.nn import MXFP4Linear
from duqpp.rotation import BlockRotation, InputTransform
from tests import decoder, oracle
from tests.families import FAMILIES, GROUPS

METHODS = ("rtn", "hadamard", "random", "duquant", "duquant++")
TOKENS = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
PROMPT = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(2))
LINEARS = [f"{group.owner}.{n.rpartition('.')[2]}" for group in GROUPS for n in group.linears]
BLOCK_LINEARS = 7


def config(**options) -> QuantizeConfig:
    return QuantizeConfig(**({"max_steps": 8} | options))


def quantize(model: Path, out: Path, **options) -> Path:
    duqpp.quantize_model(str(model), out, config(**options), calibration=TOKENS)
    return out


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.fixture
def finished_blocks(monkeypatch) -> dict[int, torch.nn.Module]:
    """The decoder blocks as quantization leaves them in memory, by index."""
    blocks = {}
    kept = BlockFolder.kept

    def keep(folder, block, result):
        blocks[block.index] = block.module
        return kept(folder, block, result)

    monkeypatch.setattr(BlockFolder, "kept", keep)
    return blocks


def model_of_blocks(source: Path, blocks: dict[int, torch.nn.Module]):
    """The float model, loaded by transformers, with finished blocks in the place of its own."""
    model = AutoModelForCausalLM.from_pretrained(source)
    for index, block in blocks.items():
        model.model.layers[index] = block
    return model


def assert_saved_equals_memory(source: Path, blocks: dict, out: Path) -> None:
    expected = logits(model_of_blocks(source, blocks))
    assert torch.isfinite(expected).all()
    loaded = duqpp.from_pretrained(out)
    assert sum(isinstance(m, MXFP4Linear) for m in loaded.modules()) > 0
    oracle.assert_same(logits(loaded), expected, "logits of duqpp.from_pretrained")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    oracle.assert_same(logits(loaded), expected, "logits of AutoModelForCausalLM")


@pytest.fixture(scope="session")
def bf16_llama(make_tiny, tmp_path_factory) -> Path:
    """The tiny Llama in bfloat16, in several shards."""
    folder = tmp_path_factory.mktemp("tiny_bf16")
    model = AutoModelForCausalLM.from_pretrained(make_tiny("llama"), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(make_tiny("llama")).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("gptq", [False, True], ids=["nearest", "gptq"])
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_before_and_after_saving(
    method, rotation, gptq, tiny_llama, tmp_path, finished_blocks
):
    out = quantize(tiny_llama, tmp_path / "out", method=method, rotation=rotation, gptq=gptq)
    assert_saved_equals_memory(tiny_llama, finished_blocks, out)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family(family, tied, make_tiny, tmp_path, finished_blocks):
    model = make_tiny(family, tie_word_embeddings=tied)
    out = quantize(model, tmp_path / "out")
    assert_saved_equals_memory(model, finished_blocks, out)
    names = decoder.Checkpoint(out).data
    assert ("lm_head.weight" in names) is not tied
    biases = [n for n in names if n.endswith("_proj.bias")]
    assert len(biases) == (6 if family == "qwen2" else 0)


@pytest.mark.parametrize("method", ["rtn", "duquant", "duquant++"])
def test_a_bfloat16_model_in_shards(method, bf16_llama, tmp_path, finished_blocks):
    out = quantize(bf16_llama, tmp_path / "out", method=method)
    assert_saved_equals_memory(bf16_llama, finished_blocks, out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    kinds = {entry["dtype"] for entry in decoder.Checkpoint(out).entries.values()}
    assert kinds == {"U8", "BF16"} | ({"I32"} if method == "duquant" else set())


@pytest.mark.parametrize(
    "options",
    [
        {"skip": ("down_proj", "model.layers.0.self_attn")},
        {"skip": ("model.layers.1",), "gptq": True},
        {"smooth_alpha": 0.0, "hessian": "quantized", "gptq": True},
        {"smooth_alpha": 0.5, "method": "hadamard", "next_inputs": "float"},
        {"activation_rule": ScaleRule.FLOOR, "weight_rule": ScaleRule.CEIL},
        {"smooth_alpha": 0.5, "method": "rtn", "rotation": "per-block"},
        {"method": "duqpp"},
        {"method": "duqpp", "gptq": False, "next_inputs": "float"},
        {"method": "duqpp", "skip": ("model.layers.1", "o_proj")},
        {"method": "duqpp", "refine": "blocks", "samples": 1, "refine_samples": 2},
    ],
    ids=[
        "skip linears",
        "skip a block",
        "quantized hessian",
        "float inputs",
        "rules",
        "scaling",
        "duqpp",
        "duqpp to nearest",
        "duqpp skip",
        "refined",
    ],
)
def test_options_survive_saving(options, tiny_llama, tmp_path, finished_blocks):
    out = quantize(tiny_llama, tmp_path / "out", **options)
    assert_saved_equals_memory(tiny_llama, finished_blocks, out)
    loaded = duqpp.from_pretrained(out)
    quantized = {n for n, m in loaded.named_modules() if isinstance(m, MXFP4Linear)}
    expected = {
        f"model.layers.{i}.{n}"
        for i, n in itertools.product(range(2), LINEARS)
        if not is_skipped(f"model.layers.{i}.{n}", options.get("skip", ()))
    }
    assert quantized == expected
    rule = options.get("activation_rule", ScaleRule.EVEN)
    assert {m.rule for m in loaded.modules() if isinstance(m, MXFP4Linear)} == {rule}


def test_skipped_linears_keep_their_weights(tiny_llama, tmp_path):
    """Smoothing never reaches a weight that stays in floating point."""
    out = quantize(
        tiny_llama, tmp_path / "out", skip=("up_proj", "model.layers.0.self_attn.k_proj")
    )
    saved = decoder.Checkpoint(out)
    source = open_source(str(tiny_llama))
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"):
        assert name not in saved.linears
        oracle.assert_same(saved.floats(f"{name}.weight"), source.tensor(f"{name}.weight"), name)


@pytest.mark.parametrize("method", METHODS)
def test_size_on_disk(method, tiny_llama, tmp_path):
    """4.25 bits per weight, rotations in bfloat16, and not a byte besides."""
    for rotation, matrices in (("shared", lambda k: 1), ("per-block", lambda k: k // 32)):
        out = quantize(tiny_llama, tmp_path / rotation, method=method, rotation=rotation)
        saved = decoder.Checkpoint(out)
        assert sorted(saved.linears) == sorted(
            f"model.layers.{i}.{n}" for i, n in itertools.product(range(2), LINEARS)
        )
        source = open_source(str(tiny_llama))
        for name in saved.linears:
            n, k = source.tensor(f"{name}.weight").shape
            parts = {key: d for key, d in saved.data.items() if key.startswith(name + ".")}
            rotations = {"rtn": 0, "duquant": 2}.get(method, 1)
            expected = n * k // 2 + n * k // 32 + rotations * 2 * 32 * 32 * matrices(k)
            if method == "rtn":
                expected = n * k // 2 + n * k // 32
            if method == "duquant":
                expected += 4 * k  # the permutation
            assert sum(map(len, parts.values())) == expected, (name, sorted(parts))
        total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        headers = total - sum(map(len, saved.data.values()))
        assert 0 < headers < 250 * len(saved.data)


def test_configuration_on_disk(tiny_llama, tmp_path):
    out = quantize(
        tiny_llama,
        tmp_path / "out",
        method="duquant",
        rotation="per-block",
        activation_rule=ScaleRule.CEIL,
        skip=("model.layers.1.mlp",),
        seed=5,
    )
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    provenance = quantization.pop("provenance")
    assert quantization == {
        "quant_method": "duqpp",
        "format_version": 1,
        "method": "duquant",
        "rotation": "per_block",
        "permuted": True,
        "scale_rule": {"weights": "mse", "activations": "ceil"},
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
    }
    assert provenance["base_model"] == tiny_llama.name
    assert provenance["calibration"] == "tokens"
    assert provenance["configuration"]["seed"] == 5
    assert set(provenance["versions"]) == {"duqpp", "torch", "transformers", "python"}
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert str(tiny_llama) not in (out / "config.json").read_text()
    original = json.loads((tiny_llama / "config.json").read_text())
    assert config | original == config
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]


def test_files_on_disk(tiny_llama, tmp_path):
    out = quantize(tiny_llama, tmp_path / "sub" / "out")
    assert sorted(f.name for f in out.iterdir()) == [
        "README.md",
        "config.json",
        "duqpp-manifest.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "quantization_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [f.name for f in out.parent.iterdir()] == ["out"]
    kept = json.loads((out / "generation_config.json").read_text())
    given = json.loads((tiny_llama / "generation_config.json").read_text())
    assert kept["eos_token_id"] == given["eos_token_id"] is not None
    text = "The capital of France is"
    for folder in (tiny_llama, out):
        ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert ids == AutoTokenizer.from_pretrained(tiny_llama)(text)["input_ids"]
    for block in range(2):
        file = out / f"model-0000{block + 2}-of-00003.safetensors"
        assert all(n.startswith(f"model.layers.{block}.") for n in decoder.read_shard(file)[0])


def test_report_of_each_group(tiny_llama, tmp_path):
    report = duqpp.quantize_model(str(tiny_llama), tmp_path / "out", config(), calibration=TOKENS)
    assert report.folder == tmp_path / "out" and report.resumed_blocks == 0
    sizes = [f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")]
    assert report.weight_bytes == sum(sizes)
    groups = [f"model.layers.{i}.{g.name}" for i in range(2) for g in GROUPS]
    assert [g.name for g in report.groups] == groups
    for group in report.groups:
        assert 0 < group.weight_error < 0.2 and 0 < group.activation_error < 0.3
    written = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert written == {"groups": [g.to_dict() for g in report.groups]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_independent_decoder_reads_the_same_weights(method, rotation, tiny_llama, tmp_path):
    out = quantize(tiny_llama, tmp_path / "out", method=method, rotation=rotation)
    saved, model = decoder.Checkpoint(out), duqpp.from_pretrained(out)
    for name in saved.linears:
        linear = model.get_submodule(name)
        stored = saved.rotated_weight(name)
        oracle.assert_same(dequantize(linear.weight).double(), stored, name)
        transform = InputTransform(
            None if linear.rotation is None else BlockRotation(linear.rotation),
            None if linear.pre_rotation is None else BlockRotation(linear.pre_rotation),
            linear.permutation,
        )
        inputs = torch.eye(linear.in_features, dtype=torch.float64)
        function = transform.apply(inputs) @ torch.from_numpy(stored).T  # [K, N]
        effective = torch.from_numpy(saved.effective_weight(name)).T
        assert (function - effective).abs().max() <= 1e-12 * function.abs().max(), name


@pytest.mark.parametrize("rule", ["mse", "floor", "even", "ceil"])
def test_rtn_weights_are_the_nearest_of_the_format(rule, bf16_llama, tmp_path):
    out = quantize(bf16_llama, tmp_path / "out", method="rtn", weight_rule=rule)
    saved, source = decoder.Checkpoint(out), open_source(str(bf16_llama))
    grid = oracle.E2M1_VALUES
    for name in saved.linears:
        weight = source.tensor(f"{name}.weight").double().numpy()
        scales = np.repeat(saved.scales(name), 32, axis=1)
        nearest = np.abs(weight[..., None] / scales[..., None] - grid).min(-1) * scales
        error = np.abs(saved.effective_weight(name) - weight)
        oracle.assert_same(error, nearest, f"error of {name}")
        ratio = np.abs(weight).reshape(len(weight), -1, 32).max(-1) / saved.scales(name)
        low, high = {"floor": (4, 8), "even": (3.5, 7), "ceil": (3, 6.001), "mse": (2, 8)}[rule]
        assert ratio.min() >= low and ratio.max() < high, name


@pytest.mark.parametrize("options", [{"method": "hadamard"}, {"method": "duquant"}, {}])
@pytest.mark.parametrize("rotation", ["shared", "per-block"])
def test_decoded_weights_are_close_to_the_original(options, rotation, make_tiny, tmp_path):
    """Un-rotated, and with smoothing taken back from norms and producers, weights are the old ones.

    The bound is that of 4-bit rounding with blocks of 32; a wrong fold is off by its own size.
    """
    folder = make_tiny("qwen2")
    out = quantize(folder, tmp_path / "out", rotation=rotation, **options)
    saved, source = decoder.Checkpoint(out), open_source(str(folder))

    def norm_ratio(name: str) -> np.ndarray:
        return saved.floats(name) / source.tensor(name).double().numpy()

    for name in saved.linears:
        weight = source.tensor(f"{name}.weight").double().numpy()
        block, _, linear = name.rpartition(".")
        layer = block.rpartition(".")[0]
        effective = saved.effective_weight(name)
        if linear in ("q_proj", "k_proj", "v_proj"):
            effective = effective * norm_ratio(f"{layer}.input_layernorm.weight")
        if linear in ("gate_proj", "up_proj"):
            effective = effective * norm_ratio(f"{layer}.post_attention_layernorm.weight")
        if linear in ("q_proj", "k_proj", "gate_proj"):  # their outputs are never smoothed
            error = np.linalg.norm(effective - weight) / np.linalg.norm(weight)
            assert error < 0.2, (name, error)
        if linear in ("q_proj", "k_proj"):
            bias = source.tensor(f"{name}.bias")
            oracle.assert_same(saved.floats(f"{name}.bias"), bias.double(), f"bias of {name}")


def test_shards_of_the_source_do_not_matter(make_tiny, tmp_path):
    whole = quantize(make_tiny("llama"), tmp_path / "whole", gptq=True)
    sharded = quantize(make_tiny("llama", shard_size="60KB"), tmp_path / "sharded", gptq=True)
    first, second = hashes(whole), hashes(sharded)
    for name in ("config.json", "README.md", "duqpp-manifest.json"):  # these name the two models
        first.pop(name), second.pop(name)
    assert first == second


def test_runs_are_reproducible_and_seeded(tiny_llama, tmp_path):
    first = hashes(quantize(tiny_llama, tmp_path / "a", method="random", gptq=True))
    assert first == hashes(quantize(tiny_llama, tmp_path / "b", method="random", gptq=True))
    other = hashes(quantize(tiny_llama, tmp_path / "c", method="random", gptq=True, seed=1))
    shards = [name for name in first if name.endswith("-of-00003.safetensors")]
    assert [first[n] == other[n] for n in sorted(shards)] == [True, False, False]


def test_calibration_from_a_text_file(tiny_llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = config(samples=2, seq_len=32)
    duqpp.quantize_model(str(tiny_llama), tmp_path / "out", options, calibration=str(text))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["quantization_config"]["provenance"]["calibration"] == "text.txt"


class Begun(BaseException):
    """Stands for the end of a job that was about to begin."""


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (-1, r"tokens must be in \[0, 320\), .*, got -1 to 299"),
        (0, None),
        (319, None),
        (320, r"tokens must be in \[0, 320\), .*, got 0 to 320"),
    ],
)
def test_calibration_tokens_are_of_the_vocabulary(token, message, tiny_llama, tmp_path):
    tokens = torch.arange(300)[None].contiguous()
    tokens[0, 150] = token

    def begin(*_: object) -> None:
        raise Begun

    with pytest.raises(InputError if message else Begun, match=message):
        duqpp.quantize_model(
            str(tiny_llama), tmp_path / "out", config(), calibration=tokens, progress=begin
        )


def test_calibration_of_several_texts(tiny_llama, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("Words of a kind of their own. " * 500)
    both, options = f"{text}*3,builtin", config(samples=5, seq_len=64)
    duqpp.quantize_model(str(tiny_llama), tmp_path / "out", options, calibration=both)
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert kept["provenance"]["calibration"] == "own.txt*3,builtin"
    own = CalibrationText.read(both).tokenized(open_source(str(tiny_llama)).tokenizer())
    tokens = own.sequences(samples=5, seq_len=64, seed=options.seed)
    duqpp.quantize_model(str(tiny_llama), tmp_path / "same", options, calibration=tokens)
    shard = "model-00001-of-00003.safetensors"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "same" / shard).read_bytes()


def test_progress(tiny_llama, tmp_path):
    calls = []
    duqpp.quantize_model(
        str(tiny_llama),
        tmp_path / "out",
        config(method="rtn"),
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("fingerprint", 0, 1), *(("quantize", i, 2) for i in range(3))]


class WatchedSource:
    """A source that notes, at each read, which tensors that it gave are still alive."""

    def __init__(self, source) -> None:
        self._source, self.config, self.names = source, source.config, source.names
        self.given: list[tuple[str, weakref.ref]] = []
        self.most_blocks = 0

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self._source.tensor(name)
        self.given.append((name, weakref.ref(tensor)))
        self.most_blocks = max(self.most_blocks, len(self.blocks_alive()))
        return tensor

    def blocks_alive(self) -> set[str]:
        alive = [name.split(".") for name, ref in self.given if ref() is not None]
        return {parts[2] for parts in alive if parts[1] == "layers"}

    def tokenizer(self):
        return self._source.tokenizer()

    def generation_config(self):
        return self._source.generation_config()


def test_drift_changes_codes_behind_the_first_group(tiny_llama, tmp_path):
    """What the first group reads has no drift: before it nothing is quantized."""
    made = {}
    for drift in (0.0, 0.3):
        out = tmp_path / f"{drift}"
        options = config(method="duqpp", drift=drift)
        duqpp.quantize_model(str(tiny_llama), out, options, calibration=TOKENS)
        made[drift] = duqpp.from_pretrained(out).state_dict()
    different = {n for n, v in made[0.0].items() if not torch.equal(v, made[0.3][n])}
    first = ("q_proj", "k_proj", "v_proj")
    assert not any(f"layers.0.self_attn.{name}" in n for name in first for n in different)
    for name in ("layers.0.self_attn.o_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"):
        assert f"model.{name}.weight_packed" in different


def live_tensors() -> list[torch.Tensor]:
    # Exact types: torch.compile leaves fake tensors behind, which have no storage.
    plain = (torch.Tensor, torch.nn.Parameter)
    return [t for t in gc.get_objects() if type(t) in plain and not t.is_meta]


@pytest.mark.parametrize("options", [{"method": "rtn"}, {"gptq": True}, {"next_inputs": "float"}])
def test_one_decoder_block_is_worked_on_one_read_and_one_written(
    options, make_tiny, tmp_path, monkeypatch
):
    source = WatchedSource(open_source(str(make_tiny("llama", "60KB", num_hidden_layers=4))))
    block_bytes = sum(
        source.tensor(n).nbytes for n in source.names if n.startswith("model.layers.0.")
    )
    source.given.clear()
    real_blocks, reads, live_bytes = [], {}, []
    stacks = []
    build = DecoderStack.__init__

    def remember(stack, *args, **kwargs):
        build(stack, *args, **kwargs)
        stacks.append(stack)

    monkeypatch.setattr(DecoderStack, "__init__", remember)

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "fingerprint":
            return
        if done == 0:
            source.given.clear()  # what the fingerprint and the embeddings read
            source.most_blocks = 0
        reads[done] = {
            int(n.split(".")[2]) for n, _ in source.given if n.startswith("model.layers")
        }
        real_blocks.append(
            [
                i
                for i, b in enumerate(stacks[0]._blocks)
                if any(not p.is_meta for p in b.parameters())
            ]
        )
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in live_tensors())}
        live_bytes.append(sum(storages.values()))

    others = live_tensors()  # of tests before this one: held, so that none goes while this one runs
    duqpp.quantize_model(
        source, tmp_path / "out", config(**options), calibration=TOKENS, progress=progress
    )
    assert real_blocks == [[], [], [], [], []]
    for done in range(5):
        assert reads[done] <= set(range(done + 1)) and reads[done] >= set(range(done))
    assert source.most_blocks <= 2
    # At these moments one may have been read, and one, quantized, may have to be written.
    assert max(live_bytes) - min(live_bytes) < 1.5 * block_bytes
    del others
    assert source.blocks_alive() == set()


def test_sequences_that_calibrate_are_spread_over_those_that_refine(tiny_llama):
    source = open_source(str(tiny_llama))
    tokens = torch.arange(9)[:, None].expand(-1, 4)

    def first_tokens(**options) -> list[int]:
        refining = QuantizeConfig(method="duqpp", refine="blocks", refine_samples=99, **options)
        found, _, _ = calibration_tokens(source.config, None, refining, tokens)
        return found[:, 0].tolist()

    assert first_tokens(samples=3) == [0, 4, 8, 1, 2, 3, 5, 6, 7]
    assert first_tokens(samples=8)[:8] == [0, 1, 2, 3, 5, 6, 7, 8]
    with pytest.raises(InputError, match="more than 9 calibration sequences"):
        first_tokens(samples=9)
