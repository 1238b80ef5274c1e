"""quantize_model: the job, one decoder block at a time, resumable at the last finished block."""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from duqpp.calibration.tokens import BUILTIN
from duqpp.checkpoint.manifest import write_manifest
from duqpp.checkpoint.shard import Progress, read_json
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, DuqppError, InputError
from duqpp.job.agreement import check_agreement, check_shared
from duqpp.job.blocks import BlockFolder, Results
from duqpp.job.calibration import Calibration, calibration_tokens, first_streams
from duqpp.job.companions import REPORT_FILE, Companions
from duqpp.job.distillation import forget_training, is_trained, train_shards
from duqpp.job.finish import provenance, stage_companions, write_companions
from duqpp.job.folder import (
    JOB_FILE,
    Output,
    check_same_job,
    describe_job,
    is_whole,
)
from duqpp.job.lock import locked
from duqpp.job.overlap import ahead, behind
from duqpp.job.plan import memory_of_job
from duqpp.job.records import digest_of, write_record
from duqpp.methods.base import Block, Streams
from duqpp.methods.reports import DistillReport, GroupReport, RefineReport
from duqpp.models.family import family_of
from duqpp.models.shapes import ShapedModel
from duqpp.models.source import Source, open_source
from duqpp.models.stack import BlockInputs, DecoderStack
from duqpp.ops.dispatch import select
from duqpp.placement import ON_HOST, Placement
from duqpp.placement.devices import choose_device, fitting, rest_for
from duqpp.placement.ranks import ALONE, Ranks
from duqpp.placement.stages import profiled, stage
from duqpp.torch_state import plain_torch

logger = logging.getLogger(__name__)

_LESS = (
    "`device=cpu` needs no GPU; a new job with fewer `samples` or a shorter `seq_len` needs less"
)


@dataclass(frozen=True)
class QuantizeReport:
    """What a quantization did: folder, seconds (this run alone), bytes on disk, and each group.

    groups are measured before refinement; refined: what that did, one report per decoder block;
    distilled: what distillation did. placement: where blocks were computed, and activations rested.
    profile: seconds by stage and block, where they were asked for (see `duqpp.placement.stages`).
    """

    folder: Path
    seconds: float
    weight_bytes: int
    resumed_blocks: int
    groups: list[GroupReport]
    refined: list[RefineReport]
    distilled: DistillReport | None = None
    placement: Placement = ON_HOST
    profile: dict[str, Any] | None = None


@plain_torch()
def quantize_model(
    model: str | Source,
    out: str | Path,
    config: QuantizeConfig | None = None,
    *,
    calibration: Calibration = BUILTIN,
    resume: bool = False,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    ranks: Ranks = ALONE,
    profile: bool = False,
) -> QuantizeReport:
    """Quantize a model of a known family to MXFP4 W4A4 and save it as a duqpp checkpoint.

    Works in `OUT.partial` beside `out`, one shard per decoder block, and renames it when complete:
    `out` is either absent or whole. An empty folder that is there, such as a mount point, is filled
    in the end, config.json last: until then it has `.partial` in it. After an interruption,
    `resume` continues at the last finished block and gives the same bytes as an uninterrupted run.

    Args:
        model: local folder, .gguf file or hub name; or an open `Source`.
        out: folder to create; it must not exist, or be empty.
        calibration: text file, "builtin", "hf:NAME[:CONFIG[:SPLIT]]", or several of them with the
            weights of each, "wiki.txt*2,builtin"; a `CalibrationText`; or tokens int64
            [samples, seq_len].
        resume: continue an interrupted job of the same model, data and configuration.
        device: where blocks compute: "cpu", "cuda" or "cuda:N"; None for the GPU where torch sees
            one, unless DUQPP_BACKEND asks for the kernels of the CPU.
        ranks: processes that share the work, each of which makes this call with the same arguments;
            the first alone writes. From `duqpp.placement.ranks.joined`.
        progress: called with ("fingerprint" or "quantize", blocks done, blocks in all), and while
            distilling with ("distill", steps done, steps in all).
        profile: whether the report says where the time of this call goes.
    Returns: QuantizeReport.
    Raises: InputError for a model, text, option or folder that cannot be worked with. A partial
        folder is then removed if this call has made it and finished no block in it. One that
        another process works in is refused.
    """
    config = config or QuantizeConfig()
    placement = Placement(choose_device(device), ranks=ranks)
    progress = progress or (lambda stage, done, total: None)
    options: tuple[Any, ...] = (calibration, resume, progress, placement)
    with profiled(placement.compute) if profile else nullcontext() as stages:
        report = _quantize_model(model, Output.at(out), config, *options)
    return replace(report, profile=stages.to_dict()) if stages else report


