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

from duqpp.calibration.hessian import PANEL, PART
from duqpp.format import BLOCK_SIZE
from duqpp.methods.refine.schedule import held_back
from duqpp.models.family import LinearGroup
from duqpp.models.logits import LOGIT_TOKENS
from duqpp.models.shapes import Forward

Rotated = Literal["none", "shared", "per-block"]

SAMPLE_TOKENS = 1024  # random rows kept of each input, besides the rows of channel peaks
# Of a group, that are folded, rounded or reported together: at most some 15 GB in float64 and
# beside it. All of a group's up to LLaMA-3 70B; the rows of a wider group are taken in parts,
# linear by linear.
WEIGHTS_AT_A_TIME = 2**29
REPORT_ROWS = 256  # of the sampled ones, on which a report's errors are measured
CODES = 17 / 32  # bytes a weight: a code of 4 bits, and a scale for 32 of them
_FLOAT32, _FLOAT64 = 4, 8
_COMPARED_ROWS = 1024  # at a time, after GPTQ
_SEARCHED_ROWS = 2**16  # of 32 values, at a time
ROWS_AT_A_TIME = 2048  # of a group's input, transformed and rounded for the Hessian


@dataclass(frozen=True)
class Operations:
    """Floating-point operations by what they are done in, and what else takes time.

    half: products in the dtype of the model. rounded: of values that are rounded to MXFP4, in
    training, which are in bfloat16 on a GPU and in float32 on a CPU (see `product_dtype`). single,
    double: in float32 and float64. moved: bytes that rounding and the like read and write. steps:
    one after the other, each too small to fill a GPU, whose time is that of a launch.
    """

    half: float = 0.0
    rounded: float = 0.0
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
        return self.half + self.rounded + self.single + self.double


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

    @property
    def gram(self) -> float:
        """Operations of x.T x for each token: of panels of columns, what is not below them."""
        return self.channels * (self.channels + min(PANEL, self.channels))

    @property
    def at_once(self) -> int:
        """Weights that are folded and rounded together."""
        return min(self.weights, WEIGHTS_AT_A_TIME)


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
    def outputs(self) -> int:
        """Channels that quantized linears give."""
        return sum(group.outputs for group in self.groups)

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
        return sum(count * shape.outputs for shape, count in self.blocks.items())

    @property
    def forward(self) -> float:
        """Bytes of the forward pass through the block that takes most."""
        return max(shape.forward.bytes for shape in self.blocks)

    def passes(self, tokens: float) -> float:
        """Operations of one forward pass through the blocks over so many tokens."""
        return sum(n * s.passes(tokens).half for s, n in self.blocks.items())


def rounding(shape: BlockShape, *, rotated: Rotated = "none") -> list[Cost]:
    """Of a method that reads no activations: every group folded, rounded and reported."""
    stages = []
    for index, group in enumerate(shape.groups):
        kept = _weights_of(shape.groups[index:])
        stages += [_folded(kept, group, rotated), _reported(kept, group, _FLOAT32)]
    return stages


def _weights_of(groups: Sequence[GroupShape]) -> dict[str, float]:
    """Those of the groups that are not done yet."""
    return {"float32 weights": _FLOAT32 * float(sum(group.weights for group in groups))}


# What stands beside a group's float32 weights while they are folded: those in one, in float64, and
# the result in float64, for a matrix per block in two orders, or in float32.
_FOLD = {"none": 4 + 8 + 4, "shared": 4 + 8 + 8, "per-block": 4 + 8 + 8 + 8}


def _folded(kept: Mapping[str, float], group: GroupShape, rotated: Rotated) -> Cost:
    """The transform into the weights, and rounding to nearest where there is no GPTQ."""
    work = Operations(
        double=0.0 if rotated == "none" else 2.0 * BLOCK_SIZE * group.weights,
        moved=60.0 * group.weights,
    )
    own = {
        "weights in float64": float(_FOLD[rotated] * group.at_once),
        "parts before": float(_FLOAT32 * (group.weights - group.at_once)),
    }
    return Cost(f"{group.name}: fold", {**kept, **own}, work)


