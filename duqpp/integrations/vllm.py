"""vLLM plugin: serves duqpp checkpoints, fused and tensor parallel, in the exact arithmetic.

vLLM imports this module in each of its processes, through the entry point `vllm.general_plugins`,
and pickles the configuration to its workers: classes are at module level.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)

from duqpp.checkpoint.layout import QUANT_METHOD, Layout
from duqpp.errors import CheckpointError
from duqpp.format import BLOCK_SIZE, MXFP4Tensor
from duqpp.integrations.serving import (
    check_columns,
    is_quantized,
    rotation_of_rank,
    served_layout,
    verify_folder,
)
from duqpp.models.family import Family, family_of
from duqpp.ops import mxfp4_linear
from duqpp.ops.dispatch import select

logger = init_logger("vllm.plugins.duqpp")  # below vllm's own, whose level and handlers it has


def register() -> None:
    """What the entry point names. Importing this module has registered the method already."""


@register_quantization_config(QUANT_METHOD)
class DuqppVllmConfig(QuantizationConfig):
    """The `quantization_config` of a duqpp checkpoint, as vLLM wants it.

    family: of the model, which vLLM tells in `maybe_update_config`.
    """

    family: Family

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.skip = list(layout.skip)  # in vLLM's names once `apply_vllm_mapper` was called

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DuqppVllmConfig":
        return cls(served_layout(config))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.skip = hf_to_vllm_mapper.apply_list(self.skip)

    def maybe_update_config(
        self, model_name: str, hf_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Verify the shards of a local checkpoint: once, before other processes load them.

        Of a model of the hub nothing is verified here: vLLM downloads it, and reads it, later.
        """
        self.family = family_of(hf_config)
        folder = Path(model_name)
        if any(folder.glob("*.safetensors")):  # none with `--load-format dummy`
            shards = verify_folder(folder)
            logger.info("duqpp: %d shards in %s have the checksums they should", shards, folder)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        parts = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        if not is_quantized(self.family, parts, self.skip):
            return UnquantizedLinearMethod()
        return DuqppLinearMethod(self.layout)


class RotationParameter(BasevLLMParameter):
    """The matrix, or matrices, of the one input that fused projections share.

    Every projection brings it, and all must bring the same; it is split only where K is.
    """

    _taken = False

    def _take(self, rotation: Tensor) -> None:
        if rotation.shape != self.data.shape or rotation.dtype != self.data.dtype:
            raise CheckpointError(
                f"rotation must be {self.data.dtype} {list(self.data.shape)}, "
                f"got {rotation.dtype} {list(rotation.shape)}"
            )
        if self._taken and not torch.equal(self.data, rotation.to(self.data.device)):
            raise CheckpointError("linears that share one input have different rotations")
        self.data.copy_(rotation)
        self._taken = True

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._take(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._take(rotation_of_rank(loaded_weight, self.data.shape[0], self.tp_rank))

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._take(loaded_weight)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._take(loaded_weight)


@register_weight_loader_v2_supported_method
class DuqppLinearMethod(LinearMethodBase):
    """A linear that rotates and quantizes its input once, for all projections fused into it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        check_columns(layer.prefix, columns, input_size // columns)
        layer.duqpp_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        layer.duqpp_missing = {}  # how many projections each parameter still lacks
        split = {"input_dim": 1, "output_dim": 0}

        def add(name: str, kind: type[BasevLLMParameter], data: Tensor, **options: Any) -> None:
            loader = _counting(layer, name, extra["weight_loader"])
            layer.register_parameter(name, kind(data=data, weight_loader=loader, **options))
            layer.duqpp_missing[name] = len(output_partition_sizes)

        # Until they are loaded: zeros in the identity's basis, for `--load-format dummy`.
        codes = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        scales = torch.full((rows, columns // BLOCK_SIZE), 127, dtype=torch.uint8)
        add("weight_packed", ModelWeightParameter, codes, **split)
        add("weight_scale", GroupQuantScaleParameter, scales, **split)
        if (shape := self.layout.rotation_shape(columns)) is None:
            layer.rotation = None
        else:
            identity = torch.eye(BLOCK_SIZE, dtype=torch.bfloat16)
            add("rotation", RotationParameter, identity.expand(shape).contiguous())

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring the weight into the layout that this device's backend reads."""
        for name, missing in layer.duqpp_missing.items():
            if missing and not layer.duqpp_dummy:
                raise CheckpointError(
                    f"{layer.prefix}: the checkpoint lacks {missing} tensors named {name}"
                )
        backend = select("mxfp4_gemm", layer.weight_packed.device)
        weight = backend.prepare_weight(
            MXFP4Tensor(layer.weight_packed.data, layer.weight_scale.data)
        )
        values = {"weight_packed": weight.codes, "weight_scale": weight.scales}
        if layer.rotation is not None:
            values["rotation"] = layer.rotation.data
        for name, value in values.items():  # plain parameters, as torch.compile wants them
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
        _say_backend(backend.name, layer.weight_packed.device.type)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The backend is not named: vLLM caches compiled graphs, and must not cache that choice.
        return mxfp4_linear(
            x,
            layer.rotation,
            MXFP4Tensor(layer.weight_packed, layer.weight_scale),
            bias,
            rule=self.layout.activation_rule,
        )


def _counting(layer: nn.Module, name: str, load: Callable[..., None]) -> Callable[..., None]:
    """A weight loader that also counts: vLLM does not miss what a quantized checkpoint lacks."""

    @functools.wraps(load)
    def counted(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        layer.duqpp_missing[name] -= 1

    return counted


@functools.cache
def _say_backend(backend: str, device: str) -> None:
    """Log, once, what runs the linears; warn where a GPU has no kernel for them."""
    if backend == "reference":
        logger.warning(
            "duqpp: no kernel for the linears on this %s; they run as plain torch operations, "
            "slowly. `duqpp doctor` says why",
            device,
        )
    else:
        logger.info("duqpp: the linears run on the backend %s", backend)
