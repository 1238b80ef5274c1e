"""What quantizing a decoder block takes, from its shapes alone: memory stage by stage, operations.

Beside every figure stands what the code of that stage holds; sizes are of bytes, and what is small
beside a weight or an input of the block is left out. benchmarks/bench_memory.py holds the sums
against measured peaks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal

from torch import nn

from duqpp.format import BLOCK_SIZE
from duqpp.methods.refine.schedule import held_back
from duqpp.models.family import LinearGroup
from duqpp.models.shapes import Forward

Rotated = Literal["none", "shared", "per-block"]

SAMPLE_TOKENS = 1024  # random rows kept of each input, besides the rows of channel peaks
CODES = 17 / 32  # bytes a weight: a code of 4 bits, and a scale for 32 of them
_FLOAT32, _FLOAT64 = 4, 8
_COMPARED_ROWS = 1024  # at a time, after GPTQ
ROWS_AT_A_TIME = 2048  # of a group's input, transformed and rounded for the Hessian


@dataclass(frozen=True)
class Operations:
    """Floating-point operations by what they are done in, and what else takes time.

    half: products in the dtype of the model. single, double: in float32 and float64. moved: bytes
    that rounding and the like read and write. steps: one after the other, each too small to fill a
    GPU, whose time is that of a launch.
    """

    half: float = 0.0
    single: float = 0.0
    double: float = 0.0
    moved: float = 0.0
    steps: float = 0.0

    def __add__(self, other: "Operations") -> "Operations":
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Operations(*(one + two for one, two in pairs))

    def times(self, factor: float) -> "Operations":
        """All of them so many times."""
        return Operations(*(factor * getattr(self, each.name) for each in fields(self)))

    @property
    def total(self) -> float:
        """Floating-point operations of every kind."""
        return self.half + self.single + self.double


@dataclass(frozen=True)
class Cost:
    """A part of the work on one block.

    parts: bytes that it holds at its peak where blocks compute, by what they are. resting: bytes of
    activations that it makes and puts where those rest, beside what is between the blocks.
    """

    name: str
    parts: Mapping[str, float]
    operations: Operations = field(default_factory=Operations)
    resting: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes in all where blocks compute."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class GroupShape:
    """A linear group that is quantized.

    channels: K. rows: N of each of its linears. returns: whether the block gets what it makes.
    """

    name: str
    channels: int
    rows: tuple[int, ...]
    returns: bool

    @property
    def outputs(self) -> int:
        """N, of all linears together."""
        return sum(self.rows)

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return self.channels * self.outputs

    @property
    def square(self) -> int:
        """Entries of a matrix [K, K]."""
        return self.channels**2


@dataclass(frozen=True)
class BlockShape:
    """A decoder block. groups: those that are quantized. stored: bytes of its parameters. width,
    itemsize: of the activations between blocks, channels and bytes.
    """

    groups: tuple[GroupShape, ...]
    stored: int
    width: int
    itemsize: int
    forward: Forward

    @classmethod
    def of(
        cls, block: nn.Module, groups: Sequence[LinearGroup], width: int, forward: Forward
    ) -> "BlockShape":
        """Of a block on any device, the meta device too."""
        shapes = []
        for group in groups:
            linears = [block.get_submodule(name) for name in group.linears]
            rows = tuple(linear.out_features for linear in linears)
            returns = group.returns is not None
            shapes.append(GroupShape(group.name, linears[0].in_features, rows, returns))
        parameters = list(block.parameters())
        stored = sum(p.numel() * p.element_size() for p in parameters)
        return cls(tuple(shapes), stored, width, parameters[0].element_size(), forward)

    @cached_property
    def weights(self) -> int:
        """Weights that are quantized."""
        return sum(group.weights for group in self.groups)

    @cached_property
    def widest(self) -> int:
        """K of the group with the most channels."""
        return max((group.channels for group in self.groups), default=0)

    def passes(self, tokens: float) -> Operations:
        """One forward pass over so many tokens."""
        return Operations(half=self.forward.operations * tokens / self.forward.tokens)

    def between(self, tokens: float) -> float:
        """Bytes of what so many tokens are between two blocks."""
        return tokens * self.width * self.itemsize


@dataclass(frozen=True)
class Text:
    """The calibration text of one rank.

    calibrating: tokens that calibrate. all: with those that only refine. ranks: how many ranks
    there are. everywhere: tokens that calibrate, of all of them. whole: with those that only
    refine. batches: they make.
    """

    calibrating: int
    all: int
    ranks: int
    everywhere: int
    whole: int
    batches: int

    @property
    def held(self) -> float:
        """Share of the text that training holds back."""
        return len(held_back(self.batches)) / self.batches


@dataclass(frozen=True)
class ModelShape:
    """All blocks of a model, and what is behind them. head: weights of lm_head, tied or not."""

    blocks: Mapping[BlockShape, int]
    head: int

    @property
    def weights(self) -> int:
        """Weights that are quantized."""
        return sum(count * shape.weights for shape, count in self.blocks.items())

    @property
    def outputs(self) -> int:
        """Channels that quantized linears give, all together."""
        return sum(n * sum(g.outputs for g in s.groups) for s, n in self.blocks.items())

    @property
    def forward(self) -> float:
        """Bytes of the forward pass through the block that takes most."""
        return max(shape.forward.bytes for shape in self.blocks)

    def passes(self, tokens: float) -> float:
        """Operations of one forward pass over so many tokens."""
        blocks = sum(n * s.passes(tokens).half for s, n in self.blocks.items())
        return blocks + 2 * tokens * self.head


def rounding(shape: BlockShape, *, rotated: Rotated = "none") -> list[Cost]:
    """Of a method that reads no activations: every group folded, rounded and reported."""
    kept = {"float32 weights of the block": _FLOAT32 * shape.weights}
    return [
        cost
        for group in shape.groups
        for cost in (_folded(kept, group, rotated), _reported(kept, group))
    ]


# What stands beside the float32 weights while they are folded: float64 before and after, and for a
# matrix per block the result once more in another order.
_FOLD = {"none": 12, "shared": 16, "per-block": 24}


def _folded(kept: Mapping[str, float], group: GroupShape, rotated: Rotated) -> Cost:
    """The transform into the weights, and rounding to nearest where there is no GPTQ."""
    work = Operations(
        double=0.0 if rotated == "none" else 2.0 * BLOCK_SIZE * group.weights,
        moved=60.0 * group.weights,
    )
    own = {"weights in float64": float(_FOLD[rotated] * group.weights)}
    return Cost(f"{group.name}: fold", {**kept, **own}, work)


def _reported(kept: Mapping[str, float], group: GroupShape, samples: float = 0.0) -> Cost:
    """Errors of a group. samples: bytes of its sampled inputs."""
    # Exact weights, dequantized ones, exact ones in one, the difference; the last is made behind
    # the transformed samples and their magnitudes.
    report = _FLOAT32 * group.weights * 3 + max(_FLOAT32 * group.weights, 2 * samples)
    work = Operations(moved=50.0 * group.weights)
    return Cost(f"{group.name}: report", {**kept, "errors of the weights": report}, work)


def sampled_rows(tokens: int, channels: int) -> float:
    """Rows kept of an input: random ones, and those with the peak of a channel, as many as there
    are different ones where peaks fall on tokens at random."""
    peaks = tokens * (1 - math.exp(-channels / tokens))
    return min(SAMPLE_TOKENS, tokens) + peaks


def independent(
    shape: BlockShape,
    text: Text | None,
    *,
    rotated: Rotated,
    gptq: bool,
    float_hessian: bool,
    smoothed: bool,
    float_outputs: bool,
    search: int,
) -> list[Cost]:
    """Of methods that fit each group by itself, from one pass over float inputs.

    text: None where no activations are read. search: steps of the greedy search of a rotation.
    """
    if text is None:
        return rounding(shape, rotated=rotated)
    tokens, groups = text.calibrating, shape.groups
    samples = {
        g.name: _FLOAT32 * sampled_rows(text.everywhere, g.channels) * g.channels for g in groups
    }
    squares = sum(g.square for g in groups)
    moments = {"second moments, float64": _FLOAT64 * squares} if gptq and float_hessian else {}
    resting = shape.between(tokens) if float_outputs else 0.0
    # float32 of a batch's input, and its magnitudes.
    watched = 2 * _FLOAT32 * shape.forward.tokens * shape.widest
    grams = sum(2 * tokens * g.square for g in groups)
    observe = Cost(
        "float pass, statistics",
        {
            "forward pass of a batch": shape.forward.bytes + watched,
            "sampled inputs": sum(samples.values()),
            **moments,
        },
        shape.passes(tokens)
        + Operations(
            single=float(grams) if moments else 0.0,
            moved=5 * _FLOAT32 * tokens * sum(g.channels for g in groups),
        ),
    )
    # Statistics, samples, and what transforms are made for.
    kept: dict[str, float] = {"float32 weights of the block": _FLOAT32 * shape.weights}
    kept["sampled inputs, three times"] = 3 * sum(samples.values())
    stages = [observe]
    if smoothed and rotated != "per-block":
        group = max(groups, key=lambda g: g.weights)
        extra = _FLOAT32 * group.weights + (_FLOAT32 + _FLOAT64) * max(group.rows) * group.channels
        stages.append(
            Cost("smoothing", {**kept, **moments, "smoothed weights": extra},
                  Operations(moved=48 * shape.weights))
        )  # fmt: skip
    if search:
        steps = search * len(groups) * 12
        stages.append(Cost("search of rotations", {**kept, **moments}, Operations(steps=steps)))
    if gptq:
        hessians = {"Hessians": _FLOAT32 * squares}
        stages.append(_hessians(shape, text, {**kept, **hessians}, float_hessian))
        kept |= hessians
    for group in groups:
        stages.append(_folded(kept, group, rotated))
        if gptq:
            stages += _by_gptq(kept, group, text, drift=False)
            kept["Hessians"] -= _FLOAT32 * group.square
        stages.append(_reported(kept, group, samples[group.name]))
    stages = [replace(stage, resting=resting) for stage in stages]
    return stages if float_outputs else [*stages, quantized_pass(shape, text)]


def _hessians(
    shape: BlockShape, text: Text, kept: Mapping[str, float], float_hessian: bool
) -> Cost:
    """All groups' Hessians before the first is rounded."""
    largest = max(group.square for group in shape.groups)
    if float_hessian:  # the moments, and beside them three more of one group while they turn
        work = Operations(single=sum(4 * BLOCK_SIZE * g.square for g in shape.groups))
        return Cost("Hessians", {**kept, "one in turning": 3 * _FLOAT32 * largest}, work)
    rows = shape.forward.tokens * shape.widest
    squares = sum(group.square for group in shape.groups)
    parts = {
        **kept,
        "of it in float64 while they are added up": (_FLOAT64 - _FLOAT32) * squares,
        "rounded inputs of a batch": 20 * rows,
        "its forward": shape.forward.bytes,
    }
    products = sum(2 * text.calibrating * g.square for g in shape.groups)
    return Cost("Hessians", parts, shape.passes(text.calibrating) + Operations(single=products))


