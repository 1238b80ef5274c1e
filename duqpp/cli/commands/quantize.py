"""The command `duqpp quantize`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from duqpp.calibration.tokens import BUILTIN
from duqpp.cli.options import (
    CalibrationOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    check_calibration,
    resumable,
    takes_fields,
)
from duqpp.cli.progress import Bars
from duqpp.cli.tables import percent, print_json, size
from duqpp.config import DESCRIPTIONS, QuantizeConfig
from duqpp.errors import InputError
from duqpp.files import check_writable
from duqpp.placement.devices import AUTO, choose_device
from duqpp.placement.ranks import device_of_rank, is_first_started, joined


@takes_fields(*DESCRIPTIONS)
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    config: dict[str, Any],
    calib: CalibrationOption = BUILTIN,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted job at its last whole block.")
    ] = False,
    device: DeviceOption = AUTO,
    profile: Annotated[
        Path | None, typer.Option(help="Write seconds by stage and block to this file, as JSON.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print what the job will take: memory, operations, disk, time, from MODEL's "
            "config.json alone. Nothing is written.",
        ),
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            help="Plan for cpu, A100, H100, H200 or B200; by default for what is here, or an H100 "
            "with --device-memory."
        ),
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Plan for a device with so much, such as 80GB.")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Plan for so many processes, each on a device of its own; as torchrun starts."
        ),
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="Plan with so many operations a second, in every dtype.")
    ] = None,
    disk_bandwidth: Annotated[
        str | None, typer.Option(help="Plan with so much a second from and to disk; 1GB.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a float MODEL to MXFP4 and save it in OUT."""
    from duqpp.checkpoint.shard import linear_storage, write_json
    from duqpp.job.folder import Output
    from duqpp.job.quantize import quantize_model
    from duqpp.methods.reports import mean_errors

    options = QuantizeConfig(**config)
    planned: dict[str, Any] = {
        "on": on,
        "device_memory": device_memory,
        "ranks": ranks,
        "flops": flops,
        "disk_bandwidth": disk_bandwidth,
    }
    if plan:
        if not is_first_started():
            return
        from duqpp.cli.plan import make_plan, print_plan

        made = make_plan(model, options, **planned)
        print_json(made.to_dict()) if as_json else print_plan(model, options, made)
        return
    for name, value in planned.items():
        if value is not None:
            raise InputError(f"`{name}` is for `plan=True`")
    if profile is not None:
        check_writable(profile, "write the profile to")
    check_calibration(calib, [options])
    own_device = choose_device(device_of_rank(choose_device(device)))  # and it is there
    with (
        joined(own_device) as started,
        Bars(None if started.is_first else Console(quiet=True)) as bars,
        resumable(Output.at(out).work),
    ):
        bars.open(model)
        report = quantize_model(
            model,
            out,
            options,
            calibration=calib,
            resume=resume,
            device=own_device,
            ranks=started,
            progress=bars,
            profile=profile is not None,
        )
    if not started.is_first:
        return
    if profile is not None and report.profile is not None:
        try:
            write_json(profile, report.profile)
        except OSError as error:
            raise InputError(f"cannot write {profile}: {error.strerror}") from error
    linear_bytes, weights = linear_storage(out)
    errors = mean_errors(report.groups)
    if as_json:
        print_json(
            {
                "out": str(out),
                "seconds": report.seconds,
                "resumed_blocks": report.resumed_blocks,
                "device": str(report.placement.compute),
                "activations_on": str(report.placement.storage),
                "bytes": report.weight_bytes,
                "linear_bytes": linear_bytes,
                "bits_per_weight": 8 * linear_bytes / weights,
                "mean_errors": errors,
                "config": options.to_dict(),
                **({} if report.profile is None else {"profile": report.profile}),
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
