"""The calibration sequences of a job, and what they make enter the first decoder block."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from duqpp.calibration.text import CalibrationText
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.methods.base import Streams
from duqpp.models.positions import check_seq_len
from duqpp.models.stack import DecoderStack
from duqpp.placement import HOST
from duqpp.placement.stages import stage

# Text by name, read already, or tokens int64 [samples, seq_len].
Calibration: TypeAlias = str | CalibrationText | Tensor


@stage("tokens")
def calibration_tokens(
    model_config: Any, tokenizer: Any, config: QuantizeConfig, calibration: Calibration
) -> tuple[Tensor | None, str, QuantizeConfig]:
    """Token sequences, or None where no activations are read; and what the data are called.

    And the options, with as many refine_samples as a text has.
    """
    if not config.needs.inputs:
        return None, "none", config
    if isinstance(calibration, Tensor):
        tokens, name = calibration, "tokens"
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise InputError(
                "calibration tokens must be int64 [samples, seq_len], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        tokens = tokens.to(HOST)
    else:
        if isinstance(calibration, str):
            calibration = CalibrationText.read(calibration)
        text, name = calibration.tokenized(tokenizer), calibration.name
        config = config.for_text(text.most(config.seq_len))
        tokens = text.sequences(samples=config.sequences, seq_len=config.seq_len, seed=config.seed)
    check_seq_len(model_config, tokens.shape[1], "calibration sequences")
    least, most = (int(token) for token in tokens.aminmax())
    if least < 0 or most >= model_config.vocab_size:
        raise InputError(
            f"calibration tokens must be in [0, {model_config.vocab_size}), the model's "
            f"vocabulary, got {least} to {most}"
        )
    if config.needs.refining:
        tokens = _spread_first(tokens, config.samples)
    return tokens, name, config


def first_streams(stack: DecoderStack, tokens: Tensor | None, config: QuantizeConfig) -> Streams:
    """What enters the first block.

    Args: tokens: int64 [sequences, seq_len], those that calibrate before those that only refine;
        None for a method that reads no activations.
    """
    if tokens is None:
        return Streams()
    inputs = stack.first_inputs(tokens[: config.samples] if config.needs.refining else tokens)
    calibrating = len(inputs.hidden)
    if config.needs.refining:
        inputs = inputs.joined(stack.first_inputs(tokens[config.samples :]))
    exact = inputs.first(len(inputs.hidden)) if config.needs.float_stream else None
    return Streams(inputs, exact, calibrating)


def _spread_first(tokens: Tensor, count: int) -> Tensor:
    """Sequences reordered: first `count` that are spread evenly over all, then the others."""
    if len(tokens) <= count:
        raise InputError(f"refine needs more than {count} calibration sequences")
    places = torch.linspace(0, len(tokens) - 1, count, dtype=torch.float32, device=HOST)
    chosen = places.round().long()
    others = torch.ones(len(tokens), dtype=torch.bool, device=HOST)
    others[chosen] = False
    return torch.cat((tokens[chosen], tokens[others]))