def _quantize_model(
    model: str | Source,
    output: Output,
    config: QuantizeConfig,
    calibration: Calibration,
    resume: bool,
    progress: Progress,
    placement: Placement,
) -> QuantizeReport:
    """`quantize_model`, whose arguments these are."""
    started, ranks = time.monotonic(), placement.ranks
    ranks.first(lambda: output.check(resume=resume))
    with stage("opening"):
        source = open_source(model) if isinstance(model, str) else model
    family_of(source.config).check(config.skip)
    with stage("opening"):
        companions = Companions.of(source)
    select("mxfp4_gemm", placement.compute)  # what the blocks will run on: an error comes now
    tokens, data, config = calibration_tokens(
        source.config, companions.tokenizer, config, calibration
    )
    progress("fingerprint", 0, 1)
    with stage("fingerprint"):
        job = describe_job(source, config, tokens)
    check_agreement(job, placement)
    ranks.first(lambda: output.check(resume=resume))  # again: another job may have begun meanwhile
    work, digest = output.work, digest_of(job)
    is_new = ranks.first(lambda: not work.exists())
    method = config.build_method()
    layout = method.layout(config.skip, provenance(source.config.name_or_path, config, data))
    blocks = source.config.num_hidden_layers
    folder = BlockFolder(work, blocks, layout, digest, keeps_latents=method.needs.whole_model)
    with ExitStack() as held:
        if ranks.is_first:
            output.make()
            held.enter_context(locked(work))
            if not is_new:
                check_same_job(work, job)
        results = None
        if not ranks.first(lambda: is_whole(work)):
            with _saying_how_to_go_on(folder, is_new, ranks):
                ranks.first(lambda: write_record(work / JOB_FILE, digest, job))
                check_shared(work, digest, ranks)
                with stage("opening"):
                    stack = DecoderStack(source, config.torch_dtype, placement)
                    stack.placement = placement = _with_room(stack, config, tokens)
                if ranks.is_first:
                    output.check_space(folder.bytes_needed(stack))
                    stage_companions(companions, folder, stack.dtype)
                results = _quantize_blocks(stack, config, tokens, folder, progress)
                if ranks.is_first:
                    write_companions(companions, folder, stack.dtype, results)
                    with stage("finishing"):
                        leftovers = [JOB_FILE, *(f.name for f in folder.leftovers)]
                        write_manifest(work, leftovers=leftovers)
        with stage("finishing"):
            ranks.first(lambda: output.finish(folder.leftovers))
    if results is None:
        values = ranks.first(lambda: read_json(output.out / REPORT_FILE))
        results = Results.from_dict(values, resumed=blocks)
    return QuantizeReport(
        output.out,
        time.monotonic() - started,
        ranks.first(lambda: sum(f.stat().st_size for f in output.out.glob("*.safetensors"))),
        results.resumed,
        results.groups,
        results.refined,
        results.distilled,
        placement,
    )


def _with_room(stack: DecoderStack, config: QuantizeConfig, tokens: Tensor | None) -> Placement:
    """The placement of a stack, with the activations on its GPU if that has room, else on the host.

    Args: tokens: int64 [sequences, seq_len], which the configuration need not agree with.
    """

    def needed() -> float:
        if tokens is None:
            return 0.0
        sequences: dict[str, Any] = {
            "refine_samples" if config.needs.refining else "samples": len(tokens)
        }
        asked = replace(config, seq_len=tokens.shape[1], **sequences)
        model = ShapedModel(stack.config, stack.dtype, asked.seq_len)
        return memory_of_job(model, asked, stack.placement.ranks.count)

    return rest_for(stack.placement, needed)


