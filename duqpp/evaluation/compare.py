"""compare: quantize one model by several methods, and set their evaluations side by side."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duqpp.calibration.text import CalibrationText
from duqpp.calibration.tokens import BUILTIN, read_text, tokenize
from duqpp.checkpoint.shard import Progress, linear_storage
from duqpp.checkpoint.stack import CheckpointSource, QuantizedStack
from duqpp.config import DESCRIPTIONS, QuantizeConfig
from duqpp.errors import InputError
from duqpp.evaluation.divergence import Reference
from duqpp.evaluation.folder import ComparisonFolder, Finished, comparison_job
from duqpp.evaluation.perplexity import (
    PerplexityResult,
    check_windowing,
    perplexity,
    perplexity_and_reference,
)
from duqpp.evaluation.scores import Comparison, Row, Run, Scores
from duqpp.job.companions import Companions
from duqpp.job.quantize import quantize_model
from duqpp.models.family import family_of
from duqpp.models.positions import check_seq_len
from duqpp.models.source import Source
from duqpp.models.stack import DecoderStack
from duqpp.placement import Placement
from duqpp.placement.devices import choose_device

FLOAT = "float"


@dataclass(frozen=True)
class PlannedRun:
    """One quantization to make and to evaluate.

    title: for people. config: its seed included. keep: folder where its model is to stay; None for
    one that is removed after its evaluation.
    """

    title: str
    config: QuantizeConfig
    keep: Path | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared.

    methods: configurations by name; their seeds are replaced by `seeds`, and a method that uses no
        randomness runs once.
    calibration: "builtin", a text file, or "hf:NAME...".
    texts: to evaluate on, named likewise; "builtin" has disjoint parts for the two.
    seq_len, windows: of the evaluation; see `perplexity`.
    keep: folders for the models of some methods, those of the first seed.
    """

    methods: Mapping[str, QuantizeConfig]
    calibration: str = BUILTIN
    texts: Sequence[str] = (BUILTIN,)
    seq_len: int = 2048
    windows: int | None = None
    seeds: Sequence[int] = (0,)
    keep: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds or not self.texts:
            raise InputError("compare needs at least one method, one seed and one text")
        if len(set(self.texts)) < len(self.texts):
            raise InputError(f"an evaluation text is named twice: {', '.join(self.texts)}")
        check_windowing(self.seq_len, self.windows)
        for seed in self.seeds:
            DESCRIPTIONS["seed"].check("seeds", seed)

    @property
    def windowing(self) -> dict[str, Any]:
        """How the texts are cut, as arguments of `perplexity`."""
        return {"seq_len": self.seq_len, "windows": self.windows}

    @property
    def dtype(self) -> torch.dtype | None:
        """What the float model computes in: as all methods do, or None for its own."""
        dtypes = {config.torch_dtype for config in self.methods.values()}
        return dtypes.pop() if len(dtypes) == 1 else None

    def runs(self, name: str) -> list[PlannedRun]:
        """What a method is run with: once per seed, if it uses any."""
        config = self.methods[name]
        return [
            PlannedRun(
                name if len(self.seeds) == 1 else f"{name}, seed {seed}",
                replace(config, seed=seed),
                self.keep.get(name) if seed == self.seeds[0] else None,
            )
            for seed in (self.seeds if config.needs.seed else self.seeds[:1])
        ]


def compare(
    source: Source,
    plan: Plan,
    *,
    work: Path | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Comparison:
    """Evaluate the float model, then quantize it by each method and evaluate that on every text.

    One decoder block is in memory at a time, besides what the source keeps and, for each text, the
    float model's final hidden states. Quantized models live in a temporary folder, or in `work`,
    and are removed after their evaluation; a temporary folder goes whatever happens.

    Args:
        work: folder, new or empty, that keeps the results of finished quantizations and the blocks
            of the one in progress, so that an interrupted comparison can be resumed; its size in
            the end is that of the results.
        resume: go on with the comparison in `work`, if there is one: of the same model, texts and
            windows, though perhaps of other methods and seeds. The float model is evaluated again.
            Seconds of a quantization that was interrupted are those of its last part.
        device: where models are quantized and evaluated, as for `quantize_model`.
        progress: called with (method and stage, done, total).
        on_row: called with each row as soon as it is complete.
    Raises: InputError, before any work where that is possible.
    """
    progress = progress or (lambda stage, done, total: None)
    on_row = on_row or (lambda row: None)
    placement = Placement(choose_device(device))
    for config in plan.methods.values():
        family_of(source.config).check(config.skip)
    check_seq_len(source.config, plan.seq_len, "windows")
    tokenizer = Companions.of(source).tokenizer  # all that a quantization reads besides weights
    tokens = {text: tokenize(tokenizer, read_text(text, part="evaluation")) for text in plan.texts}
    calibration = _calibration_text(source.config, tokenizer, plan)
    if resume and work is None:
        raise InputError("`resume` needs the folder of the comparison to go on with: `work`")
    with ExitStack() as stack:
        if work is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="duqpp-compare-"))
            work = Path(scratch, "work")
        progress("fingerprint", 0, 1)
        job = comparison_job(source, tokens, plan.windowing) | {"dtype": str(plan.dtype)}
        folder = stack.enter_context(ComparisonFolder(work, job, calibration, resume=resume))
        row, references = _float_row(
            DecoderStack(source, plan.dtype, placement), plan, tokens, _staged(progress, FLOAT)
        )
        rows = [row]
        on_row(row)
        runner = _Runner(
            source, plan, calibration, folder, placement, tokens, references, resume, progress
        )
        for name in plan.methods:
            rows.append(_row(name, [runner.run(run) for run in plan.runs(name)], rows[0]))
            on_row(rows[-1])
    sample = next(iter(plan.methods.values()))
    return Comparison(
        rows,
        list(plan.texts),
        plan.seq_len,
        rows[0].headline.windows,
        plan.calibration,
        sample.samples,
        sample.seq_len,
    )


