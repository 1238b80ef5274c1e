"""Perplexity, in the convention of the quantization papers."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from duqpp.errors import InputError
from duqpp.models.checkpoint import Progress

CONVENTION = (
    "text tokenized whole without added special tokens, cut into non-overlapping windows, "
    "tail dropped; exp of the mean over windows of each window's mean next-token NLL"
)
_LOGIT_TOKENS = 256  # logits of this many tokens at a time: [256, vocabulary] in float32


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: exp of the mean of window_nll. window_nll: mean NLL in nats of each window."""

    perplexity: float
    window_nll: list[float]
    seq_len: int
    windows: int
    seconds: float
    convention: str = CONVENTION

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def perplexity(
    model: Any,
    tokens: Tensor,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model over non-overlapping windows.

    Args:
        model: a transformers causal language model, with `.model` and `.lm_head`.
        tokens: int64 [tokens], the whole text.
        seq_len: window length in tokens; each window predicts seq_len - 1 of them.
        windows: how many, from the beginning; None is all.
        progress: called with ("evaluate", windows done, windows in all).
    Raises: InputError when the text is shorter than one window, or not in the model's vocabulary.
    """
    if seq_len < 2:
        raise InputError(f"seq_len must be at least 2, got {seq_len}")
    available = tokens.numel() // seq_len
    if available == 0:
        raise InputError(
            f"evaluation text has {tokens.numel()} tokens, fewer than one window of {seq_len}: "
            "lower --seq-len, or give more text"
        )
    count = available if windows is None else min(windows, available)
    if count < 1:
        raise InputError(f"windows must be at least 1, got {windows}")
    least, most = (int(token) for token in tokens.aminmax())
    if least < 0 or most >= model.config.vocab_size:
        raise InputError(
            f"evaluation tokens must be in [0, {model.config.vocab_size}), the model's "
            f"vocabulary, got {least} to {most}"
        )
    started = time.monotonic()
    nll = []
    for index, window in enumerate(tokens[: count * seq_len].view(count, seq_len)):
        if progress:
            progress("evaluate", index, count)
        nll.append(_window_nll(model, window[None].to(model.device)))
    if progress:
        progress("evaluate", count, count)
    mean = torch.tensor(nll, dtype=torch.float64).mean()
    return PerplexityResult(float(mean.exp()), nll, seq_len, count, time.monotonic() - started)


@torch.no_grad()
def _window_nll(model: Any, window: Tensor) -> float:
    """Mean NLL in nats of tokens 1.. of a window [1, seq_len], each given those before it."""
    hidden = model.model(input_ids=window, use_cache=False).last_hidden_state[0, :-1]
    total = 0.0
    parts = zip(hidden.split(_LOGIT_TOKENS), window[0, 1:].split(_LOGIT_TOKENS), strict=True)
    for part, targets in parts:
        logits = model.lm_head(part).float()
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
    return total / (window.shape[1] - 1)