def _reported(
    kept: Mapping[str, float], group: GroupShape, made: float, samples: float = 0.0
) -> Cost:
    """Errors of a group. made: bytes a weight that are rounded, and what they were rounded from.
    samples: bytes of its sampled inputs.
    """
    # Linear by linear, or a part of it, dequantized, twice, beside samples, transformed; or those,
    # and magnitudes of others.
    linear = _FLOAT32 * min(max(group.rows) * group.channels, group.at_once)
    report = {
        "rounded weights": made * group.weights,
        "errors": samples + max(2 * linear, samples),
    }
    return Cost(f"{group.name}: report", {**kept, **report}, Operations(moved=50.0 * group.weights))


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
    samples = [_FLOAT32 * sampled_rows(text.everywhere, g.channels) * g.channels for g in groups]
    squares = sum(g.square for g in groups)
    moments = {"second moments, float64": _FLOAT64 * squares} if gptq and float_hessian else {}
    resting = shape.between(tokens) if float_outputs else 0.0
    # A batch's input, in float32, and its magnitudes.
    watched = (shape.itemsize + 2 * _FLOAT32) * shape.forward.tokens * shape.widest
    observe = Cost(
        "float pass, statistics",
        {
            "forward pass of a batch, or what is read there": max(shape.forward.bytes, watched),
            "sampled inputs": sum(samples),
            **moments,
        },
        shape.passes(tokens)
        + (_added_up(shape, tokens) if moments else Operations())
        + Operations(moved=5 * _FLOAT32 * tokens * sum(g.channels for g in groups)),
    )
    outputs = {"outputs of the float block": float(_FLOAT32 * REPORT_ROWS * shape.outputs)}
    kept = _weights_of(groups) | {"sampled inputs": sum(samples)} | outputs
    stages = [observe]
    if smoothed and rotated != "per-block":
        group = max(groups, key=lambda g: g.weights)
        extra = _FLOAT32 * group.weights + (_FLOAT32 + _FLOAT64) * max(group.rows) * group.channels
        stages.append(
            Cost("smoothing", {**kept, **moments, "smoothed weights": extra},
                  Operations(moved=48 * shape.weights))
        )  # fmt: skip
    if search:
        stages.append(_search(groups, search, {**kept, **moments}, samples))
    if gptq:
        stages.append(_hessians(shape, text, kept, float_hessian))
    for index, group in enumerate(groups):
        left = _weights_of(groups[index:]) | {"sampled inputs": sum(samples[index:])} | outputs
        made = _FLOAT32
        if gptq:
            behind = sum(g.square for g in groups[index + 1 :])
            left["Hessians of the groups behind"] = _FLOAT32 * behind
            stages += _by_gptq(left, group, text, rotated=rotated, drift=False)
            made = 2 * _FLOAT32
        else:
            stages.append(_folded(left, group, rotated))
        stages.append(_reported(left, group, made, samples[index]))
    stages = [replace(stage, resting=resting) for stage in stages]
    return stages if float_outputs else [*stages, quantized_pass(shape, text)]


def _search(
    groups: Sequence[GroupShape], steps: int, kept: Mapping[str, float], samples: Sequence[float]
) -> Cost:
    """The greedy search of rotations, group by group."""
    parts = {
        **kept,
        "smoothed inputs of a group": max(samples),
        "some of them, rotated": 2 * min(max(samples), _FLOAT32 * BLOCK_SIZE * _SEARCHED_ROWS),
    }
    return Cost("search of rotations", parts, Operations(steps=12 * steps * len(groups)))


def _added_up(shape: BlockShape, tokens: float) -> Operations:
    """Sums of x.T x over the tokens of every group's input."""
    squares = sum(group.square for group in shape.groups)
    return Operations(
        single=tokens * sum(group.gram for group in shape.groups),
        # Into a float64 sum for each batch, above the diagonal.
        moved=0.5 * (2 * _FLOAT64 + _FLOAT32) * squares * tokens / shape.forward.tokens,
    )


def _hessians(
    shape: BlockShape, text: Text, kept: Mapping[str, float], float_hessian: bool
) -> Cost:
    """All groups' Hessians before the first is rounded."""
    squares = [group.square for group in shape.groups]
    if float_hessian:
        # Of those before in float32, of those behind the moments in float64; and of one its moments
        # in both, or in float32, once turned, and in another order.
        most = max(
            _FLOAT32 * sum(squares[:index])
            + (_FLOAT64 + _FLOAT32) * square
            + _FLOAT64 * sum(squares[index + 1 :])
            for index, square in enumerate(squares)
        )
        work = Operations(single=sum(4 * BLOCK_SIZE * square for square in squares))
        return Cost("Hessians", {**kept, "moments, one in turning": most}, work)
    rows = shape.forward.tokens * shape.widest
    parts = {
        **kept,
        "Hessians, float64": float(_FLOAT64 * sum(squares)),
        "rounded inputs of a batch": 20.0 * rows,
        "its forward": float(shape.forward.bytes),
    }
    work = shape.passes(text.calibrating) + _added_up(shape, text.calibrating)
    return Cost("Hessians", parts, work)


