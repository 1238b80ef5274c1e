"""Folders of safetensors, read as transformers reads them: the same tensors, or both refuse."""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import WeightRenaming

from duqpp.errors import InputError
from duqpp.models.quiet import quiet_libraries
from duqpp.models.source import open_source
from duqpp.models.stack import DecoderStack
from duqpp.models.weights import empty_model

KINDS = ("llama", "mistral", "qwen2", "qwen3")
FOLDERS = 150  # of each kind; 2 processor seconds a hundred
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
# Tensors that no such model has.
EXTRA = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight_g",
    "model.LayerNorm.gamma",
    "score.weight",
    "vision_tower.weight",
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass
class Folder:
    """A folder to be: config.json, tensors by file, and an index.

    shard_of: what the index says, by the names of the tensors.
    """

    config: dict
    files: dict[str, dict[str, Tensor]]
    shard_of: dict[str, str] | None = None
    metadata: dict | None = field(default_factory=dict)
    index_file: str = "model.safetensors.index.json"

    def write(self, path: Path) -> Path:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config))
        for name, tensors in self.files.items():
            (path / name).parent.mkdir(exist_ok=True)
            save_file({n: t.clone() for n, t in tensors.items()}, path / name)
        if self.shard_of is not None:
            index = {"weight_map": self.shard_of}
            if self.metadata is not None:
                index["metadata"] = self.metadata
            (path / self.index_file).write_text(json.dumps(index))
        return path


def folder_of(kind: str, rng: random.Random) -> Folder:
    """A folder like those that people have, or worse."""
    fields = dict(SIZES)
    if kind == "llama":
        fields |= {n: rng.random() < 0.3 for n in ("attention_bias", "mlp_bias")}
    config = AutoConfig.for_model(kind, **fields)
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("dtype", None)
    tensors = _values(empty_model(config).state_dict(), rng)
    _heads(values, tensors, rng)
    _dtypes(values, tensors, rng)
    _damage(tensors, rng)
    return _files(values, _names(tensors, rng), rng)


def _values(shapes: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return {n: torch.randn(t.shape, generator=generator) for n, t in shapes.items()}


def _heads(values: dict, tensors: dict[str, Tensor], rng: random.Random) -> None:
    flag = rng.choice([True, True, False, None])
    values.pop("tie_word_embeddings", None)
    if flag is not None:
        values["tie_word_embeddings"] = flag
    head = rng.choice(["own", "own", "equal", "almost equal", "absent"])
    if head == "absent":
        del tensors[HEAD]
    elif head != "own":
        tensors[HEAD] = tensors[EMBEDDING] * (1 if head == "equal" else 1 + 1e-5)
    if rng.random() < 0.15:
        del tensors[EMBEDDING]


def _dtypes(values: dict, tensors: dict[str, Tensor], rng: random.Random) -> None:
    for key in ("dtype", "torch_dtype"):
        if rng.random() < 0.4:
            names = ["float32", "bfloat16", "float16"] * 5 + ["float64", "float8_e4m3fn", "int8"]
            values[key] = rng.choice([*names, None])
    common = rng.choice(FLOATS)
    for name in tensors:
        tensors[name] = tensors[name].to(common)
        if rng.random() < 0.1:
            tensors[name] = tensors[name].to(rng.choice([*FLOATS, torch.float64]))
    if rng.random() < 0.1:
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.float8_e4m3fn]))


def _damage(tensors: dict[str, Tensor], rng: random.Random) -> None:
    if rng.random() < 0.1:
        del tensors[rng.choice(sorted(tensors))]
    if rng.random() < 0.1:
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name][:-1]


