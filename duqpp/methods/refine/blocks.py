"""refine="blocks": train one decoder block's codes to give the float block's outputs."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from duqpp.format import ScaleRule
from duqpp.methods.base import Block
from duqpp.methods.refine.latent import to_codes, to_latents
from duqpp.methods.refine.schedule import (
    EarlyStopping,
    LatentOptimizer,
    backward,
    batches_of_all,
    held_back,
    mean_loss,
    shuffled,
)
from duqpp.methods.reports import RefineReport
from duqpp.models.stack import BlockInputs
from duqpp.ops import quantize
from duqpp.placement.stages import stage

# Root-mean-square of a weight's change in one step of Adam. On SmolLM2-135M, of 0.001, 0.002, 0.004
# and 0.006 the larger ones lowered the held-out loss of the first blocks more.
_RATE = 6e-3
CHECKS = 4  # of the held-back loss, evenly over the steps


def block_loss(
    block: nn.Module, index: int, inputs: BlockInputs, targets: list[Tensor]
) -> Callable[[int], Tensor]:
    """A function from a batch to the mean over its tokens of the squared error of the block's
    outputs over the squared norm of the target; a float32 scalar with a gradient.
    """

    def loss(batch: int) -> Tensor:
        out = inputs.run(block, index, batch).float()
        target = targets[batch].to(out.device).float()
        error = (out - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-30)
        return error.mean()

    return loss


@stage("refine")
def refine_block(
    block: Block,
    latents: Mapping[str, Tensor],
    inputs: BlockInputs,
    targets: list[Tensor],
    rule: ScaleRule,
    generator: torch.Generator,
    *,
    calibrating: int = 0,
) -> tuple[RefineReport, dict[str, Tensor]]:
    """Train the weights of a quantized block through their rounding, in place.

    The block reads the quantized stream and is asked for the float stream's outputs, so that it
    also makes up for what the blocks before it got wrong. Batches are seen once, in an order that
    is the same for any number of ranks. The latents with the least loss on held-back batches are
    kept, and nothing is changed where that is the start; training stops early when checks are
    clearly worse.

    Args:
        latents: by linear, from `Sequential.quantize_groups`.
        inputs: of the quantized stream. targets: the float block's outputs in the float stream,
            batch by batch.
        rule: scale rule of the weights. generator: of the order of batches. calibrating: how many
            of this rank's batches calibrate; the others, behind them, only refine.
    Returns: the report; and the latents of the codes that stay, by linear.
    Raises: InputError when there are fewer than two batches.
    """
    ranks = inputs.placement.ranks
    batches = batches_of_all(ranks, calibrating, len(inputs.hidden) - calibrating)
    held = held_back(len(batches))
    module, groups = block.module, block.groups
    parameters = to_latents(module, groups, latents, rule=rule)
    loss = block_loss(module, block.index, inputs, targets)
    stopping = EarlyStopping(
        lambda: mean_loss(loss, batches[held.start :], ranks),
        lambda: {name: latent.detach().clone() for name, latent in parameters.items()},
    )
    if not groups:  # all skipped
        return RefineReport(stopping.first, stopping.least, 0), {}
    order = shuffled(held.start, generator)
    optimizer = LatentOptimizer(parameters.values(), rate=_RATE, steps=len(order))
    steps, every = 0, -(-len(order) // CHECKS)
    with torch.enable_grad():
        for batch in order:
            backward(loss, batches[batch], parameters.values(), ranks)
            optimizer.step()
            steps += 1
            if (steps % every == 0 or steps == len(order)) and not stopping.check():
                break
    report = RefineReport(stopping.first, stopping.least, steps)
    if stopping.best is None:
        to_codes(module, groups, None)
        return report, dict(latents)
    to_codes(module, groups, {n: quantize(w, rule=rule) for n, w in stopping.best.items()})
    return report, stopping.best
