"""Modules that hold quantized weights."""

from duqpp.nn.linear import MXFP4Linear
from duqpp.nn.shared_input import SharedInput, share_input, unshare_input

__all__ = ["MXFP4Linear", "SharedInput", "share_input", "unshare_input"]
