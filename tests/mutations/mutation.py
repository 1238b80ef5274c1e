"""One plausible fault in the sources, and what must notice it."""

from dataclasses import dataclass

_COMPILE = "compile "


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in the file `path`, becomes `new`; then `test` must fail.

    test: a pytest test, or "compile SOURCE": the compilation of a CUDA source.
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
    def compiles_kernels(self) -> bool:
        """Whether CUDA kernels are compiled to their end for it, which takes minutes."""
        return self.library and self.path.endswith((".cu", ".cuh"))
