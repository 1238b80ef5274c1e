"""The `duqpp` command: parse, call, print."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from duqpp.calibration.tokens import BUILTIN
from duqpp.cli.evaluation import compare, evaluate
from duqpp.cli.options import (
    OPTIONS,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    ResumableError,
    check_calibration,
    choose_device,
    resumable,
    takes_config,
)
from duqpp.cli.progress import Bars
from duqpp.cli.tables import (
    doctor_lines,
    inspection_table,
    others_lines,
    percent,
    print_json,
    selfcheck_table,
    size,
    timings_table,
)
from duqpp.config import QuantizeConfig
from duqpp.errors import DuqppError, InputError
from duqpp.models.quiet import quiet_libraries
from duqpp.version import __version__

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="duqpp",
    help="Quantize LLaMA-family models to MXFP4 W4A4 with DuQuant++, and run them anywhere.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns: exit code 0; 2 after an error, 130 after Ctrl-C, each in one line.

    Args: arguments: of the command line, without the program's name; None is sys.argv's.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments, prog_name="duqpp", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except ResumableError:
        again = [argument for argument in arguments if argument != "--resume"]
        command = shlex.join(["duqpp", *again, "--resume"])
        return _fail(f"interrupted: go on at the last whole block with {command}", INTERRUPTED)
    except DuqppError as error:
        return _fail(f"error: {error}", 2)
    except _UsageError as error:
        return _fail(f"error: {error.format_message()}", 2)
    if code == INTERRUPTED:  # newer versions of typer answer Ctrl-C with this exit code
        return _fail("interrupted: nothing is left to resume", INTERRUPTED)
    return code


# typer brings its own copy of click or uses the package, by version; its exceptions derive alike.
_UsageError: Any = typer.BadParameter.__base__


def _fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
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


@app.command()
@takes_config(*OPTIONS)
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    config: QuantizeConfig,
    calib: CalibrationOption = BUILTIN,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted job at its last whole block.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a float MODEL to MXFP4 and save it in OUT."""
    from duqpp.checkpoint.shard import linear_storage
    from duqpp.job.quantize import quantize_model
    from duqpp.methods.reports import mean_errors

    check_calibration(calib, [config])
    with Bars() as bars, resumable(out.with_name(out.name + ".partial")):
        bars.open(model)
        report = quantize_model(model, out, config, calibration=calib, resume=resume, progress=bars)
    linear_bytes, weights = linear_storage(out)
    errors = mean_errors(report.groups)
    if as_json:
        print_json(
            {
                "out": str(out),
                "seconds": report.seconds,
                "resumed_blocks": report.resumed_blocks,
                "bytes": report.weight_bytes,
                "linear_bytes": linear_bytes,
                "bits_per_weight": 8 * linear_bytes / weights,
                "mean_errors": errors,
                "config": config.to_dict(),
            }
        )
        return
    resumed = f", {report.resumed_blocks} blocks resumed" if report.resumed_blocks else ""
    print(f"{out}: {size(report.weight_bytes)} in {report.seconds:.1f} s{resumed}")
    print(f"linears: {size(linear_bytes)}, {8 * linear_bytes / weights:.2f} bits per weight")
    parts = [f"weights {percent(errors['weight_error'])}"]
    if errors["activation_error"] is not None:
        before, after = errors["activation_error_before"], errors["activation_error"]
        parts.append(f"activations {percent(after)} (untransformed: {percent(before)})")
        parts.append(f"outputs {percent(errors['output_error'])}")
    print(f"mean relative error: {', '.join(parts)}")


