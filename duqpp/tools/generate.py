"""generate: continue a prompt, greedily or by sampling."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from duqpp.config import DESCRIPTIONS
from duqpp.errors import InputError, refusing
from duqpp.models.positions import positions


@dataclass(frozen=True)
class Generation:
    """text: the continuation alone. tokens: how many it has. seconds: prompt included."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, the time for the prompt included."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    stream: bool = False,
) -> Generation:
    """Continue a prompt until an end-of-text token or `max_new_tokens`.

    Args:
        model, tokenizer: a transformers causal language model, and its tokenizer.
        temperature: 0 takes the likeliest token each time; above 0 samples, seeded by `seed`.
        chat: put the prompt into the tokenizer's chat template, as the user's message.
        stream: print the text to stdout as it comes.
    Raises: InputError for a prompt without tokens or too long for the model, an option out of
        range, or `chat` without a template.
    """
    if max_new_tokens < 1:
        raise InputError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise InputError(f"`temperature` must be 0 (greedy) or above, got {temperature}")
    DESCRIPTIONS["seed"].check("seed", seed)
    encoded = _encode(tokenizer, prompt, chat)
    prompt_tokens = encoded["input_ids"].shape[1]
    limit = positions(model.config)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens; with {max_new_tokens} new ones that exceeds "
            f"the model's {limit} positions: lower `max_new_tokens`, or shorten the prompt"
        )
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature}
    if stream:
        options["streamer"] = _streamer(tokenizer)
    started = time.monotonic()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)  # transformers samples from the global generator
        with refusing("the model cannot continue the prompt"), _own_line(stream):
            output = model.generate(
                input_ids=encoded["input_ids"].to(model.device),
                attention_mask=encoded["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,
                **options,
            )
            new = output[0, prompt_tokens:]
            text = tokenizer.decode(new, skip_special_tokens=True)
    seconds = time.monotonic() - started
    return Generation(text, prompt_tokens, new.numel(), seconds)


@contextmanager
def _own_line(streamed: bool) -> Iterator[None]:
    """What is said of an error stands below the text that was printed before it."""
    try:
        yield
    except BaseException:
        if streamed:
            print(flush=True)
        raise


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """input_ids and attention_mask, int64 [1, tokens]."""
    if not chat:
        with refusing("the model's tokenizer cannot read the prompt"):
            encoded = tokenizer(prompt, return_tensors="pt")
        if encoded["input_ids"].numel() == 0:
            raise InputError("the prompt is empty")
        return encoded
    if not _has_chat_template(tokenizer):
        raise InputError("the model's tokenizer has no chat template: leave out `chat`")
    with refusing("the model's chat template cannot take the prompt"):
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    if encoded["input_ids"].numel() == 0:
        raise InputError("the model's chat template makes nothing of the prompt")
    return encoded


def _has_chat_template(tokenizer: Any) -> bool:
    """Whether there is one, or a tokenizer such as mistral-common's, which does without."""
    from transformers import PreTrainedTokenizerBase

    reads_template = PreTrainedTokenizerBase.apply_chat_template
    is_own = getattr(type(tokenizer), "apply_chat_template", None) is not reads_template
    return is_own or bool(tokenizer.chat_template)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
