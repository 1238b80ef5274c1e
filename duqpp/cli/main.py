"""The `duqpp` command: parse, call, print."""

import re
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

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
from duqpp.errors import DuqppError
from duqpp.models.quiet import quiet_libraries
from duqpp.version import __version__

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
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
    """Run the command. Returns: exit code 0; 2 after an error, 130 after Ctrl-C, each in one line.

    Args: arguments: of the command line, without the program's name; None is sys.argv's.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with interruptible():
            code = app(arguments, prog_name="duqpp", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except ResumableError:
        again = [argument for argument in arguments if argument != "--resume"]
        end = again.index("--") if "--" in again else len(again)  # behind it, no options
        # To be pasted: not a space is changed.
        command = shlex.join(["duqpp", *again[:end], "--resume", *again[end:]])
        print(f"interrupted: go on at the last whole block with {command}", file=sys.stderr)
        return INTERRUPTED
    except DuqppError as error:
        return _fail(f"error: {in_options(str(error), _command(arguments))}", 2)
    except typer.TyperException as error:
        return _fail(f"error: {error.format_message()}", 2)
    if code == INTERRUPTED:  # typer answers Ctrl-C with this exit code
        return _fail("interrupted: nothing is left to resume", INTERRUPTED)
    return code


def _command(arguments: Sequence[str]) -> Any:
    """The command that a command line names, or None."""
    commands = vars(get_command(app))["commands"]
    return next((commands[word] for word in arguments if word in commands), None)


def _fail(message: str, code: int) -> int:
    print(_LINE_BREAKS.sub(" ", message.strip()), file=sys.stderr)
    return code


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
    context.with_resource(quiet_libraries())


if __name__ == "__main__":
    sys.exit(main())