def _by_gptq(
    kept: Mapping[str, float], group: GroupShape, text: Text, *, drift: bool
) -> list[Cost]:
    """The factors of one Hessian, and rounding column by column. `kept` has the Hessian.

    The rows of a weight are split over ranks.
    """
    k, n, weights = group.channels, group.outputs, group.weights
    share = 1 / text.ranks
    folded: dict[str, float] = {"folded weights": _FLOAT32 * weights}
    stages = []
    if drift:
        solved = group.square if n > k else weights * share
        stages.append(
            Cost(
                f"{group.name}: make up for the drift",
                {
                    **kept,
                    **folded,
                    # The matrix of the equations, and its factor.
                    "two matrices in float64": 2 * _FLOAT64 * group.square,
                    "right side and solution, float64": 2 * _FLOAT64 * solved,
                },
                Operations(
                    single=2 * n * k**2 * share,
                    double=k**3 / 3 + 2 * k * solved,
                    moved=60 * weights * share,
                ),
            )
        )
        folded["what makes up for the drift"] = _FLOAT32 * weights * share
    stages.append(
        Cost(
            f"{group.name}: factors of the Hessian",
            {**kept, **folded, "factors": (_FLOAT64 + _FLOAT32) * group.square},
            Operations(double=k**3 / 3),
        )
    )
    stages.append(
        Cost(
            f"{group.name}: GPTQ",
            {
                **kept,
                **folded,
                "factor": _FLOAT32 * group.square,
                "codes, errors, what they were rounded from": (2 * _FLOAT32 + CODES) * weights,
                "rows compared with rounding to nearest": 20 * k * min(n, _COMPARED_ROWS),
            },
            Operations(
                single=(n * k**2 + 2 * n * k**2) * share,
                moved=16 * weights * share,
                steps=12 * k / BLOCK_SIZE,
            ),
        )
    )
    return stages


