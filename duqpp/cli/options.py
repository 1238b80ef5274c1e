"""What several commands have: options, and jobs that can be resumed.

Options made from QuantizeConfig have their defaults and choices from there.
"""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

from duqpp.calibration.tokens import BUILTIN, read_text
from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.ops.dispatch import ENVIRONMENT_VARIABLE
from duqpp.ops.native import CpuBackend

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, .gguf file or hub name.")
]
CalibrationOption = Annotated[
    str,
    typer.Option("--calib", help="Calibration text: a file, hf:NAME[:CONFIG[:SPLIT]], builtin."),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="DEVICE", help="auto, cpu, cuda or cuda:N; auto is the GPU where torch sees one."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

# Flag and help by field.
OPTIONS = {
    "method": ("--method", "How the inputs of the linears are rotated."),
    "rotation": (
        "--rotation",
        "One matrix per linear group, or one per block of 32 channels; per-block for duqpp, else "
        "shared.",
    ),
    "gptq": (
        "--gptq/--no-gptq",
        "Round weights by GPTQ instead of to nearest; on for duqpp without --refine, else off.",
    ),
    "smooth_alpha": (
        "--smooth-alpha",
        "Channel smoothing exponent, 0 is off; by default 0.6 for duquant and duquant++, else 0.",
    ),
    "activation_rule": ("--scale-rule", "How a block of activations gets its scale."),
    "weight_rule": ("--weight-rule", "How a block of weights gets its scale."),
    "max_steps": ("--max-steps", "Longest run of greedy rotations that is tried."),
    "damping": ("--damping", "GPTQ damping, a fraction of the Hessian's mean diagonal."),
    "hessian": (
        "--hessian",
        "Activations that the GPTQ Hessian is made from; quantized for duqpp, else float.",
    ),
    "block_order": (
        "--block-order",
        "Order in which GPTQ rounds blocks of 32 channels: by falling Hessian diagonal, or as they "
        "come; diagonal, and channels with --refine.",
    ),
    "drift": (
        "--drift",
        "Share of the quantized model's drift that GPTQ makes up for, 0 is off; for duqpp "
        "alone: 0.3, and 0 without GPTQ or with --refine.",
    ),
    "next_inputs": ("--next-inputs", "Activations that the next decoder block is calibrated on."),
    "refine": (
        "--refine",
        "Train the weights through their rounding: each block, or then the whole model; for duqpp.",
    ),
    "samples": ("--samples", "Calibration sequences."),
    "seq_len": ("--seq-len", "Tokens in a calibration sequence."),
    "refine_samples": (
        "--refine-samples",
        "Sequences for --refine, of which --samples calibrate; 72, or what a shorter text has.",
    ),
    "seed": ("--seed", "Of calibration sampling and of every random matrix."),
    "skip": ("--skip", "Module kept in floating point, by name or last component; repeatable."),
}


def takes_config(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each named field; it gets a QuantizeConfig as `config`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            config = QuantizeConfig(**{name: values.pop(name) for name in names})
            command(config=config, **values)

        own = inspect.signature(command).parameters.values()
        required = [p for p in own if p.default is p.empty and p.name != "config"]
        optional = [p for p in own if p.default is not p.empty]
        parameters = [*required, *(_parameter(name) for name in names), *optional]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    """The command-line option for a field of QuantizeConfig, with the field's type and default."""
    flag, text = OPTIONS[name]
    kind = get_type_hints(QuantizeConfig)[name]
    default: Any = next(field.default for field in fields(QuantizeConfig) if field.name == name)
    if name == "skip":
        kind, default = list[str], list(default)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(flag, help=text)],
    )


def choose_device(name: str) -> torch.device:
    """The device that --device names.

    auto is the GPU where torch sees one, unless DUQPP_BACKEND asks for the kernels of the CPU.

    Raises: InputError for what names no device, or none that is here.
    """
    if name == "auto":
        on_cpu = os.environ.get(ENVIRONMENT_VARIABLE) == CpuBackend.name
        return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(
                f"--device {name}: torch {torch.__version__} sees no CUDA device here; "
                "--device cpu runs anywhere"
            )
        if (device.index or 0) >= count:
            raise InputError(f"--device {name}: the last CUDA device here is cuda:{count - 1}")
    return device


def check_calibration(calibration: str, configs: Iterable[QuantizeConfig]) -> None:
    """Say on stderr where no method reads the calibration text that is given.

    Raises: InputError where such a text cannot be read; the methods that read it find out.
    """
    if calibration == BUILTIN or any(config.needs.inputs for config in configs):
        return
    if not calibration.startswith("hf:"):  # which may be large
        read_text(calibration)
    print("--calib is not used: the method reads no activations", file=sys.stderr)


class ResumableError(Exception):
    """Ctrl-C, and the job can be resumed."""


@contextmanager
def resumable(kept: Path | None) -> Iterator[None]:
    """Tell a Ctrl-C that leaves a job to resume, with `kept` on disk, from one that leaves none."""
    try:
        yield
    except KeyboardInterrupt:
        if kept is not None and kept.exists():
            raise ResumableError from None
        raise
