"""refine="distill": train all codes together on the float model's next-token distribution."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from duqpp.checkpoint.shard import Progress
from duqpp.format import ScaleRule
from duqpp.methods.base import QuantizedModel, TrainedModel
from duqpp.methods.refine.latent_model import LatentModel
from duqpp.methods.refine.schedule import EarlyStopping, LatentOptimizer, held_back, shuffled
from duqpp.methods.refine.training_state import TrainingState
from duqpp.methods.reports import DistillReport
from duqpp.models.logits import LOGIT_TOKENS, kl_and_agreement

# Root-mean-square of a weight's change in one step of Adam. On SmolLM2-135M a rate of 0.001 raised
# the held-out divergence from 0.16 to 0.22 nats in 32 steps, 0.0003 lowered it.
_RATE = 3e-4
_BETAS = (0.9, 0.99)
EPOCHS = 2
CHECK_STEPS = 16  # between checks of the held-back divergence, after which the state is saved


def distill(
    model: QuantizedModel,
    rule: ScaleRule,
    state: Path,
    generator: torch.Generator,
    progress: Progress,
) -> TrainedModel:
    """Train the weights of all blocks through their rounding.

    The latents of the whole model and Adam's two moments are in memory, of several ranks in that of
    all together, and what is inside of one block for one batch. The codes with the least
    divergence on held-back batches are kept, and nothing is changed where that is the start;
    training stops early when checks are clearly worse.

    Every step is on one batch, however many ranks there are: each has some of its sequences, and
    those that have none wait for the others. So the result is the same but for the order of sums.

    Args:
        rule: scale rule of the weights.
        state: file that an interrupted job is continued from, by any number of ranks.
        generator: of the order of batches.
        progress: called with ("distill", steps done, steps in all).
    """
    latents = LatentModel(model.blocks, rule, model.ranks)
    held = held_back(len(model.exact))
    order = [batch for _ in range(EPOCHS) for batch in shuffled(held.start, generator)]
    optimizer = LatentOptimizer(
        latents.all_rows, rate=_RATE, steps=len(order), betas=_BETAS, sizes=latents.sizes
    )
    latents.on_gradient(optimizer.apply)
    stopping = EarlyStopping(
        lambda: sum(_divergence_of(model, latents, batch) for batch in held) / len(held),
        latents.codes,
    )
    saved = TrainingState(state, latents, optimizer, stopping, model.ranks)
    saved.restore()
    with torch.enable_grad():
        while optimizer.done < len(order):
            progress("distill", optimizer.done, len(order))
            _backward(model, latents, order[optimizer.done])
            optimizer.done += 1
            if optimizer.done == len(order):
                stopping.check()
            elif optimizer.done % CHECK_STEPS == 0:
                if not stopping.check():
                    break
                saved.save()
    progress("distill", len(order), len(order))
    report = DistillReport(stopping.first, stopping.least, optimizer.done)
    return TrainedModel(report, latents.gathered(stopping.best))


def _backward(model: QuantizedModel, latents: LatentModel, batch: int) -> None:
    """Let the latents take the gradient of a batch's divergence."""
    part = _part(model, batch)
    out = latents(part.hidden, part.arguments)
    gradient = divergence_gradient(out.detach(), part.exact, model.head)
    # Ranks take the mean of what each has.
    out.backward(gradient * (part.share * model.ranks.count))


def _divergence_of(model: QuantizedModel, latents: LatentModel, batch: int) -> float:
    """The divergence over the tokens of a batch, by all ranks together."""
    part = _part(model, batch)
    own = divergence(latents(part.hidden, part.arguments), part.exact, model.head)
    return sum(model.ranks.all(own * part.share))


class _Part(NamedTuple):
    """This rank's sequences of a batch: what enters the first block, the blocks' other arguments,
    what leaves the float model's last one; and how much of the batch they are."""

    hidden: Tensor
    arguments: list[dict[str, Any]]
    exact: Tensor
    share: float


def _part(model: QuantizedModel, batch: int) -> _Part:
    """A rank for which there is no sequence computes on the first one, which counts for nothing:
    all ranks are needed for each other's weights."""
    hidden, arguments = model.inputs.hidden[batch], model.inputs.arguments[batch]
    sequences = len(hidden)
    own = model.ranks.share(sequences)
    share = (own.stop - own.start) / sequences
    rows = own if share else slice(1)

    def cut(value: Any) -> Any:
        of_each = isinstance(value, Tensor) and value.dim() > 1 and len(value) == sequences
        return value[rows] if of_each else value

    compute = model.inputs.placement.compute
    if share < 1:
        arguments = tree_map(cut, arguments)
    return _Part(hidden[rows].to(compute), arguments, model.exact[batch][rows], share)


def divergence(hidden: Tensor, exact: Tensor, head: nn.Module) -> float:
    """Mean KL(float || quantized) in nats over the tokens of hidden states [..., hidden]."""
    total, tokens = 0.0, 0
    for own, other in _parts(hidden, exact):
        total += kl_and_agreement(head(other).float(), head(own).float())[0]
        tokens += len(own)
    return total / tokens


def divergence_gradient(hidden: Tensor, exact: Tensor, head: nn.Module) -> Tensor:
    """The gradient of `divergence` with respect to hidden, in its shape and dtype."""
    gradients = []
    for own, other in _parts(hidden, exact):
        own = own.detach().requires_grad_()
        logits = head(own)
        with torch.no_grad():  # of the logits: q - p
            gradient = logits.float().softmax(-1)
            gradient -= head(other).float().softmax(-1)
        logits.backward(gradient.to(logits.dtype))
        gradients.append(own.grad)
    tokens = hidden.numel() // hidden.shape[-1]
    return torch.cat(gradients).view_as(hidden) / tokens


def _parts(hidden: Tensor, exact: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    exact = exact.to(hidden.device)
    both = (h.flatten(0, -2).split(LOGIT_TOKENS) for h in (hidden, exact))
    return zip(*both, strict=True)