@contextmanager
def _saying_how_to_go_on(folder: BlockFolder, is_new: bool, ranks: Ranks) -> Iterator[None]:
    """Add to an error how the job continues, which keeps its finished blocks.

    Args: is_new: this call has made the folder, and the first rank removes it where no block is
        finished.
    """
    work = folder.work
    try:
        yield
    except CheckpointError as error:  # a file of an earlier run, which the others outlive
        raise CheckpointError(
            f"{error}; remove that file, and continue with `resume=True`"
        ) from error
    except DuqppError as error:
        if is_new and not any(folder.finished()):
            if ranks.is_first:
                shutil.rmtree(work)
            raise
        raise type(error)(f"{error}; continue with `resume=True`, or remove {work}") from error
    except OSError as error:  # such as a full disk: what is finished stays
        reason = error.strerror or error
        raise InputError(
            f"cannot write to {work}: {reason}; continue with `resume=True`"
        ) from error


def _quantize_blocks(
    stack: DecoderStack,
    config: QuantizeConfig,
    tokens: Tensor | None,
    folder: BlockFolder,
    progress: Progress,
) -> Results:
    """Write every shard that is missing, and train the whole model where the method asks for it."""
    method, results, total = config.build_method(), Results(), len(stack)
    ranks = stack.placement.ranks
    if ranks.is_first:
        folder.write_rest(stack)
    with fitting("the calibration text", stack.device, _LESS):
        streams = first_streams(stack, tokens, config)
    finished = ranks.first(lambda: _finished(folder))
    passing = [_passing(streams, config, is_last=all(finished[n:])) for n in range(total)]
    floats = [n for n in range(total) if not finished[n] or passing[n].over_float]
    with closing(ahead(stack.read, floats)) as weights, behind() as later:
        for index in range(total):
            progress("quantize", index, total)
            name = stack.family.block_name(index)
            with stage("other", index), fitting(name, stack.device, _LESS):
                if finished[index]:
                    results.add(folder.reports(index))
                    results.resumed += 1
                    _pass_by(stack, index, folder, passing[index], weights)
                else:
                    with stage("reading"):
                        module = stack.block(index, next(weights))
                    block = Block.of(module, index, config.skip, stack.family)
                    result = method.quantize(block, streams)
                    streams.advance(block, result)
                    if ranks.is_first:
                        with stage("writing"):
                            later(folder.write, folder.kept(block, result))
                    results.add(result)
                    del module, block, result  # before the next block is on the device
    progress("quantize", total, total)
    if method.needs.whole_model and streams.exact is not None:
        placement = stack.placement
        again = DecoderStack(stack.source, stack.dtype, replace(placement, ranks=ALONE))
        with fitting("distillation", stack.device, _LESS):
            first = first_streams(again, tokens, config)
            streams.inputs = None  # which nothing reads any more
            results.distilled = train_shards(
                method, again, folder, first, streams, placement.ranks, progress
            )
    return results


def _finished(folder: BlockFolder) -> list[bool]:
    """Of each block, whether an earlier run has finished it."""
    finished = folder.finished()
    if is_trained(folder) and not all(finished):
        forget_training(folder)
        finished = [False] * len(finished)
    return finished


class _Passing(NamedTuple):
    """The streams that move on over a block that an earlier run has finished: over the float block,
    and over the quantized one."""

    over_float: list[BlockInputs]
    over_quantized: list[BlockInputs]


def _passing(streams: Streams, config: QuantizeConfig, *, is_last: bool) -> _Passing:
    """Args: is_last: no block behind it is yet to be made, so that only training reads a stream."""
    exact = streams.exact if not is_last or config.needs.whole_model else None
    inputs = streams.inputs if not is_last else None
    follows_float = config.next_inputs == "float"
    return _Passing(
        [s for s in (exact, inputs if follows_float else None) if s is not None],
        [s for s in (inputs,) if s is not None and not follows_float],
    )


def _pass_by(
    stack: DecoderStack,
    index: int,
    folder: BlockFolder,
    passing: _Passing,
    weights: Iterator[dict[str, Tensor]],
) -> None:
    """Move the streams on over a finished block. Args: weights: of the next float block."""
    if passing.over_float:
        with stage("reading"):
            block = stack.block(index, next(weights))
        with stage("float pass"):
            for stream in passing.over_float:
                stream.advance(block, index)
    with stage("quantized pass"):
        for stream in passing.over_quantized:
            stream.advance(folder.quantized(stack, index).module, index)
