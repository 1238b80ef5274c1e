"""One plausible fault in the sources, and what must notice it."""

from dataclasses import dataclass

_COMPILE = "compile "


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in the file `path`, becomes `new`; then a test must fail.

    test: what pytest runs, one test or several, or whole files, with a space between them; or
    "compile SOURCE": the compilation of a CUDA source.
    library: the test reads the compiled library, which is built from the mutated sources before.
    """

    name: str
    path: str
    old: str
    new: str
    test: str
    library: bool = False

    @property
    def source(self) -> str | None:
        """The CUDA source that must not compile; None where a test must fail."""
        return self.test.removeprefix(_COMPILE) if self.test.startswith(_COMPILE) else None

    @property
    def tests(self) -> list[str]:
        """What pytest runs; empty where a source must not compile."""
        return [] if self.source else self.test.split()

    @property
    def is_python(self) -> bool:
        """Whether the fault is in Python, so that no build of the copy is affected by it."""
        return self.path.endswith(".py")

    @property
    def compiles_kernels(self) -> bool:
        """Whether CUDA kernels are compiled to their end for it, which takes minutes."""
        return self.library and self.path.endswith((".cu", ".cuh"))
