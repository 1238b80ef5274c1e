"""Errors that a user can act on. The command line prints one line for each of them.

A message puts what it says of arguments between backticks, as in `seq_len` or `resume=True`: the
command line has its options there.
"""


class DuqppError(Exception):
    """Base of the errors that duqpp raises about its input or its environment."""


class InputError(DuqppError, ValueError):
    """A model, text, option or output path that duqpp cannot work with."""


class CheckpointError(DuqppError, ValueError):
    """A quantized checkpoint that is truncated, altered, of another format, or inconsistent."""


class BackendUnavailableError(DuqppError, RuntimeError):
    """An operation was asked of a backend that cannot run it here (see `duqpp doctor`)."""


def first_line(error: Exception) -> str:
    """An error in one line: the first of its message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
