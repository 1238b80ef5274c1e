"""Settings of the test run, and tiny models that several test files share."""

import gc
import importlib
import pydoc_data.topics
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tests run beside each other and on laptops; one thread also fixes the order of every sum.
torch.set_num_threads(1)

# Some press Ctrl-C, which the background jobs of a shell are started to ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("duqpp", derandomize=True, deadline=None, max_examples=100, database=None)
settings.load_profile("duqpp")


def pytest_configure(config: pytest.Config) -> None:
    # hypothesis parses the source of imported packages outside site-packages for constants; those
    # that the cross-checks import from their own folder have such strings.
    config.addinivalue_line("filterwarnings", r"ignore:.*invalid escape sequence")


def pytest_collection_finish() -> None:
    """Take what was imported out of the collector's sight: some 0.5 s of each full collection."""
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What each backend can run here, so that a skip in the log explains itself."""
    try:
        dispatch = importlib.import_module("duqpp.ops.dispatch")
    except ImportError as error:
        return [f"duqpp backends: unknown ({error})"]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines = ["duqpp backends:"]
    for backend in dispatch.BACKENDS:
        reasons = [backend.unavailable_reason("mxfp4_gemm", torch.device(d)) for d in devices]
        answers = [f"on {d}: {reason or 'yes'}" for d, reason in zip(devices, reasons, strict=True)]
        lines.append(f"  {backend.name}: {', '.join(answers)}")
    return lines


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def whole_builtin_text() -> Iterator[dict[str, str]]:
    """The pages of duqpp's built-in text; all tests but those that ask for it read a part of them.

    A tokenizer takes a third of a second for all of it, and many tests read it several times.
    """
    pages = pydoc_data.topics.topics
    few = {name: pages[name] for name in sorted(pages)[::4]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydoc_data.topics, "topics", few)
        yield pages


@pytest.fixture(scope="session", autouse=True)
def jobs_on_the_cpu() -> Iterator[None]:
    """Jobs compute on the CPU where a GPU is, too: what they are compared with is the CPU's."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():  # else there is nothing to import for it
            patch.setattr("duqpp.placement.devices.gpu_count", lambda: 0)
        yield


MakeTiny = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """Factory of tiny seeded models: ``make_tiny(model_type, shard_size=None, **overrides)``.

    model_type is one of `tests.families.FAMILIES`; overrides are fields of its transformers
    config; shard_size (such as "100KB") splits the safetensors. Returns the folder, which holds
    float32 weights, config and tokenizer; it is made once per arguments: copy before changing it.

    Biases are non-zero, norm weights differ from one and enlarge one channel, so that a bias lost
    or a norm folded wrongly changes the logits.
    """
    made: dict[str, Path] = {}

    def make(model_type: str, shard_size: str | None = None, **overrides: object) -> Path:
        key = repr((model_type, shard_size, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny_{model_type}")
            _save_tiny_model(folder, model_type, shard_size, overrides)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny: MakeTiny) -> Path:
    """Folder of a tiny Llama: 2 layers, hidden 64, 4 heads on 2 key-value heads, with tokenizer."""
    return make_tiny("llama")


def _save_tiny_model(
    folder: Path, model_type: str, shard_size: str | None, overrides: dict[str, object]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tiny_tokenizer()
    fields = {
        "vocab_size": 320,  # more than the tokenizer has, as in released models
        "hidden_size": 64,
        "intermediate_size": 96,  # three blocks of 32: an odd number pads the scale tiles
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(model_type, **(fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
                parameter.data[5] = 8.0
    options = {} if shard_size is None else {"max_shard_size": shard_size}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)


def _tiny_tokenizer():
    """Byte-level BPE of about 300 tokens, trained on a few fixed sentences: it reads any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sentences = [
        "The capital of France is Paris, and the capital of Italy is Rome.",
        "A block of thirty-two values shares one scale, which is a power of two.",
        "The quick brown fox jumps over the lazy dog while the other dogs look on.",
    ]
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