app.command("eval")(evaluate)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="duqpp checkpoint or hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    kind: Annotated[
        Literal["compressed-tensors"], typer.Option("--format", help="Format to write.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Write a duqpp checkpoint in a format that other software reads.

    compressed-tensors is for vLLM without duqpp: activations are approximate there. With duqpp
    installed, `vllm serve` runs the checkpoint itself, exactly.
    """
    from duqpp.integrations.compressed_tensors import export_compressed_tensors

    with Bars() as bars:
        bars.open(model)
        report = export_compressed_tensors(model, out, progress=bars)
    if as_json:
        print_json(
            {
                "out": str(out),
                "format": kind,
                "bytes": report.weight_bytes,
                "transforms": report.transforms,
                "remarks": report.remarks,
            }
        )
        return
    print(f"{out}: {size(report.weight_bytes)}, {report.transforms} transforms")
    print(*report.remarks, sep="\n")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above, sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue PROMPT with a float or quantized MODEL."""
    from duqpp.integrations.transformers import load_model
    from duqpp.tools.generate import generate as run

    where = choose_device(device)
    with Bars() as bars:
        bars.open(model)
        loaded, tokenizer = load_model(model, device=where, progress=bars)
    result = run(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        stream=not as_json,
    )
    if as_json:
        print_json(
            {
                "model": model,
                "device": str(loaded.device),
                "prompt": prompt,
                **result.to_dict(),
            }
        )
    print(
        f"{result.tokens} tokens in {result.seconds:.1f} s on {loaded.device}, "
        f"{result.tokens_per_second:.1f} tokens/s",
        file=sys.stderr,
    )


@app.command()
def doctor(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="M,N,K", help="Kernels for x [M, K], weight [N, K]; repeatable."),
    ] = None,
    arch: Annotated[
        int | None, typer.Option(help="A GPU to ask about: 10 x its compute capability, as 100.")
    ] = None,
    sm_count: Annotated[int, typer.Option(help="With --arch: its SMs; 148 on a B200.")] = 148,
    as_json: JsonOption = False,
) -> None:
    """Which backend and kernel runs each op here, and why not the others.

    Exits with 1 when DUQPP_BACKEND names no backend.
    """
    from duqpp.ops.kernels import Machine
    from duqpp.tools.doctor import SHAPE, doctor

    shapes = [_shape(text) for text in shape] if shape else [SHAPE]
    facts = doctor(shapes, Machine(divmod(arch, 10), sm_count) if arch else None)
    if as_json:
        print_json(facts)
    else:
        print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
        print(f"platform: {facts['platform']}")
        print(f"cpu: {facts['cpu']}, {facts['threads']} threads")
        print(f"library: {_library(facts['library'])}")
        print(f"gpu: {'; '.join(facts['gpus']) or 'none that torch can use'}")
        print(f"DUQPP_BACKEND: {facts['DUQPP_BACKEND'] or 'not set'}")
        print(*doctor_lines(facts), *others_lines(facts), sep="\n")
    if facts["error"] is not None:
        print(f"error: {facts['error']}", file=sys.stderr)
        raise typer.Exit(1)


def _shape(text: str) -> tuple[int, int, int]:
    """ "16,4096,4096" as three positive integers."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise InputError(f"--shape must be M,N,K, as in 16,4096,4096, got {text!r}")
    m, n, k = map(int, parts)
    return m, n, k


@app.command()
def selfcheck(
    report: Annotated[Path | None, typer.Option(help="Write the JSON report here.")] = None,
    timings: Annotated[bool, typer.Option(help="Time LLaMA-3's linears on a GPU.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run every kernel of this machine against the reference, and time it on a GPU.

    Exits with 1 when a kernel is wrong. On a Blackwell GPU its report is what we would like to see.
    """
    from duqpp.tools.selfcheck import check_report_file
    from duqpp.tools.selfcheck import selfcheck as run

    if report is not None:
        check_report_file(report)
    with Bars() as bars:
        found = run(timings=timings, progress=bars)
    if report is not None:
        try:
            report.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {report}: {error.strerror}") from error
    if as_json:
        print_json(found.to_dict())
    else:
        _print_table(selfcheck_table(found))
        if found.timings:
            _print_table(timings_table(found))
        for line in found.skipped:
            print(f"skipped: {line}")
    if not found.passed:
        raise typer.Exit(1)


def _library(facts: dict[str, Any]) -> str:
    """The compiled library in a line."""
    if "error" in facts:
        return facts["error"]
    cuda = facts["cuda_architectures"] or "none"
    return f"CPU kernels for {facts['cpu_isa']}, CUDA kernels for {cuda}"


@app.command()
@takes_config(
    *(n for n in OPTIONS if n not in ("drift", "next_inputs", "refine", "refine_samples"))
)
def inspect(
    model: ModelArgument,
    config: QuantizeConfig,
    calib: CalibrationOption = BUILTIN,
    layers: Annotated[
        int | None, typer.Option(help="Only this many decoder blocks, from the first.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a .png, .pdf or .svg.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Outliers and errors of each linear group, before and after rotation.

    A quantized MODEL has them in its report. A float MODEL is calibrated and quantized in memory,
    with the options given; nothing is written.
    """
    from duqpp.tools.inspection import inspect_model

    if plot is not None:
        from duqpp.tools.plot import check_plot_file
        from duqpp.tools.plot import plot as draw

        check_plot_file(plot)
    with Bars() as bars:
        bars.open(model)
        found = inspect_model(model, config, calibration=calib, layers=layers, progress=bars)
        if plot is not None:
            bars.wait("drawing")
            draw(found, plot)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_table(inspection_table(found))
    if plot is not None:
        print(f"plot: {plot}", file=sys.stderr)


app.command()(compare)


def _print_table(table: Any) -> None:
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
