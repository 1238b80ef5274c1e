"""Continuing a prompt: greedy decoding, seeded sampling, the chat template."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from duqpp.errors import InputError
from duqpp.tools.generate import generate

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@torch.no_grad()
def greedy(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest token, `count` times, the whole sequence run anew each time."""
    for _ in range(count):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def test_temperature_zero_takes_the_likeliest_token(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = greedy(model, ids, 10)[0, ids.shape[1] :]
    result = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (result.tokens, result.prompt_tokens) == (10, ids.shape[1])
    assert result.to_dict()["tokens_per_second"] == result.tokens / result.seconds


def test_sampling_follows_the_seed_and_leaves_the_global_generator(model, tokenizer):
    def sample(seed: int) -> str:
        return generate(
            model, tokenizer, PROMPT, max_new_tokens=20, temperature=2.0, seed=seed
        ).text

    before = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_ends_at_the_end_of_text(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    second = int(greedy(model, ids, 2)[0, -1])
    first = int(greedy(model, ids, 1)[0, -1])
    end = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = second
    try:
        result = generate(model, tokenizer, PROMPT, max_new_tokens=10)
    finally:
        model.generation_config.eos_token_id = end
    assert result.tokens == (1 if first == second else 2)


def test_streaming_prints_the_text(model, tokenizer, capsys):
    result = generate(model, tokenizer, PROMPT, max_new_tokens=10, stream=True)
    assert capsys.readouterr().out == result.text + "\n"


def test_text_that_is_broken_off_ends_its_line(model, tokenizer, capsys, monkeypatch):
    """An error is printed next, where text and errors may share a terminal."""

    def interrupt(*, streamer, input_ids, **options):
        streamer.put(input_ids)
        streamer.put(tokenizer("The capital of Italy is Rome", return_tensors="pt")["input_ids"][0])
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPT, stream=True)
    out = capsys.readouterr().out
    assert out.startswith("The capital") and out.endswith("\n") and "Rome\n" not in out


def test_chat_wraps_the_prompt_in_the_template(model, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    chat = generate(model, tokenizer, "Rome", max_new_tokens=8, chat=True)
    plain = generate(model, tokenizer, "[user] Rome [assistant]", max_new_tokens=8)
    assert (chat.text, chat.prompt_tokens) == (plain.text, plain.prompt_tokens)
    assert chat.prompt_tokens > generate(model, tokenizer, "Rome").prompt_tokens


def test_prompt_and_new_tokens_may_just_fill_the_positions(model, tokenizer):
    prompt = "a" * 500
    room = model.config.max_position_embeddings - len(tokenizer(prompt)["input_ids"])
    assert 0 < room < 20
    result = generate(model, tokenizer, prompt, max_new_tokens=room)
    assert 0 < result.tokens <= room
    with pytest.raises(InputError, match=f"with {room + 1} new ones that exceeds the model's 512"):
        generate(model, tokenizer, prompt, max_new_tokens=room + 1)


@pytest.mark.parametrize(
    ("option", "least", "refused"), [("max_new_tokens", 1, 0), ("temperature", 0.0, -1e-9)]
)
def test_the_least_of_each_option(option, least, refused, model, tokenizer):
    options = {"max_new_tokens": 1} | {option: least}
    assert generate(model, tokenizer, PROMPT, **options).tokens == 1
    with pytest.raises(InputError, match=f"^`{option}` must be .*, got {refused}"):
        generate(model, tokenizer, PROMPT, **{option: refused})