def sequential(
    shape: BlockShape,
    text: Text,
    *,
    gptq: bool,
    drift: bool,
    float_stream: bool,
    float_outputs: bool,
) -> list[Cost]:
    """Of the method that quantizes groups one after the other, each on what it will really read."""
    tokens, all_tokens = text.calibrating, text.all
    stages: list[Cost] = []
    batch = {"forward pass of a batch": float(shape.forward.bytes)}
    if float_outputs:
        stages.append(Cost("float outputs", batch, shape.passes(all_tokens)))
    if float_stream:
        read = tokens * sum(g.channels for g in shape.groups) * shape.itemsize if drift else 0
        # Batch by batch, and then in one tensor each.
        parts = {**batch, "float inputs of its groups, twice": 2.0 * read}
        stages.append(Cost("float pass", parts, shape.passes(all_tokens)))
    resting = (float_outputs + float_stream) * shape.between(all_tokens)
    stages = [replace(stage, resting=resting) for stage in stages]
    done = 0
    for index, group in enumerate(shape.groups):
        own: dict[str, float] = {"latents of the groups before": _FLOAT32 * done}
        own["float32 weights"] = _FLOAT32 * group.weights
        if drift:
            left = sum(g.channels for g in shape.groups[index:])
            own["float inputs from here on"] = tokens * left * shape.itemsize
        # What is known of the block rests, and the input of what will be.
        rest = resting + (tokens * group.channels * shape.itemsize if group.returns else 0)
        turn = _group_in_turn(shape, group, text, own, gptq=gptq, drift=drift)
        stages += [replace(stage, resting=rest) for stage in turn]
        resting += shape.between(tokens) if group.returns else 0
        done += group.weights
    return stages