def _by_gptq(
    kept: Mapping[str, float], group: GroupShape, text: Text, *, rotated: Rotated, drift: bool
) -> list[Cost]:
    """The fold, the factors of a group's Hessian, and rounding column by column.

    The rows of a weight are split over ranks. Where there is no drift, the Hessian is let go of
    once it has its factor.
    """
    k, n, weights, square = group.channels, group.outputs, group.weights, group.square
    share = 1 / text.ranks
    matrices = {"Hessian": float(_FLOAT32 * square)}
    if drift:
        matrices["drift"] = float(_FLOAT32 * square)
    stages = [_folded({**kept, **matrices}, group, rotated)]
    kept = {**kept, "folded weights": float(_FLOAT32 * weights)}
    if drift:
        stages.append(_made_up({**kept, **matrices}, group, share))
        kept |= {"what makes up for the drift": _FLOAT32 * weights * share}
    factors = {"factors": float((_FLOAT64 + _FLOAT32) * square)}
    stages.append(
        Cost(
            f"{group.name}: factors of the Hessian",
            {**kept, **matrices, **factors},
            Operations(double=k**3 / 3),
        )
    )
    if drift:
        kept |= matrices
    # Rows of W - Q, or of those and of what they are compared with.
    compared = 5 * _FLOAT32 * k * min(n * share, _COMPARED_ROWS)
    stages.append(
        Cost(
            f"{group.name}: GPTQ",
            {
                **kept,
                "factor": float(_FLOAT32 * square),
                "codes, what they were rounded from": (CODES + _FLOAT32) * weights,
                "errors": max(_FLOAT32 * group.at_once * share, compared),
            },
            Operations(
                single=(n * k**2 + 2 * n * k**2) * share,
                moved=16 * weights * share,
                steps=12 * k / BLOCK_SIZE,
            ),
        )
    )
    return stages


def _made_up(kept: Mapping[str, float], group: GroupShape, share: float) -> Cost:
    """Weights that make up for the drift. share: of the rows that are this rank's."""
    k, n, weights = group.channels, group.outputs, group.weights * share
    # What is solved for: C H^-1 where W has more rows than columns, W C H^-1 of each part else.
    solved = group.square if n > k else group.at_once * share
    return Cost(
        f"{group.name}: make up for the drift",
        {
            **kept,
            "matrix of the equations, float64": float(_FLOAT64 * group.square),
            "solution, float64 and float32": (_FLOAT64 + _FLOAT32) * solved,
            "weights that make up for it": _FLOAT32 * weights if n > k else 0.0,
        },
        Operations(
            single=2 * n * k**2 * share,
            double=k**3 / 3 + 2 * k * solved,
            moved=60 * weights,
        ),
    )


def sequential(
    shape: BlockShape,
    text: Text,
    *,
    gptq: bool,
    drift: bool,
    float_stream: bool,
    float_outputs: bool,
    latents: bool,
) -> list[Cost]:
    """Of the method that quantizes groups one after the other, each on what it will really read.

    latents: whether those of the whole block are kept.
    """
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
        own = {"latents of the groups before": float(_FLOAT32 * done * latents)}
        own |= _weights_of([group])
        if drift:
            left = sum(g.channels for g in shape.groups[index + 1 :])
            own["float inputs behind"] = float(tokens * left * shape.itemsize)
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
    x: dict[str, float] = {"its input, float32": _FLOAT32 * tokens * k}
    if drift:
        x["float input"] = tokens * k * shape.itemsize
    forward = {"forward pass of a batch": shape.forward.bytes}
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
                single=2 * BLOCK_SIZE * (tokens * k + group.weights),
                double=k // BLOCK_SIZE * 2e6,
                steps=200,
            ),
        ),
        _observed_in_turn(shape, group, text, {**kept, **x}, gptq=gptq, drift=drift),
    ]
    made = _FLOAT32
    if gptq:
        stages += _by_gptq(kept, group, text, rotated="per-block", drift=drift)
        made = 2 * _FLOAT32
    else:
        stages.append(_folded(kept, group, "per-block"))
    return [*stages, _reported(kept, group, made)]


