"""Channel scales that move magnitude from activations into weights.

Source: SmoothQuant (arXiv 2211.10438), equation 4, as used by DuQuant and DuQuant++.
"""

import torch
from torch import Tensor

# Scales outside these bounds come from channels that are all but unused; they would only ruin the
# conditioning of a rotation that has the scales folded in.
_LEAST, _MOST = 2.0**-7, 2.0**7


def smoothing_scales(activation_amax: Tensor, weight_amax: Tensor, alpha: float) -> Tensor:
    """s = amax(x)**alpha / amax(W)**(1 - alpha); activations are divided by s, weights multiplied.

    Args:
        activation_amax, weight_amax: float [K], largest magnitude of each input channel.
        alpha: 0 smooths by the weights alone, 1 makes all activation peaks equal.
    Returns: float64 [K], geometric mean 1 before clipping; 1 where either amax is 0.
    """
    activation, weight = activation_amax.double(), weight_amax.double()
    used = (activation > 0) & (weight > 0)
    log_scales = torch.zeros_like(activation)
    log_scales[used] = alpha * activation[used].log() - (1 - alpha) * weight[used].log()
    log_scales[used] -= log_scales[used].mean() if used.any() else 0.0
    return log_scales.exp().clamp_(_LEAST, _MOST)


def per_source_channel(amax: Tensor, *, repeats: int, head_dim: int) -> Tensor:
    """Reduce amax [heads * head_dim] of o_proj's inputs to v_proj's outputs [kv_heads * head_dim].

    With grouped-query attention one value channel feeds `repeats` query heads, so that they share a
    smoothing scale: the largest of them counts.
    """
    return amax.view(-1, repeats, head_dim).amax(1).flatten()


def per_repeated_channel(scales: Tensor, *, repeats: int, head_dim: int) -> Tensor:
    """The other direction: each value channel's scale [kv_heads * head_dim] for all its readers."""
    return scales.view(-1, 1, head_dim).expand(-1, repeats, -1).flatten()


def representable(scales: Tensor, stored: Tensor) -> Tensor:
    """Nudge s so that stored / s is exact in the dtype of `stored`.

    A producer (a norm weight, a bias) keeps its dtype. Dividing it by the nudged scale rounds
    nothing, so the function of the model is preserved exactly.

    Args:
        scales: float64 [K].
        stored: floating point [K], what will be divided by the scales.
    Returns: float64 [K]; unchanged where `stored` is 0, and 1 where the quotient leaves the range
        of its dtype, by overflow or by vanishing.
    """
    rounded = (stored.double() / scales).to(stored.dtype).double()
    held = rounded.isfinite() & (rounded != 0)
    nudged = torch.where(held, stored.double() / rounded, torch.ones_like(scales))
    return torch.where(stored == 0, scales, nudged)
