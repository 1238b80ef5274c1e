"""What transformers gives for the same checkpoint, which vLLM must equal."""

from pathlib import Path

import torch
from torch import Tensor

import duqpp
from tests.vllm.engine import Generated


class Reference:
    """A duqpp checkpoint in transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = duqpp.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(self, tokens: list[int], attention: str = "sdpa") -> Tensor:
        """Log-probabilities [len(tokens) - 1, vocabulary] of what follows each token, float64."""
        self.model.set_attn_implementation(attention)
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits
        return logits[0, :-1].double().log_softmax(-1)


def differences(
    reference: Reference, prompts: list[list[int]], generated: list[Generated]
) -> dict[str, float]:
    """How vLLM's answers differ from transformers.

    A token counts as equal when it is the likeliest after the tokens before it, so that all are
    equal exactly when greedy decoding gives the same.

    Returns: equal, tokens: counts. deviation: largest difference of two log-probabilities, over all
        positions, and the tokens there for which vLLM gives one. own: the same between two of
        transformers' own attention kernels.
    """
    equal = tokens = 0
    deviation = own = 0.0
    for prompt, answer in zip(prompts, generated, strict=True):
        sequence = [*prompt, *answer.tokens]
        expected, other = reference.logprobs(sequence), reference.logprobs(sequence, "eager")
        greedy = expected[len(prompt) - 1 :].argmax(-1).tolist()
        tokens += len(greedy)
        equal += sum(a == b for a, b in zip(greedy, answer.tokens, strict=True))
        for row, twin, given in zip(expected, other, answer.logprobs, strict=True):
            for token, value in given.items():
                deviation = max(deviation, abs(value - float(row[token])))
                own = max(own, abs(float(row[token] - twin[token])))
    return {"equal": equal, "tokens": tokens, "deviation": deviation, "own": own}