def _observed_in_turn(
    shape: BlockShape,
    group: GroupShape,
    text: Text,
    kept: Mapping[str, float],
    *,
    gptq: bool,
    drift: bool,
) -> Cost:
    """Once through a group's input, for the Hessian and what is due to the drift."""
    tokens, k = text.calibrating, group.channels
    moved, rotated = 60 * tokens * k, Operations(single=2 * BLOCK_SIZE * tokens * k)
    chunk = _FLOAT32 * min(tokens, ROWS_AT_A_TIME, shape.forward.tokens) * k
    if not gptq:  # in the order of its blocks, turned, and in its own order
        parts = {**kept, "rows in turn": 2.0 * chunk}
        return Cost(f"{group.name}: peaks of its input", parts, rotated + Operations(moved=moved))
    sums = 1 + drift
    # Rows turned and rounded, and either the float model's, in two orders; or a product of them, in
    # float32 and float64.
    product = (_FLOAT32 + _FLOAT64) * min(group.square, PART if drift else PANEL * k)
    in_turn = max(5 * chunk, (2 + drift) * chunk + product)
    parts = {
        **kept,
        "sums, float64": float(sums * _FLOAT64 * group.square),
        "rows in turn, or a sum in float32": float(max(in_turn, _FLOAT32 * group.square)),
    }
    batches = tokens / shape.forward.tokens
    work = Operations(
        single=tokens * (group.gram + 2 * group.square * drift),
        moved=moved + (0.5 + drift) * (2 * _FLOAT64 + _FLOAT32) * group.square * batches,
    )
    name = "Hessian, drift" if drift else "Hessian"
    return Cost(f"{group.name}: {name}", parts, rotated + work)


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
            rounded=shape.passes(3 * trained + checks * held).half,
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
            "sampled inputs": _FLOAT32 * samples,
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


@dataclass(frozen=True)
class Training:
    """Of a whole model. cost: of all steps. state: bytes of what it can be resumed from, on disk,
    whole before an earlier one is removed. saves: how often that is written.
    """

    cost: Cost
    state: float
    saves: int


def distilled(
    model: ModelShape, text: Text, *, epochs: int, check_steps: int, on_host: bool
) -> Training:
    """Training of all blocks together. Each step is on a batch whose sequences ranks share.

    on_host: products are in float32 there, and are kept for the gradients: no pass through a block
    has to be made again.
    """
    held_batches = len(held_back(text.batches))
    steps = epochs * (text.batches - held_batches)
    saves = (steps - 1) // check_steps
    trained, held = epochs * text.all * (1 - text.held), (1 + saves) * text.all * text.held
    largest = max(model.blocks, key=lambda shape: shape.weights)
    logits = 4 * _FLOAT32 * LOGIT_TOKENS * model.head / largest.width
    parts = {
        "latents, two moments": 3 * _FLOAT32 * model.weights / text.ranks,
        "the best codes so far": CODES * model.weights / text.ranks,
        "a batch through a block, or its logits": max(6 * model.forward, logits),
        "rounded weights of a block": float(_FLOAT32 * largest.weights),
    }
    if text.ranks > 1:
        parts["latents and gradients of a block, whole"] = 2.0 * _FLOAT32 * largest.weights
    if on_host:
        behind = (model.outputs - largest.outputs) * text.whole / text.batches / text.ranks
        parts["what products of other blocks give"] = _FLOAT32 * behind
    passes = 3 if on_host else 4
    work = Operations(
        rounded=model.passes(passes * trained + held),
        half=2 * model.head * (3 * trained + 2 * held),
        # A rank rounds all weights, for both passes, and steps with its own.
        moved=(20 + 40 / text.ranks) * model.weights * steps,
        steps=600 * sum(model.blocks.values()) * steps,
    )
    # Of both streams each rank has all batches.
    others = 2 * largest.between(text.whole - text.all)
    state = (3 * _FLOAT32 + CODES) * model.weights
    return Training(Cost("distill", parts, work, others), state, saves)