@dataclass(frozen=True)
class _Runner:
    """Makes the runs of a plan, or finds them in its folder.

    tokens, references: of each evaluation text, int64 [tokens] and the float model's.
    """

    source: Source
    plan: Plan
    calibration: CalibrationText
    folder: ComparisonFolder
    placement: Placement
    tokens: Mapping[str, Tensor]
    references: Mapping[str, Reference]
    resume: bool
    progress: Progress

    def run(self, run: PlannedRun) -> Finished:
        """Quantize, evaluate, record."""
        finished = self.folder.finished(run.config)
        if finished is not None and (run.keep is None or run.keep.exists()):
            return finished
        progress = _staged(self.progress, run.title)
        out = run.keep or self.folder.model(run.config)
        seconds = self._quantize(run.config, out, progress)
        finished = self._evaluate(out, run.config.seed, seconds, progress)
        self.folder.record(run.config, finished)
        return finished

    def _quantize(self, config: QuantizeConfig, out: Path, progress: Progress) -> float:
        """Seconds that it took, now or before an interruption."""
        seconds = self.folder.quantized(config, out)
        if seconds is None:
            report = quantize_model(
                self.source,
                out,
                config,
                calibration=self.calibration,
                resume=self.resume,
                device=self.placement.compute,
                progress=progress,
            )
            seconds = report.seconds
            self.folder.record_quantized(config, seconds)
        return seconds

    def _evaluate(self, folder: Path, seed: int, seconds: float, progress: Progress) -> Finished:
        """A quantized model on every text."""
        model, runs = QuantizedStack(CheckpointSource(folder), self.placement), {}
        for text, tokens in self.tokens.items():
            options = {**self.plan.windowing, "reference": self.references[text]}
            result = perplexity(model, tokens, **options, progress=progress)
            runs[text] = _run(seed, seconds, result)
        return Finished(runs, *linear_storage(folder))


def _staged(progress: Progress, title: str) -> Progress:
    """Progress of one run: its title goes before each stage."""
    return lambda stage, done, total: progress(f"{title}: {stage}", done, total)


def _calibration_text(model_config: Any, tokenizer: Any, plan: Plan) -> CalibrationText:
    """The calibration text, empty where no method reads it; a pipe gives it once.

    Raises: InputError now, if it is missing or too short for some method, or the model is.
    """
    calibrated = [config for config in plan.methods.values() if config.needs.inputs]
    if not calibrated:
        return CalibrationText((), ())
    text = CalibrationText.read(plan.calibration)
    tokens = text.tokenized(tokenizer)
    configs = [config.for_text(tokens.most(config.seq_len)) for config in calibrated]
    for samples, seq_len in {(config.sequences, config.seq_len) for config in configs}:
        tokens.sequences(samples=samples, seq_len=seq_len, seed=0)
        check_seq_len(model_config, seq_len, "calibration sequences")
    return text


def _float_row(
    model: DecoderStack, plan: Plan, tokens: Mapping[str, Tensor], progress: Progress
) -> tuple[Row, dict[str, Reference]]:
    """The float model's row, and its reference on each text.

    Its size is that of the linears that some method quantizes.
    """
    scores, references = [], {}
    for text, own in tokens.items():
        result, references[text] = perplexity_and_reference(
            model, own, **plan.windowing, progress=progress
        )
        scores.append(Scores(text, result.windows, result.perplexity, (_run(None, 0.0, result),)))
    weights = sum(map(Tensor.numel, _quantized_weights(model, plan)))
    return Row(FLOAT, tuple(scores), weights * model.dtype.itemsize, weights), references


def _quantized_weights(model: DecoderStack, plan: Plan) -> Iterator[Tensor]:
    """The weights that some method quantizes, on the meta device."""
    skips = {config.skip for config in plan.methods.values()}
    for index in range(len(model)):
        block = model.skeleton(index)
        groups = [g for skip in skips for g in model.family.quantized_groups(index, skip)]
        for linear in {name for group in groups for name in group.linears}:
            yield block.get_submodule(linear).weight


def _row(name: str, finished: Sequence[Finished], float_row: Row) -> Row:
    """A method's results over its seeds, beside the float model's."""
    scores = [
        replace(of_float, runs=tuple(run.runs[of_float.text] for run in finished))
        for of_float in float_row.texts
    ]
    return Row(name, tuple(scores), finished[-1].weight_bytes, finished[-1].weights)


def _run(seed: int | None, quantize_seconds: float, result: PerplexityResult) -> Run:
    """Without a reference it is the float model itself, which is 0 from itself and agrees."""
    divergence = result.divergence
    kl, agreement = (divergence.kl, divergence.agreement) if divergence else (0.0, 1.0)
    return Run(seed, result.perplexity, kl, agreement, quantize_seconds, result.seconds)
