"""A process to kill that needs no time to import torch: a child of the one that runs the tests."""

import os
import signal
import sys
import traceback
from collections.abc import Callable


class Forked:
    """A child process that runs `function`, and ends.

    It has what the parent has in memory; of what it changes, the parent sees files alone.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                function()
                code = 0
            except BaseException:  # its last words: nothing above this frame is to run in the child
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def has_ended(self) -> bool:
        """Whether it is no longer running. To be asked no more once it has ended."""
        return os.waitpid(self._pid, os.WNOHANG) != (0, 0)

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end. Fails when the process had ended by itself."""
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
