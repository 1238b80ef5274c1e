"""Continuing a prompt: greedy decoding, seeded sampling, the chat template."""

import math

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


# What libraries raise.


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('Conversation roles must alternate') }}",
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% for m in messages %}{{ m.content }",
        "{{ messages[1].content }}",
        "{{ 1 / 0 }}",
        "{{ messages | nofilter }}",
        "{% include 'other' %}",
        "{{ messages.__class__.__mro__ }}",
        {"tool_use": "{{ messages }}", "rag": "{{ messages }}"},
    ],
)
def test_a_template_that_refuses_is_one_line(template, model, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"^the model's chat template cannot take the pr") as error:
        generate(model, tokenizer, "hello", chat=True)
    assert "\n" not in str(error.value)


def test_a_template_that_makes_nothing_of_the_prompt(model, tokenizer):
    tokenizer.chat_template = "{# all comment #}"
    with pytest.raises(InputError, match="chat template makes nothing of the prompt"):
        generate(model, tokenizer, "hello", chat=True)


def test_named_templates_have_a_default(model, tokenizer):
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "rag": "{{ 1 / 0 }}"}
    assert generate(model, tokenizer, "Rome", chat=True).prompt_tokens == len(tokenizer("Rome")[0])


@pytest.mark.parametrize("template", [None, "", {}])
def test_a_tokenizer_without_a_template(template, model, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"has no chat template: leave out `chat`"):
        generate(model, tokenizer, "hello", chat=True)


class Tekken:
    """As mistral-common's: chats without a template, and a call that takes other options."""

    chat_template = None
    eos_token_id = 1

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def apply_chat_template(self, conversation, **options):
        text = "[INST]" + conversation[0]["content"] + "[/INST]"
        return self._tokenizer(text, return_tensors=options["return_tensors"])

    def decode(self, ids, **options):
        return self._tokenizer.decode(ids, **options)


def test_a_tokenizer_that_needs_no_template(model, tokenizer):
    chat = generate(model, Tekken(tokenizer), "Rome", max_new_tokens=4, chat=True)
    plain = generate(model, tokenizer, "[INST]Rome[/INST]", max_new_tokens=4)
    assert (chat.text, chat.prompt_tokens) == (plain.text, plain.prompt_tokens)


@pytest.mark.parametrize("prompt", ["\ud800", "a \udcff"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_no_text(prompt, chat, model, tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match=r"cannot (read|take) the prompt: "):
        generate(model, tokenizer, prompt, chat=chat)


@pytest.mark.parametrize("prompt", ["<s>", "</s>", "\0", " ", "<s></s><s>"])
def test_prompts_of_few_characters(prompt, model, tokenizer):
    assert generate(model, tokenizer, prompt, max_new_tokens=2).tokens >= 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_a_temperature_that_is_none(value, model, tokenizer):
    with pytest.raises(InputError, match=r"^`temperature` must be 0"):
        generate(model, tokenizer, PROMPT, temperature=value)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 10**30])
def test_a_seed_that_torch_does_not_take(seed, model, tokenizer):
    with pytest.raises(InputError, match=r"^`seed` must lie in \[-9223372036854775808, 18446744"):
        generate(model, tokenizer, PROMPT, temperature=1.0, seed=seed)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_the_ends_of_the_seeds(seed, model, tokenizer):
    assert generate(model, tokenizer, PROMPT, temperature=1.0, seed=seed, max_new_tokens=2).tokens


@pytest.fixture
def own_model(tiny_llama):
    """A model that a test may damage."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.mark.parametrize("stream", [False, True])
def test_sampling_from_what_is_not_a_number_is_one_line(stream, own_model, tokenizer, capsys):
    own_model.lm_head.weight.data[:] = math.nan
    with pytest.raises(InputError, match=r"^the model cannot continue the prompt: probability"):
        generate(own_model, tokenizer, PROMPT, temperature=1.0, stream=stream)
    assert capsys.readouterr().out == ("\n" if stream else "")


@pytest.mark.parametrize("end", ["1", [], ["</s>"], {"a": 1}, [[1]], 1.5, [1, "2"]])
def test_stop_tokens_that_are_none(end, own_model, tokenizer):
    """Whatever transformers makes of them: a text, or one line."""
    own_model.generation_config.eos_token_id = end
    try:
        assert generate(own_model, tokenizer, PROMPT, max_new_tokens=3).tokens <= 3
    except InputError as error:
        assert str(error).startswith("the model cannot continue the prompt: ")
        assert "\n" not in str(error)


@pytest.mark.parametrize("end", [-5, 10**6, [-1, 10**9], None])
def test_stop_tokens_that_never_come(end, own_model, tokenizer):
    own_model.generation_config.eos_token_id = end
    assert generate(own_model, tokenizer, PROMPT, max_new_tokens=5).tokens == 5


def test_tokens_that_the_tokenizer_has_not(own_model, tokenizer, monkeypatch):
    """A sentencepiece model raises IndexError for what only the padded vocabulary has."""

    def refuse(*arguments, **options):
        raise IndexError("piece id is out of range")

    monkeypatch.setattr(tokenizer, "decode", refuse)
    with pytest.raises(InputError, match="cannot continue the prompt: piece id is out of range"):
        generate(own_model, tokenizer, PROMPT, max_new_tokens=2)