def _group_in_turn(
    shape: BlockShape,
    group: GroupShape,
    text: Text,
    kept: Mapping[str, float],
    *,
    gptq: bool,
    drift: bool,
) -> list[Cost]:
    tokens, k = text.calibrating, group.channels
    # Every linear runs once on the calibrating tokens, quantized, for what comes behind it.
    passed = shape.passes(tokens).times(group.weights / max(1, shape.weights))
    x = {"its input, float32": _FLOAT32 * tokens * k}
    forward = {"forward pass of a batch": shape.forward.bytes}
    chunk = min(tokens, ROWS_AT_A_TIME) * k
    sums = (1 + drift) if gptq else 0
    name = "Hessian and drift" if drift else "Hessian"
    added = {f"{name}, float64": sums * _FLOAT64 * group.square} if gptq else {}
    matrices = {name: sums * _FLOAT32 * group.square} if gptq else {}
    products = sums * 2 * tokens * group.square
    blocks = k // BLOCK_SIZE
    stages = [
        Cost(
            f"{group.name}: its input",
            {**kept, **x, **forward},
            passed + Operations(moved=12 * tokens * k),
        ),
        Cost(
            f"{group.name}: transform",
            {**kept, **x, "its weights in one": _FLOAT32 * group.weights},
            Operations(
                single=2 * BLOCK_SIZE * (tokens * k + group.weights), double=blocks * 2e6, steps=200
            ),
        ),
        Cost(
            f"{group.name}: Hessian, drift" if gptq else f"{group.name}: peaks of its input",
            {**kept, **x, **added, "rows in turn": 32 * chunk},
            Operations(single=products + 2 * BLOCK_SIZE * tokens * k, moved=60 * tokens * k),
        ),
    ]
    stages.append(_folded({**kept, **matrices}, group, "per-block"))
    if gptq:
        stages += _by_gptq({**kept, **matrices}, group, text, drift=drift)
    return [*stages, _reported(kept, group)]


