"""Quantize a float checkpoint while transformers loads it, one weight at a time."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps

from duqpp.checkpoint.layout import Layout
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.format import MXFP4Tensor
from duqpp.models.family import Family
from duqpp.models.stack import check_finite
from duqpp.placement import HOST
from duqpp.rotation import InputTransform


class QuantizeOnLoad(ConversionOps):
    """Puts an MXFP4Linear in the place of a float linear whose weight has just been read.

    failures: errors so far. transformers would wrap them in reports of its own: whoever made this
        raises the first one when loading is over, and until then nothing more is quantized.
    """

    def __init__(self, layout: Layout, config: QuantizeConfig, family: Family) -> None:
        self.layout, self._family, self._method = layout, family, config.build_method()
        self.failures: list[InputError] = []

    def convert(
        self,
        input_dict: dict[str, Any],
        *_: Any,
        model: Any,
        full_layer_name: str,
        missing_keys: set[str],
        **__: Any,
    ) -> dict[str, Tensor]:
        """From {"NAME.weight": float [N, K]} to the tensors of NAME by their names in the model."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        if self.failures:
            return {}
        try:
            packed, transform = self._quantize(name, weight.to(HOST))
        except InputError as error:
            self.failures.append(error)
            return {}
        linear = model.get_submodule(name)
        quantized = self.layout.empty_linear(linear, device="meta")
        quantized.bias = linear.bias  # loaded already, or still to be
        model.set_submodule(name, quantized)
        missing_keys.discard(full_layer_name)
        if transform.rotation is not None:  # not to be offloaded: a buffer
            quantized.rotation = transform.rotation.matrix.to(weight.device, copy=True)
        tensors = {"weight_packed": packed.codes.clone(), "weight_scale": packed.scales.clone()}
        return {f"{name}.{kind}": tensor.to(weight.device) for kind, tensor in tensors.items()}

    def _quantize(self, name: str, weight: Tensor) -> tuple[MXFP4Tensor, InputTransform]:
        """A linear by its name in the model, such as "model.layers.3.mlp.up_proj"."""
        check_finite(weight, f"{name}.weight")
        found = self._family.group_of(name)
        assert found is not None, "the quantizer names linears of the family"
        index, group = found
        block = self._family.block_name(index)
        alone = replace(group, linears=(name.removeprefix(f"{block}."),))
        return self._method.quantize_linear(block, alone, weight)
