"""A process that needs no time to import torch: a child of the one that runs the tests."""

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence


class Forked:
    """A child process that runs `function`, and ends.

    It has what the parent has in memory; of what it changes, the parent sees files alone.

    Args: descriptors: of its standard input, output and error; None leaves the parent's.
    """

    def __init__(
        self, function: Callable[[], object], descriptors: Sequence[int | None] = ()
    ) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            code: object = 1
            try:
                for own, given in enumerate(descriptors):
                    if given is not None:
                        os.dup2(given, own)
                if descriptors:  # pytest has put files of its own in their place
                    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), _text_stream(1)
                    sys.stderr = _text_stream(2)
                function()
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:  # its last words: nothing above this frame is to run in the child
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else int(code is not None))

    def has_ended(self) -> bool:
        """Whether it is no longer running. To be asked no more once it has ended."""
        return self.poll() is not None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, once it has ended, and then no more; else None."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self) -> int:
        """The exit code, when it has ended by itself."""
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end. Fails when the process had ended by itself."""
        os.kill(self._pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL


def duqpp_command(*arguments: str) -> Callable[[], object]:
    """What `python -m duqpp ARGUMENTS` does, for a child process."""

    def run() -> None:
        sys.argv = ["duqpp", *arguments]
        runpy.run_module("duqpp", run_name="__main__")

    return run


def _text_stream(descriptor: int):
    return os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", closefd=False)
