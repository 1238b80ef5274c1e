"""The `duqpp` command: parse, call, print."""

import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.main import get_command

from duqpp.cli.commands.compare import compare
from duqpp.cli.commands.doctor import doctor
from duqpp.cli.commands.evaluate import evaluate
from duqpp.cli.commands.export import export
from duqpp.cli.commands.generate import generate
from duqpp.cli.commands.inspect import inspect
from duqpp.cli.commands.quantize import quantize
from duqpp.cli.commands.selfcheck import selfcheck
from duqpp.cli.interruption import ResumableError, interruptible
from duqpp.cli.options import in_options
from duqpp.errors import DuqppError, InputError, first_line
from duqpp.models.quiet import quiet_libraries
from duqpp.placement.ranks import has_a_say, started_ranks
from duqpp.version import __version__

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE, likewise
_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")  # of `str.splitlines`

app = typer.Typer(
    name="duqpp",
    help="Quantize LLaMA-family models to MXFP4 W4A4 with DuQuant++, and run them anywhere.",
    pretty_exceptions_enable=False,
)
app.command()(quantize)
app.command("eval")(evaluate)
app.command()(export)
app.command()(generate)
app.command()(doctor)
app.command()(selfcheck)
app.command()(inspect)
app.command()(compare)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: the outermost boundary, behind which only duqpp's own mistakes are shown.

    Returns: exit code 0; 2 after an error and 130 after Ctrl-C, each in one line on stderr; 141
        without a word where the reader of the output has gone, as `head` does.

    Args: arguments: of the command line, without the program's name; None is sys.argv's.
    """
    _make_printable()
    code, message = _outcome(list(sys.argv[1:] if arguments is None else arguments))
    if not has_a_say():
        message = ""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not message and code != BROKEN_PIPE:
            code, message = _outcome_of(error)
    try:
        if message:
            print(message, file=sys.stderr)
        sys.stderr.flush()
    except OSError:  # nobody reads it: the exit code is left
        _discard(sys.stderr)
    if code and started_ranks() > 1:  # at once: libraries wait for the other ranks at their end
        os._exit(code)
    return code


def _outcome(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command line, and what is to be said of it."""
    try:
        if any("\0" in argument for argument in arguments):
            return 2, "error: an argument has a NUL character"
        with interruptible():
            code = app(arguments, prog_name="duqpp", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except ResumableError:
        again = [argument for argument in arguments if argument != "--resume"]
        end = again.index("--") if "--" in again else len(again)  # behind it, no options
        # To be pasted: not a space is changed.
        command = shlex.join(["duqpp", *again[:end], "--resume", *again[end:]])
        if started_ranks() > 1:
            command = f"torchrun ... -m {command}"
        return INTERRUPTED, f"interrupted: go on at the last whole block with {command}"
    except DuqppError as error:
        return 2, _one_line(f"error: {in_options(str(error), _command(arguments))}")
    except typer.TyperException as error:
        return 2, _one_line(f"error: {error.format_message()}")
    except OSError as error:
        return _outcome_of(error)
    except SystemExit as end:  # typer's answer to a reader that has gone; or a shell's completion
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return BROKEN_PIPE, ""
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        return 2, f"error: out of memory: {first_line(error)}"
    if code == INTERRUPTED:  # typer answers Ctrl-C with this exit code
        return code, "interrupted: nothing is left to resume"
    return code, ""


def _outcome_of(error: OSError) -> tuple[int, str]:
    """Of what the system refuses, such as a folder without permission or a full disk."""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE, ""
    where = f"{error.filename}: " if error.filename else ""
    return 2, _one_line(f"error: {where}{error.strerror or first_line(error)}")


def _make_printable() -> None:
    """Let everything be printed: what the terminal's encoding has not, as \\u escapes.

    A stream that is closed, as by `>&-`, takes what comes and forgets it.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for good
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    """Lead a stream that cannot be written to nowhere: the end of the process flushes it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _command(arguments: Sequence[str]) -> Any:
    """The command that a command line names, or None."""
    commands = vars(get_command(app))["commands"]
    return next((commands[word] for word in arguments if word in commands), None)


def _one_line(message: str) -> str:
    return _LINE_BREAKS.sub(" ", message.strip())


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"duqpp {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit()
    if started_ranks() > 1 and context.invoked_subcommand != "quantize":
        raise InputError(
            f"duqpp {context.invoked_subcommand} is one process: start it without torchrun"
        )
    context.with_resource(quiet_libraries())


if __name__ == "__main__":
    sys.exit(main())
