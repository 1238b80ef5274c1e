"""A checkpoint is its source in all but the weights: tokenizer, defaults, names, other files."""

import base64
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import duqpp
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.integrations.compressed_tensors import export_compressed_tensors
from duqpp.job.companions import companion_files
from duqpp.models.source import SafetensorsSource
from tests.checkpoint import damage

RTN = QuantizeConfig(method="rtn")
PREFIX = "\u2581"
TEXTS = (
    "hello",
    " hello",
    "say  hello ",
    "<s>hello</s>",
    "<s>[INST] hi [/INST] hello</s>",
    "</s>the cat<unk> sat",
    "\n\tthe\r\n cat\n\n",
    "caf\u00e9 \u4f60\u597d \U0001f642 e\u0301",
    "12345 1.5e-3",
    "",
)
SENTENCES = ["say hello to the cat", "the cat says hello", "[INST] hi [/INST] hello"] * 9
SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece(*, prepends: bool) -> Tokenizer:
    """As a Llama tokenizer of SentencePiece is converted: with bytes, and a prefix for spaces."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepends:
        steps = [normalizers.Prepend(PREFIX), normalizers.Replace(" ", PREFIX)]
        inner.normalizer = normalizers.Sequence(steps)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=PREFIX, prepend_scheme="first", split=False
        )
    back = [decoders.Replace(PREFIX, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIAL, *data], show_progress=False
    )
    inner.train_from_iterator(SENTENCES, trainer)
    return inner


def byte_level() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(SENTENCES, trainer)
    return inner


def word_level() -> Tokenizer:
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    inner.train_from_iterator(SENTENCES, trainer)
    return inner


def save_vocabulary(inner: Tokenizer, folder: Path) -> None:
    """As older, slow tokenizers have it: no tokenizer.json."""
    inner.model.save(str(folder))


def save_whole(inner: Tokenizer, folder: Path) -> None:
    inner.save(str(folder / "tokenizer.json"))


TOKENIZERS = {
    "Llama, legacy": (lambda: sentencepiece(prepends=True), save_whole, "LlamaTokenizer", True),
    "Llama": (lambda: sentencepiece(prepends=True), save_whole, "LlamaTokenizer", False),
    "Llama, fast by name": (
        lambda: sentencepiece(prepends=True),
        save_whole,
        "LlamaTokenizerFast",
        True,
    ),
    "Metaspace": (
        lambda: sentencepiece(prepends=False),
        save_whole,
        "PreTrainedTokenizerFast",
        None,
    ),
    "byte level": (byte_level, save_whole, "PreTrainedTokenizerFast", None),
    "Qwen": (byte_level, save_vocabulary, "Qwen2Tokenizer", None),
    "words": (word_level, save_whole, "PreTrainedTokenizerFast", None),
}


@pytest.fixture
def model(make_tiny, tmp_path) -> Path:
    """A source that a test may change, without its tokenizer."""
    folder = damage.copy_of(make_tiny("llama", vocab_size=640, num_hidden_layers=1), tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def source(make_tiny, tmp_path) -> Path:
    """A source that a test may change."""
    return damage.copy_of(make_tiny("llama", num_hidden_layers=1), tmp_path / "model")


def quantize(source: Path, out: Path) -> Path:
    duqpp.quantize_model(str(source), out, RTN)
    return out


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def give_tokenizer(folder: Path, kind: str) -> None:
    make, save, name, legacy = TOKENIZERS[kind]
    save(make(), folder)
    values = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    values |= {"unk_token": "<unk>"} | ({} if legacy is None else {"legacy": legacy})
    write_json(folder / "tokenizer_config.json", values)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_the_same(kind, model, tmp_path):
    """In the checkpoint, and in its export."""
    give_tokenizer(model, kind)
    out = quantize(model, tmp_path / "out")
    export_compressed_tensors(out, tmp_path / "export")
    before = AutoTokenizer.from_pretrained(model)
    for folder in (out, tmp_path / "export"):
        after = AutoTokenizer.from_pretrained(folder)
        assert type(after) is type(before) and len(after) == len(before)
        for text in TEXTS:
            assert after(text)["input_ids"] == before(text)["input_ids"], text
            plain = before(text, add_special_tokens=False)["input_ids"]
            assert after(text, add_special_tokens=False)["input_ids"] == plain, text
            assert after.decode(plain) == before.decode(plain), text


def test_a_tekken_tokenizer_is_the_same(model, tmp_path):
    pytest.importorskip(
        "mistral_common.tokens.tokenizers.tekken", reason="mistral-common is not installed"
    )
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
        for i in range(256)
    ]
    control = ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS", "SYSTEM_PROMPT")
    special = ["<unk>", "<s>", "</s>", *(f"[{end}{name}]" for name in control for end in ("", "/"))]
    special += ["[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]"]
    special += ["[MIDDLE]", "[SUFFIX]", "[TOOL_CONTENT]"]
    write_json(
        model / "tekken.json",
        {
            "vocab": vocabulary,
            "special_tokens": [
                {"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(special)
            ],
            "config": {
                "pattern": r"[^\s]+|\s+",
                "num_vocab_tokens": 256,
                "default_vocab_size": 256 + len(special),
                "default_num_special_tokens": len(special),
                "version": "v3",
            },
        },
    )
    damage.edit_json(model / "config.json", lambda config: config.update(model_type="mistral"))
    out = quantize(model, tmp_path / "out")
    before, after = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"], text


def single(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!\n")


def named(folder: Path) -> None:
    single(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools }}")


def in_settings(folder: Path) -> None:
    damage.edit_json(
        folder / "tokenizer_config.json",
        lambda values: values.update(chat_template="{{ messages | length }}"),
    )


def list_in_settings(folder: Path) -> None:
    templates = [{"name": n, "template": f"{n} {{{{ messages }}}}"} for n in ("default", "rag")]
    damage.edit_json(
        folder / "tokenizer_config.json", lambda values: values.update(chat_template=templates)
    )


def of_a_processor(folder: Path) -> None:
    write_json(folder / "chat_template.json", {"chat_template": "{{ messages }}"})


@pytest.mark.parametrize(
    "give", [single, named, in_settings, list_in_settings, of_a_processor], ids=lambda f: f.__name__
)
def test_chat_templates_are_the_same(give, source, tmp_path):
    give(source)
    out = quantize(source, tmp_path / "out")
    export_compressed_tensors(out, tmp_path / "export")
    before = AutoTokenizer.from_pretrained(source).chat_template
    assert before or give is of_a_processor
    for folder in (out, tmp_path / "export"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == before
        for name in companion_files(source):
            assert (folder / name).read_bytes() == (source / name).read_bytes(), name


IN_CONFIG = {"do_sample": True, "temperature": 0.7, "top_p": 0.8}
IN_FILE = {"eos_token_id": [1, 5], "top_k": 7, "do_sample": True, "max_length": 33}
ODD = {"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}  # with sampling left off: a warning


@pytest.mark.parametrize("in_file", [None, IN_FILE, ODD], ids=["none", "file", "odd"])
@pytest.mark.parametrize("in_config", [{}, IN_CONFIG], ids=["plain", "config"])
def test_generation_defaults_are_the_same(in_config, in_file, source, tmp_path):
    damage.edit_json(source / "config.json", lambda values: values.update(in_config))
    (source / "generation_config.json").unlink()
    if in_file is not None:
        write_json(source / "generation_config.json", in_file)
    out = quantize(source, tmp_path / "out")
    wanted = AutoModelForCausalLM.from_pretrained(source).generation_config
    got = duqpp.from_pretrained(out).generation_config
    assert got.to_dict() == wanted.to_dict()
    assert (out / "generation_config.json").exists() is (in_file is not None)


def test_no_method_that_may_refuse_saves_the_defaults(source, tmp_path, monkeypatch):
    """Some versions of transformers validate strictly what they save."""

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("The generation config instance is invalid")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    write_json(source / "generation_config.json", ODD)
    out = quantize(source, tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text()) == ODD


class Opened:
    """A source that is no folder, as users write them."""

    def __init__(self, folder: Path) -> None:
        self._source = SafetensorsSource(folder)
        self.config, self.names = self._source.config, self._source.names
        self.tensor, self.tokenizer = self._source.tensor, self._source.tokenizer
        self.generation_config = self._source.generation_config


def test_a_source_that_is_no_folder(source, tmp_path, monkeypatch):
    """Its tokenizer and its defaults are saved, the defaults whatever they are."""
    write_json(source / "generation_config.json", ODD)
    monkeypatch.setattr(GenerationConfig, "save_pretrained", None)
    duqpp.quantize_model(Opened(source), tmp_path / "out", RTN)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ODD.items() <= kept.items()
    before, after = map(AutoTokenizer.from_pretrained, (source, tmp_path / "out"))
    assert [before(text)["input_ids"] for text in TEXTS] == [
        after(text)["input_ids"] for text in TEXTS
    ]


def test_a_tokenizer_that_cannot_be_saved_costs_no_work(source, tmp_path, monkeypatch):
    own = Opened(source)
    tokenizer = own.tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda folder: 1 / 0)
    own.tokenizer = lambda: tokenizer
    with pytest.raises(InputError, match="cannot save the tokenizer: division by zero"):
        duqpp.quantize_model(own, tmp_path / "out", RTN)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


def test_a_tokenizer_that_would_be_another_costs_no_work(source, tmp_path):
    own, other = Opened(source), Opened(source).tokenizer()
    other.save_pretrained = own.tokenizer().save_pretrained
    other.add_tokens(["Hello"])
    own.tokenizer = lambda: other
    with pytest.raises(InputError, match="is not that of the model: its tokens differ"):
        duqpp.quantize_model(own, tmp_path / "out", RTN)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


COPIED = {
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "tokenizer.model": "\x00\x01",
    "tekken.json.txt": "x",
    "qwen.tiktoken": "IQ== 0\n",
    "preprocessor_config.json": "{ }",
    "LICENSE": "mine",
    "USE_POLICY.md": "be good",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
}
LEFT = {
    "README.md": "the source's card",
    ".gitattributes": "* -text",
    "modeling_own.py": "raise SystemExit",
    "pytorch_model.bin": "x",
    "pytorch_model.bin.index.json": "{}",
    "model.GGUF": "x",
    "tf_model.h5": "x",
    "flax_model.msgpack": "x",
    "model.onnx": "x",
    "consolidated.00.pth": "x",
    "adapter_config.json": "{}",
    "original/params.json": "{}",
    "checkpoint-5/optimizer.pt": "x",
    "quantization_report.json": "{}",
}


def test_which_files_are_copied(source, tmp_path):
    for name, text in (COPIED | LEFT).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "gone.json").symlink_to(source / "nowhere.json")
    (source / "huge.dat").touch()
    os.truncate(source / "huge.dat", 2**40)
    (source / "adapter_config.json").unlink()  # which transformers reads, of the source too
    out = quantize(source, tmp_path / "out")
    made = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert set(COPIED) <= made
    assert made & (set(LEFT) | {"gone.json", "huge.dat"}) == {
        "README.md",
        "quantization_report.json",
    }
    for name in COPIED:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert "the source's card" not in (out / "README.md").read_text()
    export_compressed_tensors(out, tmp_path / "export")
    for name in COPIED:
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes(), name


def test_nothing_points_at_what_is_not_there(source, tmp_path):
    """Nor at the folder of the source, nor at code, which is not copied and never run."""
    (source / "tokenization_own.py").write_text("raise SystemExit")
    pointers = {
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        "name_or_path": "/home/somebody/model",
        "tokenizer_file": "/home/somebody/model/tokenizer.json",
        "special_tokens_map_file": "/home/somebody/special_tokens_map.json",
    }
    settings = json.loads((source / "tokenizer_config.json").read_text())
    write_json(source / "tokenizer_config.json", settings | pointers)
    own = {"auto_map": {"AutoConfig": "own.Config"}, "_name_or_path": "/home/somebody/model"}
    damage.edit_json(source / "config.json", lambda values: values.update(own))
    out = quantize(source, tmp_path / "out")
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings
    text = (out / "config.json").read_text()
    assert "somebody" not in text and "auto_map" not in text
    assert not list(out.glob("*.py"))
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)


def test_config_json_is_the_source_s_own(source, tmp_path):
    """Fields that no version knows included; old ones are not written again in a new way."""

    def make_old(values: dict) -> None:
        values.pop("rope_parameters", None)
        values.pop("dtype")
        values |= {"torch_dtype": "float32", "rope_theta": 5000.0, "rope_scaling": None}
        values |= {
            "transformers_version": "4.31.0",
            "max_window": [1, {"a": None}],
            "unk": "\u00e9",
        }

    damage.edit_json(source / "config.json", make_old)
    given = json.loads((source / "config.json").read_text())
    out = quantize(source, tmp_path / "out")
    kept = json.loads((out / "config.json").read_text())
    for name, value in given.items():
        if name != "torch_dtype":
            assert kept[name] == value, name
    assert "rope_parameters" not in kept and "torch_dtype" not in kept
    wanted = AutoModelForCausalLM.from_pretrained(source).config.to_dict()
    got = duqpp.from_pretrained(out).config.to_dict()
    for name in set(wanted) - {"_name_or_path", "transformers_version"}:
        assert got[name] == wanted[name], name


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaForQuestionAnswering",
        "LlamaRewardModel",
        "Qwen2ForProcessRewardModel",
        "LlamaForCausalLMWithValueHead",
    ],
)
def test_a_model_with_another_head_is_refused(name, source, tmp_path):
    """It would be lost: a checkpoint that names it would load with a random one."""
    damage.edit_json(source / "config.json", lambda values: values.update(architectures=[name]))
    with pytest.raises(InputError, match=f"names the architecture {name}, whose head would be"):
        quantize(source, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    "given", [None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaModel"]], ids=str
)
def test_the_architecture_is_that_of_the_checkpoint(given, source, tmp_path):
    damage.edit_json(source / "config.json", lambda values: values.update(architectures=given))
    out = quantize(source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
