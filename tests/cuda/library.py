"""The compiled extension, and the CUDA kernels in it."""

import ctypes
import functools
import importlib
import re
from types import ModuleType

import pytest

from tests.cuda import sass


def extension() -> ModuleType:
    """`duqpp._C`; skips where it is not built."""
    try:
        return importlib.import_module("duqpp._C")
    except ImportError as error:
        pytest.skip(f"the extension is not built: {error}")


def cuda_extension() -> ModuleType:
    """`duqpp._C` with the CUDA kernels; skips where it is built without them."""
    module = extension()
    if not hasattr(module, "cuda_library"):
        pytest.skip("the extension is built without CUDA")
    return module


@functools.cache
def compiled_kernels() -> dict[str, sass.Kernel]:
    """Every GEMM kernel in the library by its demangled name; skips where there is no cuobjdump."""
    kernels = sass.read_kernels(cuda_extension().cuda_library())
    return {demangle(kernel.name): kernel for kernel in kernels if "CutlassGemm" in kernel.name}


@functools.cache
def compiled_sm80_kernels() -> dict[tuple[str, str], sass.Kernel]:
    """Every GEMM kernel for sm_80 to sm_90 by its architecture and name in the kernel table."""
    found = {}
    for kernel in sass.read_kernels(cuda_extension().cuda_library()):
        if "gemm_sm80_kernel" in kernel.name:
            tiles = re.search(r"GemmSm80Traits<(\d+), (\d+)>", demangle(kernel.name))
            rows, columns = map(int, tiles.groups())
            found[kernel.arch, f"sm80_{16 * rows}x{8 * columns}"] = kernel
    return found


def demangle(name: str) -> str:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p
    demangled = library.__cxa_demangle(name.encode(), None, None, None)
    return name if demangled is None else demangled.decode()
