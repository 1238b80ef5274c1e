"""compare: quantize one model by several methods, and set their evaluations side by side."""

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duqpp.calibration.tokens import BUILTIN, read_text, sample_sequences, tokenize
from duqpp.checkpoint.shard import Progress, linear_storage
from duqpp.config import METHOD_DEPENDENT, QuantizeConfig
from duqpp.errors import InputError
from duqpp.evaluation.divergence import Reference
from duqpp.evaluation.folder import ComparisonFolder, Finished, comparison_job
from duqpp.evaluation.perplexity import PerplexityResult, perplexity, perplexity_and_reference
from duqpp.evaluation.scores import Comparison, Row, Run, Scores
from duqpp.integrations.transformers import from_pretrained
from duqpp.job.quantize import quantize_model
from duqpp.models.family import family_of
from duqpp.models.source import Source

FLOAT = "float"
# What a quantized linear has on disk besides its bias, by the last component of the name.
_FLAGS = {"gptq": ("gptq", True), "rtn": ("gptq", False), "shared": ("rotation", "shared")}
_FLAGS |= {"per-block": ("rotation", "per-block")}
_VALUES = {"alpha": "smooth_alpha", "weights": "weight_rule", "activations": "activation_rule"}
_VALUES |= {
    "hessian": "hessian",
    "drift": "drift",
    "order": "block_order",
    "next": "next_inputs",
    "refine": "refine",
}


def parse_methods(text: str, base: QuantizeConfig | None = None) -> dict[str, QuantizeConfig]:
    """Configurations by name from "METHOD[:OPTION...],...", such as "rtn,duquant++:gptq:alpha=0.5".

    Options: gptq, rtn, per-block, shared, alpha=A, weights=RULE, activations=RULE, hessian=STREAM,
    drift=SHARE, order=diagonal|channels, next=STREAM, refine=blocks|distill.

    Args: base: gives what a method leaves open.
    Raises: InputError for an unknown method, option or value, and for a method given twice.
    """
    configs: dict[str, QuantizeConfig] = {}
    for spec in [part.strip() for part in text.split(",")]:
        if spec in configs:
            raise InputError(f"--methods names {spec} twice")
        configs[spec] = _parse_method(spec, base or QuantizeConfig())
    return configs


def compare(
    source: Source,
    methods: Mapping[str, QuantizeConfig],
    *,
    calibration: str = BUILTIN,
    texts: Sequence[str] = (BUILTIN,),
    seq_len: int = 2048,
    windows: int | None = None,
    seeds: Sequence[int] = (0,),
    keep: Mapping[str, Path] | None = None,
    work: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Comparison:
    """Evaluate the float model, then quantize it by each method and evaluate that on every text.

    One model is in memory at a time, besides the source and, for each text, the float model's final
    hidden states. Quantized models live in a temporary folder, or in `work`, and are removed after
    their evaluation; a temporary folder goes whatever happens.

    Args:
        methods: by name, as from `parse_methods`; their seeds are replaced by `seeds`.
        calibration: "builtin", a text file, or "hf:NAME...".
        texts: to evaluate on, named likewise; "builtin" has disjoint parts for the two.
        seq_len, windows: of the evaluation; see `perplexity`.
        seeds: a method that uses no randomness runs once.
        keep: folders for the models of some methods, those of the first seed.
        work: folder, new or empty, that keeps the results of finished quantizations and the blocks
            of the one in progress, so that an interrupted comparison can be resumed; its size in
            the end is that of the results.
        resume: go on with the comparison in `work`, if there is one: of the same model, texts and
            windows, though perhaps of other methods and seeds. The float model is evaluated again.
            Seconds of a quantization that was interrupted are those of its last part.
        progress: called with (method and stage, done, total).
        on_row: called with each row as soon as it is complete.
    Raises: InputError, before any work where that is possible.
    """
    if not methods or not seeds or not texts:
        raise InputError("compare needs at least one method, one seed and one text")
    if len(set(texts)) < len(texts):
        raise InputError(f"an evaluation text is named twice: {', '.join(texts)}")
    skip = next(iter(methods.values())).skip
    family_of(source.config).check(skip)
    tokenizer = source.tokenizer()
    tokens = {text: tokenize(tokenizer, read_text(text, part="evaluation")) for text in texts}
    calibration_text = _check_calibration(tokenizer, methods, calibration)
    progress = progress or (lambda stage, done, total: None)
    on_row = on_row or (lambda row: None)
    settings: dict[str, Any] = {"seq_len": seq_len, "windows": windows}
    if work is None and resume:
        raise InputError("resume needs the folder of the comparison to go on with: work")
    with ExitStack() as stack:
        if work is not None:
            progress("fingerprint", 0, 1)
            job = comparison_job(source, tokens, settings)
            folder = stack.enter_context(
                ComparisonFolder(work, job, calibration_text, resume=resume)
            )
        float_model = _float_model(source)
        staged = _staged(progress, FLOAT)
        float_row, references = _float_row(float_model, skip, tokens, settings, staged)
        on_row(float_row)
        del float_model
        rows = [float_row]
        if work is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="duqpp-compare-"))
            folder = stack.enter_context(ComparisonFolder(Path(scratch, "work"), {}, ""))
        for name, config in methods.items():
            runs: dict[str, list[Run]] = {text: [] for text in texts}
            for index, seed in enumerate(seeds if _uses_seed(config) else seeds[:1]):
                own = replace(config, seed=seed)
                kept = (keep or {}).get(name) if index == 0 else None
                finished = folder.finished(own)
                if finished is None or (kept and not kept.exists()):
                    title = name if len(seeds) == 1 else f"{name}, seed {seed}"
                    staged = _staged(progress, title)
                    out = kept or folder.model(own)
                    if (seconds := folder.quantized(own, out)) is None:
                        seconds = quantize_model(
                            source,
                            out,
                            own,
                            calibration=calibration,
                            resume=resume,
                            progress=staged,
                        ).seconds
                        folder.record_quantized(own, seconds)
                    finished = _evaluated(out, seed, seconds, tokens, settings, references, staged)
                    folder.record(own, finished)
                for text in texts:
                    runs[text].append(finished.runs[text])
                size = finished.weight_bytes, finished.weights
            scores = (replace(own, runs=tuple(runs[own.text])) for own in float_row.texts)
            rows.append(Row(name, tuple(scores), *size))
            on_row(rows[-1])
    sample = next(iter(methods.values()))
    return Comparison(
        rows,
        list(texts),
        seq_len,
        float_row.headline.windows,
        calibration,
        sample.samples,
        sample.seq_len,
    )


