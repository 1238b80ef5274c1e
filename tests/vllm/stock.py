"""What stock vLLM lacks to run compressed-tensors MXFP4 with transforms on a CPU; tests only."""

import torch


def fill_gaps(rule: str = "even") -> None:
    """Register the reference as MXFP4 kernel of the CPU, and give transforms a CPU linear.

    vLLM 0.32's own loading, transforms and schemes stay as they are. Call it in the process that
    runs the model, before it is made.

    Args: rule: scale rule of the activations.
    """
    from vllm.model_executor.kernels.linear import MxFp4LinearKernel, register_linear_kernel
    from vllm.model_executor.layers.quantization.compressed_tensors.transform.module import (
        HadamardTransform,
    )
    from vllm.platforms import PlatformEnum

    from duqpp.format import MXFP4Tensor, ScaleRule
    from duqpp.ops import mxfp4_linear

    class ReferenceKernel(MxFp4LinearKernel):
        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        @classmethod
        def can_implement(cls, config):
            return True, None

        def process_weights_after_loading(self, layer):
            scales = layer.weight_scale.data
            layer.weight_scale = torch.nn.Parameter(scales, requires_grad=False)

        def apply_weights(self, layer, x, bias=None):
            weight = MXFP4Tensor(layer.weight.data, layer.weight_scale.data)
            return mxfp4_linear(x, None, weight, bias, rule=ScaleRule(rule), backend="reference")

    register_linear_kernel(ReferenceKernel, PlatformEnum.CPU, "mxfp4")
    # Its dense form asks for the `cpu_linear` that vLLM makes for linears, but not for transforms.
    HadamardTransform.cpu_linear = staticmethod(torch.nn.functional.linear)
