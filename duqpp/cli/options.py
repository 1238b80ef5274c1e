"""What several commands have: options, methods written as options, and jobs to resume.

Options made from QuantizeConfig have their defaults and choices from there.
"""

import functools
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.main import get_command

from duqpp.calibration.text import CalibrationText, parse_sources
from duqpp.calibration.tokens import BUILTIN
from duqpp.cli.interruption import ResumableError, interruptible
from duqpp.config import DESCRIPTIONS, QuantizeConfig, method_defaults
from duqpp.errors import InputError
from duqpp.placement.devices import AUTO, choose_device

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, .gguf file or hub name.")
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calib",
        help="Calibration text: a file (of .jsonl the field text) or a pipe, "
        "hf:NAME[:CONFIG[:SPLIT]], builtin; or several with weights, wiki.txt*2,builtin. No "
        "special tokens are added.",
    ),
]
TEXT_HELP = "Evaluation text: a file, hf:NAME[:CONFIG[:SPLIT]], builtin (the default)"
WindowsOption = Annotated[
    int | None, typer.Option("--windows", help="How many windows; all of the text by default.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="DEVICE", help="auto, cpu, cuda or cuda:N; auto is the GPU where torch sees one."
    ),
]
DeviceMapOption = Annotated[
    Literal["auto"] | None,
    typer.Option(
        help="Spread a whole model over all GPUs, by accelerate, in the place of --device.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

_TYPES = get_type_hints(QuantizeConfig)
_DEFAULTS = {field.name: field.default for field in fields(QuantizeConfig)}


def takes_fields(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command an option for each named field of QuantizeConfig.

    The command gets their values by name as `config`, in whose place the options stand.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            return command(config={name: values.pop(name) for name in names}, **values)

        parameters = [
            each.replace(kind=each.KEYWORD_ONLY)
            for own in inspect.signature(command).parameters.values()
            for each in (map(_parameter, names) if own.name == "config" else [own])
        ]
        vars(run)["__signature__"] = inspect.Signature(parameters)  # what typer reads
        return run

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    """The command-line option for a field of QuantizeConfig, with the field's type and default."""
    described, default = DESCRIPTIONS[name], _DEFAULTS[name]
    kind = Literal[tuple(described.choices)] if described.choices else _TYPES[name]
    shown: bool | str = True
    if default is None:
        kind, shown = kind | None, _shown_default(name)
    if isinstance(default, tuple):
        kind, default = list[str], list(default)
    option = typer.Option(described.flag, help=described.help, show_default=shown)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])


def _shown_default(name: str) -> str | bool:
    """The methods' own defaults of a field, the most frequent last; False where there is none."""
    methods: dict[str, list[str]] = {}
    for method, value in method_defaults(name).items():
        shown = ("off", "on")[value] if isinstance(value, bool) else str(value)
        methods.setdefault(shown, []).append(method)
    *parts, last = sorted(methods, key=lambda shown: len(methods[shown])) or [""]
    parts = [f"{shown} for {' and '.join(methods[shown])}" for shown in parts]
    return ", ".join([*parts, f"else {last}" if parts else last]) or False


def parse_methods(specs: Iterable[str], **base: Any) -> dict[str, QuantizeConfig]:
    """Configurations by spec: a method and its options, as `duqpp quantize` takes them.

    "duqpp --refine distill" is `duqpp quantize MODEL OUT --method duqpp --refine distill`. A seed
    is no part of it: a comparison runs each method with several.

    Args: base: fields that a spec may leave open, in the place of their defaults.
    Raises: InputError for what `duqpp quantize` would refuse, and for a spec given twice.
    """
    configs: dict[str, QuantizeConfig] = {}
    for spec in map(str.strip, specs):
        if spec in configs:
            raise InputError(f"--method names {spec} twice")
        try:
            configs[spec] = QuantizeConfig(**base | _fields_given(shlex.split(spec)))
        except (ValueError, typer.TyperException) as error:
            text = error.format_message() if isinstance(error, typer.TyperException) else error
            raise InputError(f"--method {shlex.quote(spec)}: {text}") from error
    return configs


def _fields_given(words: list[str]) -> dict[str, Any]:
    """What the words of a spec set, by field. Raises: ValueError, typer.TyperException."""
    if not words or words[0].startswith("-"):
        raise InputError("a method comes first, then its options")
    context = _method_parser().make_context("", ["--method", *words])
    return {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


@functools.cache
def _method_parser() -> Any:
    """The command line of a spec: the options of `duqpp quantize` that make a configuration."""
    parser = typer.Typer(add_completion=False)
    parser.command(add_help_option=False)(
        takes_fields(*(name for name in DESCRIPTIONS if name != "seed"))(_ignore)
    )
    return get_command(parser)


def _ignore(config: dict[str, Any]) -> None:
    """What is parsed is not run."""


_ARGUMENT = re.compile(r"`(\w+)(?:=([\w.-]+))?`")


def in_options(message: str, command: Any) -> str:
    """A message of the library, with options for the arguments that it names: see `duqpp.errors`.

    Args: command: the one that was run, whose own options come first; None where there is none.
        What it has no option for is one of `duqpp quantize`'s, or stays as it is.
    """
    flags = {name: described.flag.split("/") for name, described in DESCRIPTIONS.items()}
    for parameter in command.params if command else ():
        flags[parameter.name] = [*parameter.opts, *parameter.secondary_opts]

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags:
            return found[0]
        if value in ("True", "False"):
            return flags[name][0 if value == "True" else -1]
        return flags[name][0] if value is None else f"{flags[name][0]} {value}"

    return _ARGUMENT.sub(option, message)


def check_calibration(calibration: str, configs: Iterable[QuantizeConfig]) -> None:
    """Say on stderr where no method reads the calibration text that is given.

    Raises: InputError where such a text cannot be read; the methods that read it find out.
    """
    if calibration == BUILTIN or any(config.needs.inputs for config in configs):
        return
    if not any(source.name.startswith("hf:") for source in parse_sources(calibration)):
        CalibrationText.read(calibration)  # a dataset may be large
    print("--calib is not used: the method reads no activations", file=sys.stderr)


def placed(device: str, device_map: str | None) -> dict[str, Any]:
    """Where a model is to run, as arguments of what loads one. Raises: InputError."""
    if device_map is None:
        return {"device": choose_device(device)}
    if device != AUTO:
        raise InputError("--device and --device-map exclude each other: give one of them")
    return {"device_map": device_map}


@contextmanager
def resumable(kept: Path | None) -> Iterator[None]:
    """Tell a Ctrl-C that leaves a job to resume, with `kept` on disk, from one that leaves none."""
    try:
        with interruptible():
            yield
    except KeyboardInterrupt:
        if kept is not None and kept.exists():
            raise ResumableError from None
        raise
