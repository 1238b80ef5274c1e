"""MXFP4: E2M1 elements, E8M0 block scales, and the layouts of both."""

from duqpp.format.e8m0 import ScaleRule
from duqpp.format.mxfp4 import BLOCK_SIZE, MXFP4Tensor, dequantize, quantize

__all__ = ["BLOCK_SIZE", "MXFP4Tensor", "ScaleRule", "dequantize", "quantize"]
