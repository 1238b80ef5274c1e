"""How long a sequence a model is made for."""

from typing import Any

from duqpp.errors import InputError

# Kinds of rope scaling that make a model's positions `factor` times as many as before it; "dynamic"
# follows any length.
_EXTENDING = ("linear", "yarn", "llama3", "longrope")


def positions(config: Any) -> int | None:
    """The most tokens that a sequence may have, rope scaling included; None where any number.

    Args: config: a model's transformers configuration.
    """
    own: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if own is None or kind == "dynamic":
        return None
    if kind in _EXTENDING and factor:
        before = rope.get("original_max_position_embeddings") or own
        return max(own, int(before * factor))
    return own


def check_seq_len(config: Any, seq_len: int, what: str) -> None:
    """Raise InputError where sequences of `seq_len` tokens exceed the model's positions.

    Args: what: the sequences are called.
    """
    limit = positions(config)
    if limit is not None and seq_len > limit:
        raise InputError(
            f"{what} of {seq_len} tokens exceed the model's {limit} positions: lower `seq_len`"
        )
