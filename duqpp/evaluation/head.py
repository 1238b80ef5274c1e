"""From the states that leave a model's last norm to its logits."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Head:
    """What a model makes of its final states: logits.

    Beside the product with lm_head that may be a multiplier, or a cap: a whole model's own forward
    computes it, over states that are given in place of its decoder's.

    Args: lm_head: of the model. logits: from states [1, tokens, hidden size] to logits [1, tokens,
        vocabulary]; by default lm_head alone.
    """

    def __init__(
        self, lm_head: nn.Linear, logits: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.lm_head = lm_head
        self._logits = logits or lm_head

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a transformers causal language model, of which it keeps no other part."""
        body = model.base_model_prefix
        alone = copy.copy(model)
        # A model that accelerate has dispatched has a forward of its own, which keeps all of it.
        alone.__dict__.pop("forward", None)
        alone._modules = {**model._modules, body: _GivenStates()}

        def logits(states: Tensor) -> Tensor:
            found: Tensor = alone(inputs_embeds=states, use_cache=False).logits
            return found

        return cls(model.get_output_embeddings(), logits)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are logits for."""
        return len(self.lm_head.weight)

    def __call__(self, states: Tensor) -> Tensor:
        """Float32 logits [tokens, vocabulary], where the head computes, of states [tokens, K]."""
        device = self.lm_head.weight.device
        # A head that accelerate has offloaded is on the meta device, and fetches its input itself.
        states = states if device.type == "meta" else states.to(device)
        return self._logits(states[None])[0].float()


class _States(tuple[Tensor]):
    """What a decoder returns, without whatever else a model may ask of it, such as a cache."""

    @property
    def last_hidden_state(self) -> Tensor:
        """[batch, tokens, hidden size]."""
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _GivenStates(nn.Module):
    """In place of a decoder: the embeddings that it is called with are what it returns."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _States:
        """The states of `inputs_embeds` alone."""
        return _States((inputs_embeds,))