def _parse_method(spec: str, base: QuantizeConfig) -> QuantizeConfig:
    method, *options = spec.split(":")
    # What depends on the method is not taken from another method's configuration.
    changes: dict[str, Any] = {"method": method, **dict.fromkeys(METHOD_DEPENDENT)}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals and key in _FLAGS:
            field, setting = _FLAGS[key]
        elif equals and key in _VALUES:
            field, setting = _VALUES[key], value
        else:
            known = ", ".join([*_FLAGS, *(f"{name}=..." for name in _VALUES)])
            raise InputError(f"--methods {spec}: no option {option!r}; there are {known}")
        if changes.get(field) is not None:
            raise InputError(f"--methods {spec}: {option!r} sets {field} a second time")
        changes[field] = setting
    try:
        for field in ("smooth_alpha", "drift"):
            if changes.get(field) is not None:
                changes[field] = float(changes[field])
        return replace(base, **changes)
    except ValueError as error:
        raise InputError(f"--methods {spec or repr(spec)}: {error}") from error


def _evaluated(
    folder: Path,
    seed: int,
    quantize_seconds: float,
    tokens: Mapping[str, Tensor],
    settings: dict[str, Any],
    references: Mapping[str, Reference],
    progress: Progress,
) -> Finished:
    """A quantized model on every text."""
    model, runs = from_pretrained(folder, progress=progress).eval(), {}
    for text, own in tokens.items():
        result = perplexity(model, own, **settings, reference=references[text], progress=progress)
        runs[text] = _run(seed, quantize_seconds, result)
    del model
    gc.collect()  # a model's modules refer to each other
    return Finished(runs, *linear_storage(folder))


def _staged(progress: Progress, title: str) -> Progress:
    """Progress of one method: its name goes before each stage."""
    return lambda stage, done, total: progress(f"{title}: {stage}", done, total)


def _uses_seed(config: QuantizeConfig) -> bool:
    return config.needs.seed


def _check_calibration(
    tokenizer: Any, methods: Mapping[str, QuantizeConfig], calibration: str
) -> str:
    """The calibration text, empty where no method reads it.

    Raises: InputError now, if it is missing or too short for some method.
    """
    calibrated = [config for config in methods.values() if config.needs.inputs]
    if not calibrated:
        return ""
    text = read_text(calibration)
    tokens = tokenize(tokenizer, text)
    configs = [config.for_text(tokens.numel()) for config in calibrated]
    for samples, seq_len in {(config.sequences, config.seq_len) for config in configs}:
        sample_sequences(tokens, samples=samples, seq_len=seq_len, seed=0)
    return text


def _float_model(source: Source) -> nn.Module:
    """The source as a transformers model, in eval mode; it shares the source's tensors."""
    from transformers import AutoModelForCausalLM

    dtype = source.tensor("model.embed_tokens.weight").dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    weights = {n: source.tensor(n).to(dtype) for n in model.state_dict() if n in source.names}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise InputError(f"the model has no tensor {missing[0]}")
    # Its frequencies are computed, not stored, and on the meta device they were not.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=source.config)
    return model.eval()


def _float_row(
    model: nn.Module,
    skip: tuple[str, ...],
    tokens: Mapping[str, Tensor],
    settings: dict[str, Any],
    progress: Progress,
) -> tuple[Row, dict[str, Reference]]:
    """The float model's row, and its reference on each text."""
    scores, references = [], {}
    for text, own in tokens.items():
        result, references[text] = perplexity_and_reference(
            model, own, **settings, progress=progress
        )
        scores.append(Scores(text, result.windows, result.perplexity, (_run(None, 0.0, result),)))
    names = family_of(model.config).quantized_linears(skip)
    linears = [model.get_submodule(name).weight for name in names]
    size = sum(weight.numel() * weight.element_size() for weight in linears)
    count = sum(weight.numel() for weight in linears)
    return Row(FLOAT, tuple(scores), size, count), references


def _run(seed: int | None, quantize_seconds: float, result: PerplexityResult) -> Run:
    """Without a reference it is the float model itself, which is 0 from itself and agrees."""
    divergence = result.divergence
    kl, agreement = (divergence.kl, divergence.agreement) if divergence else (0.0, 1.0)
    return Run(seed, result.perplexity, kl, agreement, quantize_seconds, result.seconds)
