"""The compiled extension, and what cuobjdump reads in its CUDA kernels.

cuobjdump, and the nvdisasm that it calls, come from the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm.
"""

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest


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


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel for one architecture as it lies in the library."""

    name: str  # demangled
    arch: str  # "sm_100f"
    registers: int
    stack: int  # bytes a thread, of spilled registers among others
    local: int  # bytes a thread
    opcodes: Counter[str]  # "UTCOMMA.2CTA" -> how many in the code

    def count(self, *parts: str) -> int:
        """Instructions whose opcode, split at dots, has all of `parts`."""
        found = (n for opcode, n in self.opcodes.items() if {*parts} <= {*opcode.split(".")})
        return sum(found)


@functools.cache
def compiled_kernels() -> tuple[CompiledKernel, ...]:
    """Every kernel in the library of the CUDA kernels; skips where it or cuobjdump is not there."""
    library = cuda_extension().cuda_library()
    usage = {
        (arch, name): re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", body)
        for arch, name, body in _functions(_cuobjdump("-res-usage", library))
    }
    kernels = []
    for arch, name, body in _functions(_cuobjdump("-sass", library)):
        registers, stack, local = map(int, usage[arch, name].groups())
        opcodes = Counter(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?([A-Z][\w.]*)", body, re.M)
        )
        kernels.append(CompiledKernel(_demangle(name), arch, registers, stack, local, opcodes))
    return tuple(kernels)


def _functions(listing: str) -> list[tuple[str, str, str]]:
    """(architecture, mangled name, text) of each function in a listing of cuobjdump."""
    found = []
    for module in re.split(r"^Fatbin elf code:$", listing, flags=re.M)[1:]:
        arch = re.search(r"^arch = (\w+)$", module, re.M)[1]
        pieces = re.split(r"^\s*Function\s*:?\s*(\w+):?$", module, flags=re.M)
        found += [(arch, *function) for function in zip(pieces[1::2], pieces[2::2], strict=True)]
    return found


def _cuobjdump(*arguments: str) -> str:
    spec = importlib.util.find_spec("nvidia")
    packages = spec.submodule_search_locations if spec else []
    folders = [str(folder) for package in packages for folder in Path(package).glob("*/bin")]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed; pip install nvidia-cuda-{tool}")
    command = [shutil.which("cuobjdump", path=path), *arguments]
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=240
    ).stdout


def _demangle(name: str) -> str:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p
    demangled = library.__cxa_demangle(name.encode(), None, None, None)
    return name if demangled is None else demangled.decode()
