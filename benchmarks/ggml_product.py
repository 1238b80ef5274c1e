"""ggml's matrix product of an MXFP4 weight and float32 activations, if ggml-python is installed.

ggml quantizes the activations to 8 bits (Q8_0), not to MXFP4: it multiplies other numbers, and is
here for its speed. `pip install ggml-python` compiles it for this machine.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import ggml
except ImportError:
    ggml = None

AVAILABLE = ggml is not None and hasattr(ggml, "GGML_TYPE_MXFP4")


class Product:
    """x @ weight.T with `weight` float32 [N, K], quantized by ggml to its own MXFP4."""

    def __init__(self, weight: Tensor, threads: int) -> None:
        self._n, self._k = weight.shape
        self._weight, self._threads = weight.contiguous(), threads
        row_bytes = self._k // 32 * 17
        self._codes = ctypes.create_string_buffer(self._n * row_bytes)
        source = ctypes.cast(self._weight.data_ptr(), ctypes.POINTER(ctypes.c_float))
        ggml.ggml_quantize_chunk(
            ggml.GGML_TYPE_MXFP4, source, self._codes, 0, self._n, self._k, None
        )

    def bind(self, x: Tensor) -> Callable[[], Tensor]:
        """A call that multiplies x, float32 [M, K], and returns ggml's own memory as [M, N].

        Every call reads the same weight, so that a small one may be found in a cache.
        """
        m = x.shape[0]
        size = len(self._codes) + 4 * m * (self._k + self._n) + (1 << 24)
        size += 4 * m * self._k * self._threads  # ggml's own work space
        context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size, mem_buffer=None))
        weight = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_MXFP4, self._k, self._n)
        inputs = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, self._k, m)
        ctypes.memmove(ggml.ggml_get_data(weight), self._codes, len(self._codes))
        ctypes.memmove(ggml.ggml_get_data(inputs), x.data_ptr(), x.nbytes)
        graph = ggml.ggml_new_graph(context)
        product = ggml.ggml_mul_mat(context, weight, inputs)
        ggml.ggml_build_forward_expand(graph, product)
        address = ggml.ggml_get_data(product)
        values = (ctypes.c_float * (m * self._n)).from_address(address)
        result = torch.frombuffer(values, dtype=torch.float32).view(m, self._n)

        def multiply() -> Tensor:
            ggml.ggml_graph_compute_with_ctx(context, graph, self._threads)
            return result

        return multiply