def _names(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """Under the names that a file has them by."""
    style = rng.choice(["as they are"] * 3 + ["bare", "mixed", "doubled", "twice", "odd"])
    named = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("model.")
        if style in ("bare", "doubled", "odd"):
            name = {"bare": bare, "doubled": f"model.{name}", "odd": f"model-{bare}"}[style]
        elif style == "mixed":
            name = rng.choice([name, bare])
        elif style == "twice" and rng.random() < 0.5:
            other = rng.choice([bare, f"model-{bare}"])
            named[other] = _changed({name: tensor})[name]
        named[name] = tensor
    for name in EXTRA:
        if rng.random() < 0.1:
            named[name] = torch.ones(4, dtype=rng.choice([*FLOATS, torch.int64]))
    return dict(rng.sample(sorted(named.items(), key=lambda item: item[0]), len(named)))


def _files(values: dict, tensors: dict[str, Tensor], rng: random.Random) -> Folder:
    """In one file, or in shards with an index that is right, or not."""
    if rng.random() < 0.35:
        folder = Folder(values, {"model.safetensors": tensors})
        if rng.random() < 0.2:  # shards of an earlier save, and perhaps their index
            folder.files["model-00001-of-00001.safetensors"] = _changed(tensors)
            folder.shard_of = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        return folder
    count = rng.choice([1, 2, 3])
    names = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    if rng.random() < 0.1:
        names[0] = f"weights/{names[0]}"
    shard_of = {name: rng.choice(names) for name in tensors}
    files = {file: {} for file in shard_of.values()}
    for name, file in shard_of.items():
        files[file][name] = tensors[name]
    folder = Folder(values, files, shard_of)
    _mislead(folder, tensors, rng)
    return folder


def _mislead(folder: Folder, tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Perhaps let the index say what is not so, or leave out what is, or another file win."""
    index, file = folder.shard_of, rng.choice(sorted(folder.files))
    kind = rng.choice(
        ["none"] * 6
        + ["no metadata", "dtype", "bad dtype", "names nobody has", "forgotten", "another's"]
        + ["lost shard", "stale shard", "two of a name", "single", "named single", "named index"]
        + ["no weights", "bad name"]
    )
    if kind == "no metadata":
        folder.metadata = None
    elif kind in ("dtype", "bad dtype"):
        folder.metadata = {"dtype": "float16" if kind == "dtype" else "torch.float16"}
    elif kind == "names nobody has":
        index |= dict.fromkeys(["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.x"], file)
    elif kind == "forgotten":
        del index[rng.choice(sorted(index))]
    elif kind == "another's":
        index[rng.choice(sorted(index))] = file
    elif kind == "lost shard":
        del folder.files[file]
    elif kind == "stale shard":
        folder.files["model-00009-of-00009.safetensors"] = _changed(tensors)
    elif kind == "two of a name":
        name = rng.choice(sorted(tensors))
        folder.files[file][name] = _changed({name: tensors[name]})[name]
    elif kind == "single":
        folder.files["model.safetensors"] = _changed(tensors)
    elif kind == "named single":
        folder.files |= {"own.safetensors": _changed(tensors), "model.safetensors": tensors}
        folder.config["transformers_weights"] = "own.safetensors"
    elif kind == "named index":
        folder.index_file = "own.safetensors.index.json"
        folder.files["model.safetensors"] = _changed(tensors)
        folder.config["transformers_weights"] = folder.index_file
    elif kind == "no weights":
        folder.shard_of = {}
    elif kind == "bad name":
        index["x"] = rng.choice([5, None, ["y"]])


def _changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other values, those of an earlier save."""
    return {name: tensor[range(len(tensor) - 1, -1, -1)] for name, tensor in tensors.items()}


def theirs(folder: Path) -> tuple[dict[str, Tensor], bool] | None:
    """What transformers loads, and whether lm_head is tied; None where it refuses, or makes up."""
    try:
        model, keys = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
    except Exception:  # of any kind
        return None
    if keys["missing_keys"]:
        return None
    state = dict(model.state_dict())
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    if is_tied:
        del state[HEAD]
    return state, is_tied


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        # view: bytes, so that -0 is not 0
        ours, wanted = (t.contiguous().view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, wanted), name


def check(folder: Path) -> str:
    """Compare what both read. Returns: "read", "refused", or "not quantized"."""
    expected = theirs(folder)
    try:
        source = open_source(str(folder))
    except InputError as error:
        assert "\n" not in str(error)
        # What loads there, and has no meaning without scales, or is more than is quantized.
        of_another_kind = "duqpp quantizes float32, bfloat16 and float16 models" in str(error)
        assert expected is None or of_another_kind, error
        return "refused" if expected is None else "not quantized"
    assert expected is not None, "transformers refuses"
    tensors, is_tied = expected
    assert_same({name: source.tensor(name) for name in source.names}, tensors)
    assert source.config.tie_word_embeddings == is_tied
    stack = DecoderStack(source)
    block = {f"model.layers.0.{n}": t for n, t in stack.block(0).state_dict().items()}
    assert_same(block | stack.rest(), tensors)
    head = tensors["model.embed_tokens.weight" if is_tied else HEAD]
    assert torch.equal(stack.head()[1].weight, head)
    return "read"


@pytest.mark.parametrize(
    ("old", "new", "stored"),
    [("old_norm", "norm", "old_norm"), ("norm", "new_norm", "norm")],
    ids=["a name of an older release", "a name that is no longer one"],
)
def test_names_that_transformers_converts(old, new, stored, tmp_path, monkeypatch):
    """A tensor by an older name is found, and one that has its name keeps it."""
    original = conversion_mapping.get_checkpoint_conversion_mapping

    def mapping(kind):
        return [WeightRenaming(old, new)] if kind == "llama" else original(kind)

    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", mapping)
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False)
    tensors = _values(empty_model(config).state_dict(), random.Random(0))
    tensors[f"model.{stored}.weight"] = tensors.pop("model.norm.weight")
    values = json.loads(config.to_json_string(use_diff=False))
    assert check(Folder(values, {"model.safetensors": tensors}).write(tmp_path / "0")) == "read"


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_as_transformers_reads_it(kind, tmp_path):
    outcomes = Counter()
    for number in range(FOLDERS):
        folder = folder_of(kind, random.Random(f"{kind} {number}"))
        path = folder.write(tmp_path / str(number))
        with quiet_libraries():
            try:
                outcomes[check(path)] += 1
            except AssertionError as error:
                raise AssertionError(f"folder {number} of {kind}, {path}: {error}") from error
    assert outcomes["read"] > FOLDERS / 4
    assert outcomes["refused"] > FOLDERS / 4
    assert outcomes["not quantized"] > 0