def quantized_pass(shape: BlockShape, text: Text) -> Cost:
    """What enters the next block."""
    parts = {"forward pass of a batch": float(shape.forward.bytes)}
    return Cost("quantized pass", parts, shape.passes(text.all))


def refined_block(shape: BlockShape, text: Text, *, checks: int) -> Cost:
    """Training of one block through its rounding. checks: of the held-back loss.

    Each step is on a batch of one rank, while the others wait.
    """
    latents = _FLOAT32 * shape.weights
    trained, held = text.whole * (1 - text.held), text.whole * text.held
    batches = trained / shape.forward.tokens
    return Cost(
        "refine",
        {
            "what codes were rounded from": latents,
            "latents, gradients, two moments": 4 * latents,
            "the best so far": latents,
            "codes": CODES * shape.weights,
            # Of gradients there are none yet while all rounded weights are kept for them.
            "a batch, forwards and backwards": 4.5 * shape.forward.bytes,
        },
        Operations(
            single=shape.passes(3 * trained + checks * held).half,
            moved=60 * shape.weights * batches,
            steps=400 * batches,
        ),
        shape.between(text.all),
    )


def learned_rotations(shape: BlockShape, text: Text, *, epochs: int) -> Cost:
    """Training of one block's rotations: every weight is rotated and rounded for every batch."""
    groups, tokens = shape.groups, text.calibrating
    trained, held = text.everywhere * (1 - text.held), text.everywhere * text.held
    batches = epochs * trained / shape.forward.tokens
    products = shape.passes(epochs * (3 * trained + held)).half
    samples = sum(sampled_rows(text.everywhere, g.channels) * g.channels for g in groups)
    return Cost(
        "training of rotations",
        {
            "float32 weights of the block": _FLOAT32 * shape.weights,
            "sampled inputs, three times": 3 * _FLOAT32 * samples,
            "weights as they are rotated and rounded": 3 * _FLOAT32 * shape.weights,
            "a batch, forwards and backwards": 4.5 * shape.forward.bytes,
        },
        Operations(
            single=products + 6 * BLOCK_SIZE * shape.weights * batches,
            moved=60 * shape.weights * batches,
            steps=400 * batches,
        ),
        shape.between(tokens),
    )


def distilled(model: ModelShape, text: Text, *, epochs: int, check_steps: int) -> Cost:
    """Training of all blocks together."""
    trained, held = text.all * (1 - text.held), text.all * text.held
    batch = text.whole / text.batches
    steps = epochs * trained / batch
    checks = 1 + steps / check_steps
    return Cost(
        "distill",
        {
            "latents, two moments": 3 * _FLOAT32 * model.weights / text.ranks,
            "the best codes so far": CODES * model.weights / text.ranks,
            "what products give, for the gradients": _FLOAT32 * batch * model.outputs,
            "a block of a batch, forwards and backwards": 10 * model.forward,
        },
        Operations(
            # Forwards, forwards again for the gradients, and backwards.
            single=model.passes(4 * epochs * trained + checks * held),
            moved=60 * model.weights * steps,
            steps=600 * len(model.blocks) * steps,
        ),
    )
