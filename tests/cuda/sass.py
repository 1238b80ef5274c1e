"""What ptxas and cuobjdump say about compiled kernels."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests import toolchain


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    code: its SASS instructions, predicates included, in the order of their addresses.
    loops: (first, last) index into code of each backward branch's target and itself.
    """

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    code: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def opcodes(self, first: int = 0, last: int | None = None) -> list[str]:
        """Opcodes with their suffixes, such as LDG.E.128, of code[first .. last]."""
        end = len(self.code) if last is None else last + 1
        return [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in self.code[first:end]]

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, opcode) is not None for opcode in self.opcodes())


def read_kernels(ptxas_log: str, cubin: Path) -> list[Kernel]:
    """The kernels of a cubin that was compiled with -Xptxas -v.

    Args:
        ptxas_log: what nvcc printed.
        cubin: for one architecture.
    """
    tool, environment = toolchain.cuobjdump()
    listing = toolchain.run([tool, "-sass", cubin], timeout=120, env=environment)
    resources = _resources(ptxas_log)
    kernels = []
    for section in re.split(r"^\s+Function : ", listing, flags=re.MULTILINE)[1:]:
        name = section.split()[0]
        # Each instruction is "/*address*/ text ; /* encoding */".
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", section)
        index = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        loops = []
        for i, (address, text) in enumerate(lines):
            branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
            if branch and int(branch[1], 16) < int(address, 16):
                loops.append((index[int(branch[1], 16)], i))
        code = tuple(text for _, text in lines)
        kernels.append(Kernel(name, *resources[name], code, tuple(loops)))
    return kernels


def _resources(log: str) -> dict[str, tuple[int, int, int, int]]:
    """Kernel name to (registers, shared bytes, stack bytes, spilled bytes)."""
    found = {}
    for section in re.split(r"Compiling entry function ", log)[1:]:
        name = section.split("'")[1]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", section)
        registers = re.search(r"Used (\d+) registers", section)
        shared = re.search(r"(\d+) bytes smem", section)
        spilled = int(frame[2]) + int(frame[3])
        shared_bytes = int(shared[1]) if shared else 0
        found[name] = (int(registers[1]), shared_bytes, int(frame[1]), spilled)
    return found
