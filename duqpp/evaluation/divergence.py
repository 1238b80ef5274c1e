"""How far a model's next-token distributions are from the float model's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duqpp.errors import InputError
from duqpp.evaluation.head import Head
from duqpp.placement import HOST


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference, over the positions that perplexity predicts.

    kl: mean over positions of KL(reference || model), in nats per token. agreement: share of
    positions where both give their largest logit to the same token, in [0, 1]. window_kl,
    window_agreement: the means of each window, whose mean they are. All 0 and 1 for a model like
    its reference; float32 logits leave about 1e-6 nats of noise in a window.
    """

    kl: float
    agreement: float
    window_kl: list[float]
    window_agreement: list[float]

    @classmethod
    def of_windows(cls, kl: list[float], agreement: list[float]) -> "Divergence":
        """From the means of each window; windows are equally long."""
        mean_kl, mean_agreement = (
            float(torch.tensor(v, dtype=torch.float64, device=HOST).mean()) for v in (kl, agreement)
        )
        return cls(mean_kl, mean_agreement, kl, agreement)


@dataclass(frozen=True)
class Reference:
    """What is kept of a float model to compare others with, on the tokens it was evaluated on.

    Its logits would be vocabulary / hidden size times as large: they are computed again, a chunk
    at a time.

    tokens: int64 [windows, seq_len]. hidden: of each window, the final hidden states at all
    positions but the last, in the model's dtype on the CPU: [seq_len - 1, hidden size]. head: from
    those to the model's logits.
    """

    tokens: Tensor
    hidden: list[Tensor]
    head: Head

    def check(self, tokens: Tensor, vocabulary: int) -> None:
        """Raise InputError unless a model with this vocabulary, on these tokens, compares."""
        own = self.head.vocabulary
        if own != vocabulary:
            raise InputError(
                f"the reference's vocabulary has {own} tokens, the model's {vocabulary}: "
                "a reference is the float model that the model was quantized from"
            )
        if not torch.equal(self.tokens, tokens):
            raise InputError(
                "the reference was evaluated on other tokens: its tokenizer is not the model's, "
                "or it was given other windows"
            )
