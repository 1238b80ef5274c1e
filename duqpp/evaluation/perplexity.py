"""Perplexity, in the convention of the quantization papers, and divergence from a float model."""

import itertools
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from duqpp.checkpoint.shard import Progress
from duqpp.errors import InputError
from duqpp.evaluation.divergence import Divergence, Reference
from duqpp.evaluation.final_states import WINDOW, final_states, rounds
from duqpp.evaluation.head import Head
from duqpp.models.logits import LOGIT_TOKENS, kl_and_agreement
from duqpp.models.positions import check_seq_len
from duqpp.placement import HOST
from duqpp.placement.devices import fitting

CONVENTION = (
    "text tokenized whole without added special tokens, cut into non-overlapping windows, "
    "tail dropped; exp of the mean over windows of each window's mean next-token NLL"
)


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: exp of the mean of window_nll. window_nll: mean NLL in nats of each window.

    divergence: from the reference, if one was given.
    """

    perplexity: float
    window_nll: list[float]
    seq_len: int
    windows: int
    seconds: float
    divergence: Divergence | None = None
    convention: str = CONVENTION

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def check_windowing(seq_len: int, windows: int | None) -> None:
    """Raise InputError for numbers that suit no model, before one is loaded."""
    if seq_len < 2:
        raise InputError(f"`seq_len` must be at least 2, got {seq_len}")
    if windows is not None and windows < 1:
        raise InputError(f"`windows` must be at least 1, got {windows}")


def perplexity(
    model: Any,
    tokens: Tensor,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model over non-overlapping windows.

    Args:
        model: a transformers causal language model, of any family; or a stack, from
            `duqpp.evaluation.models.open_model`, of which one decoder block is in memory at a time.
        tokens: int64 [tokens], the whole text.
        seq_len: window length in tokens; each window predicts seq_len - 1 of them.
        windows: how many, from the beginning; None is all.
        reference: the float model's, from `perplexity_and_reference` with the same tokens, seq_len
            and windows; the result then has the divergence from it.
        progress: called with ("evaluate", steps done, steps in all): a step is a window, of a stack
            a window in one of the blocks or in the head.
    Raises: InputError when the text is shorter than one window, or not in the model's vocabulary,
        a window longer than the model's positions, or the reference of another vocabulary or other
        tokens.
    """
    chosen = _windows(model, tokens, seq_len, windows)
    if reference:
        reference.check(chosen, model.config.vocab_size)
    with fitting(WINDOW, model.device):
        return _evaluate(model, chosen, reference, None, progress)[0]


def perplexity_and_reference(
    model: Any,
    tokens: Tensor,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    progress: Progress | None = None,
) -> tuple[PerplexityResult, Reference]:
    """`perplexity`, and what to compare other models on the same tokens with.

    The reference holds the final hidden states of every window, 2 to 4 bytes times tokens times
    hidden size, and the model's head; the rest of the model can be released.
    """
    chosen, kept = _windows(model, tokens, seq_len, windows), list[Tensor]()
    with fitting(WINDOW, model.device):
        result, head = _evaluate(model, chosen, None, kept, progress)
    return result, Reference(chosen, kept, head)


def _windows(model: Any, tokens: Tensor, seq_len: int, windows: int | None) -> Tensor:
    """The windows to evaluate: [windows, seq_len]. Raises: InputError, as `perplexity` says."""
    check_windowing(seq_len, windows)
    check_seq_len(model.config, seq_len, "windows")
    available = tokens.numel() // seq_len
    if available == 0:
        raise InputError(
            f"evaluation text has {tokens.numel()} tokens, fewer than one window of {seq_len}: "
            "lower `seq_len`, or give more text"
        )
    count = available if windows is None else min(windows, available)
    least, most = (int(token) for token in tokens.aminmax())
    if least < 0 or most >= model.config.vocab_size:
        raise InputError(
            f"evaluation tokens must be in [0, {model.config.vocab_size}), the model's "
            f"vocabulary, got {least} to {most}"
        )
    return tokens[: count * seq_len].view(count, seq_len)


def _evaluate(
    model: Any,
    windows: Tensor,
    reference: Reference | None,
    kept: list[Tensor] | None,
    progress: Progress | None,
) -> tuple[PerplexityResult, Head]:
    """The result over windows [windows, seq_len], and the head; states are appended to `kept`."""
    started = time.monotonic()
    count, seq_len = windows.shape
    steps, total = itertools.count(), count * (rounds(model) + 1)

    def step() -> None:
        if progress:
            progress("evaluate", next(steps), total)

    head, states = final_states(model, windows, step)
    means = []
    for index, window in enumerate(windows):
        step()
        hidden = next(states)[:-1]
        against = (reference, reference.hidden[index]) if reference else None
        sums = _sums(head, hidden, window[1:], against)
        means.append([total / (seq_len - 1) for total in sums])
        if kept is not None:
            kept.append(hidden.to(HOST))
    step()
    nll, kl, agreement = map(list, zip(*means, strict=True))
    mean = torch.tensor(nll, dtype=torch.float64, device=HOST).mean()
    divergence = Divergence.of_windows(kl, agreement) if reference else None
    seconds = time.monotonic() - started
    return PerplexityResult(float(mean.exp()), nll, seq_len, count, seconds, divergence), head


@torch.no_grad()
def _sums(
    head: Head, hidden: Tensor, targets: Tensor, against: tuple[Reference, Tensor] | None
) -> tuple[float, float, int]:
    """Sums over the tokens of a window, from logits that are never whole.

    Args: hidden: final states [tokens, hidden size]. targets: int64 [tokens], each the next token.
        against: a reference, and its hidden states of this window.
    Returns: NLL and KL in nats, and how many largest logits agree; the latter 0 without reference.
    """
    nll, kl, agreeing = 0.0, 0.0, 0
    for start in range(0, len(targets), LOGIT_TOKENS):
        part = slice(start, start + LOGIT_TOKENS)
        logits = head(hidden[part])
        nll += float(F.cross_entropy(logits, targets[part].to(logits.device), reduction="sum"))
        if against:
            reference, theirs = against
            there = reference.head(theirs[part]).to(logits.device)
            chunk_kl, chunk_agreeing = kl_and_agreement(there, logits)
            kl, agreeing = kl + chunk_kl, agreeing + chunk_agreeing
    return nll, kl, agreeing
