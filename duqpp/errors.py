"""Errors that a user can act on. The command line prints one line for each of them.

A message puts what it says of arguments between backticks, as in `seq_len` or `resume=True`: the
command line has its options there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 400  # characters of another library's message: some print all that they have read


class DuqppError(Exception):
    """Base of the errors that duqpp raises about its input or its environment."""


class InputError(DuqppError, ValueError):
    """A model, text, option or output path that duqpp cannot work with."""


class CheckpointError(DuqppError, ValueError):
    """A quantized checkpoint that is truncated, altered, of another format, or inconsistent."""


class RankLostError(DuqppError, RuntimeError):
    """Another process of a job on several has ended, or cannot be reached: this one ends too."""


class BackendUnavailableError(DuqppError, RuntimeError):
    """An operation was asked of a backend that cannot run it here (see `duqpp doctor`)."""


def first_line(error: BaseException) -> str:
    """An error in one line: the first of its message, or its kind where it has none."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[0] if len(lines[0]) <= _LONGEST else lines[0][:_LONGEST] + "..."


@contextmanager
def refusing(what: str, kind: type[DuqppError] = InputError) -> Iterator[None]:
    """Whatever a library raises for a user's input, as one error: "what: the library's first line".

    The one place that answers exceptions of any kind; it is put around calls of other libraries,
    and not around duqpp's own code, whose mistakes are to be seen. duqpp's errors pass as they are,
    and so does Ctrl-C, and a reader of the output that has gone.

    Args: what: could not be done, as in "cannot load the tokenizer of FOLDER".
    """
    try:
        yield
    except (DuqppError, BrokenPipeError):
        raise
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # a panic in Rust, as in tokenizers
            raise
        raise kind(f"{what}: {first_line(error)}") from error
