"""What `compare` finds: for each method, text and seed, how near the quantized model is."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from duqpp.evaluation.perplexity import CONVENTION

_DERIVED = (
    *("perplexity", "spread", "ratio", "ratio_spread"),
    *("kl", "kl_spread", "agreement", "agreement_spread"),
)


@dataclass(frozen=True)
class Run:
    """One quantization and its evaluation on one text.

    seed: None for the float model, which has none. kl, agreement: with the float model, as in
    `duqpp.evaluation.divergence.Divergence`.
    """

    seed: int | None
    perplexity: float
    kl: float
    agreement: float
    quantize_seconds: float
    evaluate_seconds: float


@dataclass(frozen=True)
class Scores:
    """One method on one text.

    text: as it was asked for. windows: how many were evaluated. float_perplexity: the float
    model's. runs: one per seed; one where no seed matters.

    Means are over runs, spreads are standard deviations over them (n - 1 in the denominator), None
    for a single run.
    """

    text: str
    windows: int
    float_perplexity: float
    runs: tuple[Run, ...]

    @property
    def perplexity(self) -> float:
        """Mean."""
        return _mean(self.runs, lambda run: run.perplexity)

    @property
    def spread(self) -> float | None:
        """Of the perplexity."""
        return _deviation(self.runs, lambda run: run.perplexity)

    @property
    def ratio(self) -> float:
        """Mean perplexity over the float model's."""
        return self.perplexity / self.float_perplexity

    @property
    def ratio_spread(self) -> float | None:
        """Of the ratio."""
        return None if self.spread is None else self.spread / self.float_perplexity

    @property
    def kl(self) -> float:
        """Mean KL(float || quantized), in nats per token."""
        return _mean(self.runs, lambda run: run.kl)

    @property
    def kl_spread(self) -> float | None:
        """Of the KL."""
        return _deviation(self.runs, lambda run: run.kl)

    @property
    def agreement(self) -> float:
        """Mean top-1 agreement with the float model, in [0, 1]."""
        return _mean(self.runs, lambda run: run.agreement)

    @property
    def agreement_spread(self) -> float | None:
        """Of the agreement."""
        return _deviation(self.runs, lambda run: run.agreement)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the derived ones included."""
        derived = {name: getattr(self, name) for name in _DERIVED}
        return asdict(self) | derived | {"runs": [asdict(run) for run in self.runs]}


@dataclass(frozen=True)
class Row:
    """One method's results.

    method: as it was asked for, or "float". texts: its scores on each text, in the order asked for;
    the first is the headline. weight_bytes: of the quantized linears on disk, codes, scales and
    rotations (for "float": of the same linears' weights in memory). weights: how many values they
    hold.
    """

    method: str
    texts: tuple[Scores, ...]
    weight_bytes: int
    weights: int

    @property
    def headline(self) -> Scores:
        """On the first text."""
        return self.texts[0]

    @property
    def seconds(self) -> float:
        """Mean time of a quantization."""
        return _mean(self.headline.runs, lambda run: run.quantize_seconds)

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight of the quantized linears."""
        return 8 * self.weight_bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the derived ones and those of the headline text included."""
        headline = {name: getattr(self.headline, name) for name in ("float_perplexity", *_DERIVED)}
        return {
            "method": self.method,
            **headline,
            "weight_bytes": self.weight_bytes,
            "weights": self.weights,
            "seconds": self.seconds,
            "bits_per_weight": self.bits_per_weight,
            "runs": [asdict(run) for run in self.headline.runs],
            "texts": [scores.to_dict() for scores in self.texts],
        }


@dataclass(frozen=True)
class Comparison:
    """rows: the float model's first, then the methods in the order asked for.

    texts: the evaluation texts as they were asked for. windows: of the first of them.
    """

    rows: list[Row]
    texts: list[str]
    seq_len: int
    windows: int
    calibration: str
    samples: int
    calibration_seq_len: int
    convention: str = CONVENTION

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; "text" is the first text."""
        return {
            **asdict(self),
            "rows": [row.to_dict() for row in self.rows],
            "text": self.texts[0],
        }


def _mean(runs: tuple[Run, ...], value: Callable[[Run], float]) -> float:
    return statistics.fmean(map(value, runs))


def _deviation(runs: tuple[Run, ...], value: Callable[[Run], float]) -> float | None:
    return statistics.stdev(map(value, runs)) if len(runs) > 1 else None
