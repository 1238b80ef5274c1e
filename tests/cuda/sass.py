"""Compiled kernels as cuobjdump and ptxas describe them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests import toolchain


@dataclass(frozen=True)
class Kernel:
    """A kernel for one architecture, as it lies in a cubin or a library.

    name: mangled. arch: "sm_100f" in a library, "" in a cubin.
    stack_bytes, local_bytes: of a thread. shared_bytes: of a CTA.
    code: its SASS instructions, predicates included, in the order of their addresses.
    loops: (first, last) index into code of each backward branch's target and itself.
    """

    name: str
    arch: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int
    code: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def opcodes(self, first: int = 0, last: int | None = None) -> list[str]:
        """Opcodes with their suffixes, such as LDG.E.128, of code[first .. last]."""
        end = len(self.code) if last is None else last + 1
        return self._opcodes[first:end]

    @cached_property
    def _opcodes(self) -> list[str]:
        return [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in self.code]

    def count(self, *parts: str) -> int:
        """Instructions whose opcode, split at dots, has all of `parts`."""
        return sum({*parts} <= {*opcode.split(".")} for opcode in self._opcodes)


def read_kernels(binary: str | Path) -> list[Kernel]:
    """The kernels of a cubin, or of a library with CUDA code."""
    tool, environment = toolchain.cuobjdump()

    def listing(option: str) -> str:
        return toolchain.run([tool, option, binary], timeout=240, env=environment)

    usage = {
        (arch, name): map(
            int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text).groups()
        )
        for arch, name, text in _functions(listing("-res-usage"))
    }
    return [
        Kernel(name, arch, *usage[arch, name], *_instructions(text))
        for arch, name, text in _functions(listing("-sass"))
    ]


def spilled_bytes(ptxas_log: str) -> dict[str, int]:
    """Kernel name to bytes stored and loaded for want of registers, from what -Xptxas -v prints."""
    found = {}
    for section in re.split(r"Compiling entry function ", ptxas_log)[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", section)
        found[section.split("'")[1]] = sum(map(int, spills.groups()))
    return found


def _functions(listing: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, text) of each function in a listing of cuobjdump."""
    for module in re.split(r"^Fatbin elf code:$", listing, flags=re.M):
        arch = re.search(r"^arch = (\w+)$", module, re.M)
        pieces = re.split(r"^\s*Function\s*:?\s*(\w+):?$", module, flags=re.M)
        for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
            yield arch[1] if arch else "", name, text


def _instructions(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """`code` and `loops` of a function."""
    # Each instruction is "/*address*/ text ; /* encoding */".
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text)
    index = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (address, instruction) in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if branch and int(branch[1], 16) < int(address, 16):
            loops.append((index[int(branch[1], 16)], i))
    return tuple(instruction for _, instruction in lines), tuple(loops)
