"""quantize_model: the job, one decoder block at a time, resumable at the last finished block."""

import platform
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duqpp.calibration.tokens import BUILTIN, read_text, sample_sequences, tokenize
from duqpp.checkpoint.card import GUARD, GUARD_FIELD, write_card
from duqpp.checkpoint.layout import Layout, quantized_block
from duqpp.checkpoint.shard import (
    INDEX_FILE,
    Progress,
    read_json,
    read_shard,
    shard_name,
    write_block,
    write_json,
    write_shard,
)
from duqpp.config import QuantizeConfig
from duqpp.errors import CheckpointError, DuqppError, InputError
from duqpp.job.distillation import LATENTS, distill_shards, forget_distilled, is_distilled
from duqpp.job.folder import (
    JOB_FILE,
    check_folders,
    check_same_job,
    describe_job,
    give_name,
    make_folder,
)
from duqpp.job.lock import locked
from duqpp.methods.group import GroupReport, group_generator, mean_errors
from duqpp.methods.independent import collect_statistics, layout_of, quantize_block
from duqpp.methods.learned import learn_rotations
from duqpp.methods.refine.blocks import RefineReport, refine_block
from duqpp.methods.refine.distill import DistillReport
from duqpp.methods.sequential import quantize_sequentially, run_float_block
from duqpp.models.llama import (
    BlockInputs,
    DecoderStack,
    check_architecture,
    layer_prefix,
)
from duqpp.models.source import Source, base_model, open_source
from duqpp.ops.dispatch import select
from duqpp.version import __version__

REPORT_FILE = "quantization_report.json"


@dataclass(frozen=True)
class QuantizeReport:
    """What a quantization did: folder, seconds (this run alone), bytes on disk, and each group.

    groups are measured before refinement; refined: what that did, one report per decoder block;
    distilled: what distillation did.
    """

    folder: Path
    seconds: float
    weight_bytes: int
    resumed_blocks: int
    groups: list[GroupReport]
    refined: list[RefineReport]
    distilled: DistillReport | None = None


@dataclass
class FloatStream:
    """The float model's own activations beside the quantized stream's, and what aims at them.

    exact: what enters the next block of the float model. calibration_batches: how many of the
    batches calibrate; the others only refine. latents: of the block refined last, by linear.
    """

    exact: BlockInputs
    calibration_batches: int
    latents: dict[str, Tensor] = field(default_factory=dict)


