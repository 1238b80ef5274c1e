"""Whatever a library raises for a user's input is one error of duqpp's, of one line."""

import pytest

from duqpp.errors import CheckpointError, DuqppError, InputError, refusing


class PanicError(BaseException):
    """As pyo3 has it: no Exception, so that nobody answers it by mistake."""


PanicError.__module__ = "pyo3_runtime"


class OtherError(BaseException):
    """Neither an error nor a panic, such as SystemExit."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (KeyError("split"), "'split'"),
        (RuntimeError(), "RuntimeError"),
        (PanicError("index out of range"), "index out of range"),
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "'utf-8' codec can't encode"),
    ],
)
@pytest.mark.parametrize("kind", [InputError, CheckpointError])
def test_any_error_is_one_line_that_says_what_could_not_be_done(error, line, kind):
    with pytest.raises(kind) as raised, refusing("cannot load x", kind):
        raise error
    assert str(raised.value).startswith(f"cannot load x: {line}")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [DuqppError("ours"), KeyboardInterrupt(), SystemExit(3), BrokenPipeError(), OtherError()],
)
def test_what_is_no_error_of_the_library_passes(error):
    with pytest.raises(type(error)) as raised, refusing("cannot load x"):
        raise error
    assert raised.value is error


def test_a_message_is_bounded():
    """Some libraries print all that they have read."""
    with pytest.raises(InputError) as raised, refusing("cannot load x"):
        raise ValueError("a" * 10**6)
    assert len(str(raised.value)) < 500
