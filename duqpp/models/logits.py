"""Logits of a model and its reference, in parts that fit the memory."""

import torch
from torch import Tensor

LOGIT_TOKENS = 256  # logits of this many tokens at a time: [256, vocabulary] in float32


def kl_and_agreement(reference: Tensor, logits: Tensor) -> tuple[float, int]:
    """Sums over tokens, for logits float32 [tokens, vocabulary] on one device.

    Returns: the sum of KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, p being the softmax of
    the reference and q of logits, its terms in float32 and their sum in float64; and the number of
    tokens where both have their maximum at one place, the first of equal ones.
    """
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)
    return float(kl), int((reference.argmax(-1) == logits.argmax(-1)).sum())