def quantize_model(
    model: str | Source,
    out: str | Path,
    config: QuantizeConfig | None = None,
    *,
    calibration: str | Tensor = BUILTIN,
    resume: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a LLaMA-family model to MXFP4 W4A4 and save it as a duqpp checkpoint.

    Works in `OUT.partial` beside `out`, one shard per decoder block, and renames it when complete:
    `out` is either absent or whole. After an interruption, `resume` continues at the last finished
    block and gives the same bytes as an uninterrupted run.

    Args:
        model: local folder, .gguf file or hub name; or an open `Source`.
        out: folder to create; it must not exist, or be empty.
        calibration: text file, "builtin", "hf:NAME[:CONFIG[:SPLIT]]", or tokens int64
            [samples, seq_len].
        resume: continue an interrupted job of the same model, data and configuration.
        progress: called with ("fingerprint" or "quantize", blocks done, blocks in all), and while
            distilling with ("distill", steps done, steps in all).
    Returns: QuantizeReport.
    Raises: InputError for a model, text, option or folder that cannot be worked with. A partial
        folder is then removed if this call has made it and finished no block in it. One that
        another process works in is refused.
    """
    started = time.monotonic()
    config = config or QuantizeConfig()
    progress = progress or (lambda stage, done, total: None)
    out = Path(out)
    work = out.with_name(out.name + ".partial")
    check_folders(out, work, resume)
    source = open_source(model) if isinstance(model, str) else model
    check_architecture(source.config, config.skip)
    companions = _companions(source)
    select("mxfp4_gemm", torch.device("cpu"))  # what the blocks will run on: an error comes now
    tokens, data, config = _calibration_tokens(
        source.config, companions.tokenizer, config, calibration
    )
    progress("fingerprint", 0, 1)
    job = describe_job(source, config, tokens)
    check_folders(out, work, resume)  # again: a job that began meanwhile may be there, or done
    is_new = not work.exists()
    make_folder(work)
    with locked(work):
        if not is_new:
            check_same_job(work, job)
        try:
            write_json(work / JOB_FILE, job)
            origin = provenance(source.config.name_or_path, config, data)
            layout = layout_of(config, origin)
            stack = DecoderStack(source)
            done = _quantize_blocks(stack, config, layout, tokens, work, progress)
            _finish(companions, layout, stack.dtype, work, done)
            weight_bytes = sum(file.stat().st_size for file in work.glob("*.safetensors"))
        except CheckpointError as error:  # a file of an earlier run, which the others outlive
            raise CheckpointError(
                f"{error}; remove that file, and continue with --resume"
            ) from error
        except DuqppError as error:
            if is_new and not _has_finished_block(work, source.config.num_hidden_layers):
                shutil.rmtree(work)
                raise
            raise type(error)(f"{error}; continue with --resume, or remove {work}") from error
        except OSError as error:  # such as a full disk: what is finished stays
            reason = error.strerror or error
            raise InputError(f"cannot write to {work}: {reason}; continue with --resume") from error
        give_name(work, out, leftovers=("model-*.json", "*" + LATENTS))
    seconds = time.monotonic() - started
    return QuantizeReport(
        out, seconds, weight_bytes, done.resumed, done.groups, done.refined, done.distilled
    )


@dataclass(frozen=True)
class _Companions:
    """What a checkpoint has of its source besides weights: read before any work is done."""

    config: Any
    tokenizer: Any
    generation: Any | None
    causal_class: str


def _companions(source: Source) -> _Companions:
    return _Companions(
        source.config,
        source.tokenizer(),
        source.generation_config(),
        _causal_class(source.config),
    )


@dataclass
class _Done:
    """Reports of all blocks, and how many blocks an earlier run had finished."""

    groups: list[GroupReport] = field(default_factory=list)
    refined: list[RefineReport] = field(default_factory=list)
    distilled: DistillReport | None = None
    resumed: int = 0


def _quantize_blocks(
    stack: DecoderStack,
    config: QuantizeConfig,
    layout: Layout,
    tokens: Tensor | None,
    work: Path,
    progress: Progress,
) -> _Done:
    """Write every shard that is missing."""
    total = len(stack)
    rest = work / shard_name(0, total + 1)
    if not rest.exists():
        write_shard(rest, stack.rest())
    inputs, float_stream = _first_inputs(stack, tokens, config)
    shards = [work / shard_name(index + 1, total + 1) for index in range(total)]
    is_finished = [_is_finished(shard, config) for shard in shards]
    if is_distilled(work) and not all(is_finished):
        forget_distilled(work, shards)
        is_finished = [False] * total
    done = _Done()
    for index, shard in enumerate(shards):
        progress("quantize", index, total)
        report = shard.with_suffix(".json")
        if is_finished[index]:
            groups, refined = _read_report(report)
            done.groups += groups
            done.refined += refined
            done.resumed += 1
            # Activations are for a block that is yet to be made; distillation wants the float ones.
            is_read = not all(is_finished[index:])
            if float_stream is not None and (is_read or config.refine == "distill"):
                float_stream.exact.advance(stack.block(index), index)
            if inputs is not None and is_read:
                inputs.advance(_finished_block(stack, index, layout, shard, config), index)
        else:
            block = stack.block(index)
            groups, refined = calibrate_and_quantize(
                block, index, config, layout, stack.config, inputs, float_stream
            )
            done.groups += groups
            done.refined += refined
            write_json(
                report,
                {
                    "groups": [group.to_dict() for group in groups],
                    "refined": [block.to_dict() for block in refined],
                },
            )
            if config.refine == "distill":
                write_shard(shard.with_suffix(LATENTS), float_stream.latents)
            write_block(shard, index, block)
        stack.release(index)
    progress("quantize", total, total)
    if config.refine == "distill":
        again = DecoderStack(stack.source)
        first, _ = _first_inputs(again, tokens, config)
        done.distilled = distill_shards(
            again, config, layout, first, float_stream.exact, work, progress
        )
    return done


def _is_finished(shard: Path, config: QuantizeConfig) -> bool:
    """Whether a block has its shard and what else is kept with it until the job is done.

    The shard is written last. If another of these files was damaged and then removed, the block is
    made again, with the same bytes.
    """
    suffixes = [".safetensors", ".json", *([LATENTS] if config.refine == "distill" else [])]
    return all(shard.with_suffix(suffix).exists() for suffix in suffixes)


def _has_finished_block(work: Path, blocks: int) -> bool:
    return any((work / shard_name(index + 1, blocks + 1)).exists() for index in range(blocks))


def _read_report(path: Path) -> tuple[list[GroupReport], list[RefineReport]]:
    """The reports of a finished block. Raises: CheckpointError."""
    values = read_json(path)
    try:
        groups = [GroupReport(**group) for group in values["groups"]]
        return groups, [RefineReport(**block) for block in values["refined"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the report of a block: {error!r}") from error


def _first_inputs(
    stack: DecoderStack, tokens: Tensor | None, config: QuantizeConfig
) -> tuple[BlockInputs | None, FloatStream | None]:
    """What enters the first block; with refinement, its sequences follow those that calibrate."""
    if tokens is None:
        return None, None
    if config.refine == "none":
        inputs = stack.first_inputs(tokens)
        calibration_batches = len(inputs.hidden)
    else:
        inputs = stack.first_inputs(tokens[: config.samples])
        calibration_batches = len(inputs.hidden)
        inputs = inputs.joined(stack.first_inputs(tokens[config.samples :]))
    if not config.needs_float_stream:
        return inputs, None
    return inputs, FloatStream(inputs.first(len(inputs.hidden)), calibration_batches)


def calibrate_and_quantize(
    block: Any,
    index: int,
    config: QuantizeConfig,
    layout: Layout,
    model_config: Any,
    inputs: BlockInputs | None,
    float_stream: FloatStream | None = None,
) -> tuple[list[GroupReport], list[RefineReport]]:
    """Quantize a block in place, and move the inputs on to the next block's.

    Args: inputs: None for a method that reads no activations. float_stream: moved on as well;
        None where nothing aims at it (see `QuantizeConfig.needs_float_stream`).
    Returns: reports of its groups, and of its refinement, if there was one.
    """
    refined = []
    if config.is_sequential:
        outputs = list(inputs.outputs(block, index)) if config.next_inputs == "float" else None
        targets, calibrating, float_inputs = None, inputs, None
        if float_stream is not None:
            float_stream.latents = {}  # of the block before, which need no memory any more
            calibrating = inputs.first(float_stream.calibration_batches)
            observed = float_stream.calibration_batches if config.makes_up_for_drift else 0
            targets, float_inputs = run_float_block(
                block, index, config, float_stream.exact, observed
            )
        groups, latents = quantize_sequentially(
            block, index, config, layout, calibrating, float_inputs
        )
        if config.refine != "none":
            generator = group_generator(config.seed, f"{layer_prefix(index)}.refine")
            report, float_stream.latents = refine_block(
                block, index, config, latents, inputs, targets, generator
            )
            refined.append(report)
        if float_stream is not None:
            float_stream.exact.hidden = targets
    else:
        statistics = outputs = None
        if inputs is not None:
            statistics, outputs = collect_statistics(block, index, inputs, config)
        learned = None
        if config.method == "learned":
            generator = group_generator(config.seed, f"{layer_prefix(index)}.learned")
            learned = learn_rotations(block, index, config, inputs, generator)
        groups = quantize_block(
            block, index, config, layout, model_config, inputs, statistics, learned
        )
    if inputs is not None:
        if config.next_inputs == "float":
            inputs.hidden = outputs
        else:
            inputs.advance(block, index)
    return groups, refined


def _finished_block(
    stack: DecoderStack, index: int, layout: Layout, shard: Path, config: QuantizeConfig
) -> Any:
    """A block that an earlier run finished, as the next block's calibration wants it."""
    if config.next_inputs == "float":
        return stack.block(index)
    return quantized_block(stack, index, layout, shard)


def _finish(
    companions: _Companions, layout: Layout, dtype: torch.dtype, work: Path, done: _Done
) -> None:
    """Configurations, index, tokenizer, report and model card."""
    weight_map, size = {}, 0
    for shard in sorted(work.glob("*.safetensors")):
        for name, tensor in read_shard(shard).items():
            weight_map[name] = shard.name
            size += tensor.numel() * tensor.element_size()
    write_json(work / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    companions.config.save_pretrained(work)
    config = read_json(work / "config.json")
    for transient in ("_name_or_path", "quantization_config"):
        config.pop(transient, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [companions.causal_class]
    measured = layout.provenance | {"mean_errors": mean_errors(done.groups)}
    config["quantization_config"] = replace(layout, provenance=measured).to_dict()
    config[GUARD_FIELD] = GUARD
    write_json(work / "config.json", config)
    companions.tokenizer.save_pretrained(work)
    if companions.generation is not None:
        companions.generation.save_pretrained(work)
    report: dict[str, Any] = {"groups": [group.to_dict() for group in done.groups]}
    if done.distilled:
        report["distilled"] = done.distilled.to_dict()
    if done.refined:
        report["refined"] = [block.to_dict() for block in done.refined]
    write_json(work / REPORT_FILE, report)
    write_card(work)


def _causal_class(config: Any) -> str:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(config)].__name__


def _calibration_tokens(
    model_config: Any, tokenizer: Any, config: QuantizeConfig, calibration: str | Tensor
) -> tuple[Tensor | None, str, QuantizeConfig]:
    """Token sequences, or None where no activations are read; and what the data are called.

    And the options, with as many refine_samples as a text has.
    """
    if not config.needs_activations:
        return None, "none", config
    if isinstance(calibration, Tensor):
        tokens, name = calibration, "tokens"
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise InputError(
                "calibration tokens must be int64 [samples, seq_len], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        tokens = tokens.cpu()
    else:
        text = tokenize(tokenizer, read_text(calibration))
        config = config.for_text(text.numel())
        tokens = sample_sequences(
            text,
            samples=config.sequences,
            seq_len=config.seq_len,
            seed=config.seed,
        )
        name = Path(calibration).name if Path(calibration).exists() else calibration
    least, most = (int(token) for token in tokens.aminmax())
    if least < 0 or most >= model_config.vocab_size:
        raise InputError(
            f"calibration tokens must be in [0, {model_config.vocab_size}), the model's "
            f"vocabulary, got {least} to {most}"
        )
    if config.refine != "none":
        tokens = _spread_first(tokens, config.samples)
    return tokens, name, config


def _spread_first(tokens: Tensor, count: int) -> Tensor:
    """Sequences reordered: first `count` that are spread evenly over all, then the others."""
    if len(tokens) <= count:
        raise InputError(f"--refine needs more than {count} calibration sequences")
    chosen = torch.linspace(0, len(tokens) - 1, count).round().long()
    others = torch.ones(len(tokens), dtype=torch.bool)
    others[chosen] = False
    return torch.cat((tokens[chosen], tokens[others]))


def provenance(name_or_path: str | None, config: QuantizeConfig, data: str) -> dict[str, Any]:
    """Where a checkpoint comes from: float model, calibration data, options, versions."""
    import transformers

    return {
        "base_model": base_model(name_or_path or ""),
        "calibration": data,
        "configuration": config.to_dict(),
        "versions": {
            "duqpp": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
