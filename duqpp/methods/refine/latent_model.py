"""A whole model whose weights are trained through their rounding, of which ranks have parts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.methods.base import Block
from duqpp.methods.refine.latent import to_latents
from duqpp.methods.refine.schedule import root_mean_square
from duqpp.ops import quantize
from duqpp.placement import HOST
from duqpp.placement.ranks import Ranks

# What a block's products give is kept for the gradients on a CPU, where they take most of the time:
# for a batch as many values as the block has weights, were the hidden size the tokens of the batch.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


Codes = dict[int, dict[str, MXFP4Tensor]]  # by block and linear


class LatentModel:
    """All decoder blocks of a model in a row, with a latent in the place of each quantized weight.

    Of several ranks each has some rows of every latent (FSDP2): a block's are whole only while it
    computes, and a rank gets the mean over ranks of the gradients of its rows.

    rows: by block and linear, this rank's part of a latent, float32 [n, K], which shares its
    memory. sizes: in their order, the root mean square of each whole latent.

    Args:
        blocks: with the latents of their linears, in order; read once. The codes of the linears are
            let go of.
        rule: scale rule of the weights.
    """

    def __init__(
        self, blocks: Iterable[tuple[Block, Mapping[str, Tensor]]], rule: ScaleRule, ranks: Ranks
    ) -> None:
        self._rule, self._ranks = rule, ranks
        self.rows: dict[int, dict[str, nn.Parameter]] = {}
        self.sizes: list[float] = []
        self._chain = _Chain()
        for block, latents in blocks:
            trained = to_latents(block.module, block.groups, latents, rule=rule)
            self.sizes += [root_mean_square(latent) for latent in trained.values()]
            self._shard(block.module)
            linears: dict[str, Any] = {n: block.module.get_submodule(n) for n in trained}
            for linear in linears.values():
                linear.forget_linear()
            self.rows[block.index] = {
                name: nn.Parameter(self._local(linear.latent)) for name, linear in linears.items()
            }
            self._chain.blocks.append(block.module)
        self._shard(self._chain)

    @property
    def all_rows(self) -> list[nn.Parameter]:
        """`rows` of all blocks, in order."""
        return [own for rows in self.rows.values() for own in rows.values()]

    def __call__(self, hidden: Tensor, arguments: list[dict[str, Any]]) -> Tensor:
        """What leaves the last block. Args: arguments: of each block, its keywords."""
        out: Tensor = self._chain(hidden, arguments)
        return out

    def on_gradient(self, take: Callable[[nn.Parameter], None]) -> None:
        """Call `take` with each of the rows as soon as a backward pass has made their gradient.

        It is to leave them without: the gradients of all weights are never there together.
        """

        def hand_over(own: nn.Parameter, latent: nn.Parameter) -> None:
            own.grad, latent.grad = self._local(latent.grad), None
            take(own)

        for block, rows in zip(self._chain.blocks, self.rows.values(), strict=True):
            for name, own in rows.items():
                latent: Any = block.get_submodule(name).latent
                latent.register_post_accumulate_grad_hook(partial(hand_over, own))

    def codes(self) -> Codes:
        """What the rows are rounded to."""
        return {
            index: {name: quantize(own.detach(), rule=self._rule) for name, own in rows.items()}
            for index, rows in self.rows.items()
        }

    def gathered(self, codes: Codes | None) -> Iterator[dict[str, MXFP4Tensor]]:
        """Block by block the whole weights that ranks have rows of; none without codes."""
        gather = self._ranks.gather
        for index in self.rows:
            own = codes[index] if codes else {}
            yield {n: MXFP4Tensor(gather(w.codes), gather(w.scales)) for n, w in own.items()}

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor [N, ...] that belongs to a latent."""
        rows = -(-len(whole) // self._ranks.count)  # as torch.chunk splits them, and so FSDP2
        return whole[rows * self._ranks.index : rows * (self._ranks.index + 1)]

    def _shard(self, module: nn.Module) -> None:
        """Leave each rank its rows of a module's latents, until it computes."""
        if self._ranks.count == 1:
            return
        # Imported here, since it takes a while and one process does without.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        parameters = list(module.parameters())
        mesh = init_device_mesh(parameters[0].device.type, (self._ranks.count,))
        frozen = {parameter for parameter in parameters if not parameter.requires_grad}
        fully_shard(module, mesh=mesh, ignored_params=frozen)

    def _local(self, tensor: Any) -> Tensor:
        """This rank's part of a tensor that `_shard` may have made one of all ranks."""
        own: Tensor = tensor.detach() if self._ranks.count == 1 else tensor.detach().to_local()
        return own


class _Chain(nn.Module):
    """Blocks one after another; what one computes inside is computed again for its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()

    def forward(self, x: Tensor, arguments: list[dict[str, Any]]) -> Tensor:
        options: dict[str, Any] = {}
        if x.device.type == HOST.type:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
        for block, own in zip(self.blocks, arguments, strict=True):
            out = checkpoint(block, x, use_reentrant=False, **options, **own)
            x = out[0] if isinstance(out, tuple) else out
        return x
