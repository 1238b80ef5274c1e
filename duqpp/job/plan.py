"""What a quantization will take, from the configuration alone: memory, operations, disk, time.

The documents' formulas, `duqpp quantize --plan`, and what a job decides while it runs all come from
here and from `duqpp.methods.costs`. Memory is held against measured peaks
(benchmarks/bench_memory.py); operations are counted from shapes; times are an estimate.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from duqpp.config import QuantizeConfig
from duqpp.errors import InputError
from duqpp.job.blocks import block_bytes
from duqpp.methods.base import Needs
from duqpp.methods.costs import BlockShape, Cost, ModelShape, Operations, Text, Training
from duqpp.models.family import LinearGroup
from duqpp.models.logits import LOGIT_TOKENS
from duqpp.models.shapes import ShapedModel
from duqpp.models.stack import TOKENS_PER_BATCH
from duqpp.placement import HOST
from duqpp.placement.devices import has_room

Place = Literal["device", "host"]

_INTERPRETER = 0.55e9  # bytes of Python, torch and transformers; measured
_CONTEXT = 1.0e9  # bytes of a CUDA context and cuBLAS's workspaces
_HASHED = 1.0e9  # bytes a second of SHA-256, over the whole model, before the job


@dataclass(frozen=True)
class Machine:
    """What blocks compute on. half, single, double: operations a second of products in 16 bits,
    float32 and float64. moved: bytes a second of its memory. launch: seconds of a step that does
    next to nothing. memory: bytes; None is not known. source: where these figures are from.
    """

    name: str
    half: float
    single: float
    double: float
    moved: float
    launch: float
    memory: float | None
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether blocks have memory of their own, beside the host's."""
        return self.name in GPUS

    def at(self, flops: float) -> "Machine":
        """The same with so many operations a second in every dtype."""
        source = f"{flops:.3g} operations a second, as given"
        return replace(self, half=flops, single=flops, double=flops, source=source)

    def seconds(self, operations: Operations) -> float:
        """How long operations take one after the other."""
        return (
            operations.half / self.half
            + operations.rounded / (self.half if self.is_gpu else self.single)
            + operations.single / self.single
            + operations.double / self.double
            + operations.moved / self.moved
            + operations.steps * self.launch
        )


_EFFICIENCY = 0.4  # of a GPU's peaks; an assumption, as nothing was measured
_LAUNCH = 10e-6  # seconds from one small kernel to the next, from Python


def _gpu(
    name: str, half: float, single: float, double: float, moved: float, memory: float
) -> Machine:
    """A GPU by its maker's dense peaks, in TFLOP/s, TB/s and GB."""
    peaks = (1e12 * _EFFICIENCY * peak for peak in (half, single, double, moved))
    source = f"{_EFFICIENCY:.0%} of the dense peaks that its maker states"
    rates = dict(zip(("half", "single", "double", "moved"), peaks, strict=True))
    return Machine(name, **rates, launch=_LAUNCH, memory=1e9 * memory, source=source)


# SXM boards, from NVIDIA's data sheets. float32 is that of the CUDA cores: torch uses no TF32 for
# it; float64 that of the tensor cores.
GPUS: Mapping[str, Machine] = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100", 312, 19.5, 19.5, 2.0, 80),
        _gpu("H100", 989, 67, 67, 3.35, 80),
        _gpu("H200", 989, 67, 67, 4.8, 141),
        _gpu("B200", 2250, 75, 37, 8.0, 180),
    )
}


def this_cpu(dtype: torch.dtype) -> Machine:
    """The CPU that this runs on, measured in half a second."""
    side = 768
    rates = []
    for kind in (dtype, torch.float32, torch.float64):
        matrix = torch.ones(side, side, dtype=kind, device=HOST)
        rates.append(2 * side**3 / _fastest(partial(F.linear, matrix, matrix)))
    values = torch.ones(2**23, dtype=torch.float32, device=HOST)
    half, single, double = rates
    return Machine(
        name=HOST.type,
        half=half,
        single=single,
        double=double,
        moved=2 * values.nbytes / _fastest(values.clone),
        launch=5e-6,
        memory=_memory(),
        source="measured just now",
    )


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _memory() -> float | None:
    """Bytes of this machine's memory, where it says."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return None


@dataclass(frozen=True)
class StagePlan:
    """One stage of the work: name; device, host: bytes at its peak; seconds, operations: of all
    blocks together.
    """

    name: str
    device: float
    host: float
    seconds: float
    operations: float


@dataclass(frozen=True)
class JobPlan:
    """What a job will take, on each rank unless it says otherwise; sizes in bytes.

    activations: between blocks, of all streams. rests: where, "device" or "host". device, host:
    peaks; with a CPU all is in `host`. memory: what there is where blocks compute; None: not known.
    read, written, disk: of all ranks; disk is the checkpoint and what is kept beside it until the
    job is done. seconds: by what takes them.
    """

    machine: Machine
    ranks: int
    blocks: int
    weights: int
    dtype: str
    sequences: int
    tokens: int
    activations: float
    rests: Place
    device: float
    host: float
    memory: float | None
    stages: tuple[StagePlan, ...]
    read: float
    written: float
    disk: float
    disk_rate: float
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "fits": self.fits, "total_seconds": self.total_seconds}

    @property
    def largest(self) -> StagePlan:
        """The stage that takes most memory where blocks compute."""
        return max(self.stages, key=lambda stage: stage.device or stage.host)

    @property
    def tensors(self) -> float:
        """Bytes of tensors at the peak, where all of them are on the host."""
        return self.host - _INTERPRETER

    @property
    def fits(self) -> bool:
        """Whether there is memory for it where blocks compute; taken for granted if not known."""
        return self.memory is None or has_room(self.device or self.host, self.memory)

    @property
    def total_seconds(self) -> float:
        """How long it takes."""
        return sum(self.seconds.values())


def shaped(model_config: Any, config: QuantizeConfig) -> ShapedModel:
    """A model by its transformers configuration alone, to plan with; no weights are needed.

    Raises: InputError for a model that duqpp does not know.
    """
    dtype = config.torch_dtype or getattr(model_config, "dtype", None) or torch.bfloat16
    return ShapedModel(model_config, dtype, config.seq_len)


def plan_job(
    model: ShapedModel,
    config: QuantizeConfig,
    *,
    machine: Machine,
    device_memory: float | None = None,
    ranks: int = 1,
    disk_rate: float = 1e9,
) -> JobPlan:
    """What `quantize_model` will take.

    Args:
        model: from `shaped`, for sequences of `config.seq_len` tokens.
        machine: of `GPUS`, or `this_cpu`. device_memory: bytes, in the place of the machine's.
        ranks: processes, each on a device of its own.
        disk_rate: bytes a second, read or written.
    Raises: InputError for more ranks than there are batches of calibration sequences, and for a
        device in which one block has no room.
    """
    model.family.check(config.skip)
    plan = _Planner(model, config, machine, ranks).plan(device_memory or machine.memory, disk_rate)
    if device_memory is not None and not plan.fits:
        largest = plan.largest
        raise InputError(
            f"`device_memory` of {device_memory / 1e9:.1f} GB has no room for {largest.name!r}, "
            f"which takes {max(largest.device, largest.host) / 1e9:.1f} GB"
        )
    return plan


def memory_of_job(model: ShapedModel, config: QuantizeConfig, ranks: int = 1) -> float:
    """Bytes of a GPU's memory that quantizing takes with its activations there.

    Args: model: in the dtype that blocks compute in.
    """
    return _Planner(model, config, GPUS["H100"], ranks).all_on_device()


def memory_of_passes(model: ShapedModel, sequences: int) -> float:
    """Bytes of a GPU's memory that it takes to run the blocks of a model one after the other, each
    over so many sequences in turn, with the activations there, and then the head.
    """
    forwards = [model.forward(index) for index in range(len(model.blocks))]
    stored = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    rest = sum(shape.numel() for shape in model.rest().values())
    states: int = sequences * model.seq_len * model.config.hidden_size
    # The next block is copied beside the one that runs.
    values = states + rest + 2 * max(stored, default=0)
    in_turn = max((f.bytes / f.tokens for f in forwards), default=0.0) * model.seq_len
    logits: float = 4 * LOGIT_TOKENS * model.config.vocab_size * torch.float32.itemsize
    size: int = values * model.dtype.itemsize
    return _CONTEXT + size + max(in_turn, logits)


class _Planner:
    """The parts of a plan."""

    def __init__(
        self, model: ShapedModel, config: QuantizeConfig, machine: Machine, ranks: int
    ) -> None:
        self.model, self.config, self.machine, self.ranks = model, config, machine, ranks
        self.method = config.build_method()
        self.text = text_of(config, ranks)
        self.kinds = _kinds(model, config)
        self.shapes = dict.fromkeys((kind.shape for kind in self.kinds), 0)
        for kind in self.kinds:
            self.shapes[kind.shape] += kind.count
        self.itemsize = model.dtype.itemsize
        head = model.config.vocab_size * model.config.hidden_size
        self.whole = ModelShape(self.shapes, head)
        self.training: Training | None = None
        if self.needs.whole_model and self.text is not None:
            self.training = self.method.training(self.whole, self.text, on_host=not machine.is_gpu)

    @property
    def needs(self) -> Needs:
        return self.method.needs

    def streams(self) -> float:
        """Bytes of the activations between blocks, of one rank."""
        if self.text is None:
            return 0.0
        width = max(shape.between(self.text.all) for shape in self.shapes)
        return width * (1 + self.needs.float_stream)

    def costs(self) -> list[tuple[Cost, int]]:
        """Every stage, for each kind of block, and how many blocks there are of that kind."""
        return [
            (cost, count)
            for shape, count in self.shapes.items()
            for cost in self.method.stages(shape, self.text)
        ]

    def plan(self, memory: float | None, disk_rate: float) -> JobPlan:
        costs, streams = self.costs(), self.streams()
        fixed = self.fixed()
        resting = streams + max(cost.resting for cost, _ in costs)
        on_device = not self.machine.is_gpu or self.rests(memory) == "device"
        stages = self.stages(costs, fixed, streams, on_device)
        return JobPlan(
            machine=self.machine,
            ranks=self.ranks,
            blocks=len(self.model.blocks),
            weights=self.whole.weights,
            dtype=str(self.model.dtype).removeprefix("torch."),
            sequences=self.config.sequences if self.needs.inputs else 0,
            tokens=self.config.sequences * self.config.seq_len if self.needs.inputs else 0,
            activations=resting,
            rests="device" if self.machine.is_gpu and on_device else "host",
            device=max(stage.device for stage in stages),
            host=max(stage.host for stage in stages),
            memory=memory,
            stages=tuple(stages),
            disk_rate=disk_rate,
            **self.disk(disk_rate, stages),
        )

    def rests(self, memory: float | None) -> Place:
        """Where activations rest: on the device if that has room for them beside any stage."""
        return "device" if memory is None or has_room(self.all_on_device(), memory) else "host"

    def all_on_device(self) -> float:
        """Bytes of the device with the activations there; training of the whole model is not in it,
        which begins without most of them."""
        most = max(cost.peak + cost.resting for cost, _ in self.costs())
        return self.fixed() + most + self.streams()

    def fixed(self) -> float:
        """Bytes on a GPU whatever the stage: the block as it was read, the embedding."""
        if not self.machine.is_gpu:
            return 0.0
        embedding: float = self.whole.head * self.itemsize
        return _CONTEXT + embedding + max(shape.stored for shape in self.shapes)

    def staged(self) -> float:
        """Bytes on the host whatever the stage: what is read ahead, and what is written behind."""
        latents_too = self.needs.whole_model
        behind = max(s + latents_too * latents for s, latents, _ in self.block_files())
        ahead: int = max(shape.stored for shape in self.shapes) if self.machine.is_gpu else 0
        return _INTERPRETER + ahead + behind

    def stages(
        self, costs: list[tuple[Cost, int]], fixed: float, streams: float, on_device: bool
    ) -> list[StagePlan]:
        """By name, for the most memory of any block and the time of all."""
        found: dict[str, StagePlan] = {}
        if self.training is not None:
            costs = [*costs, (self.training.cost, 1)]
        staged = self.staged()
        for cost, count in costs:
            rests = cost.resting + streams
            device = fixed + cost.peak + (rests if on_device else 0)
            host = staged + (0 if on_device else rests)
            if not self.machine.is_gpu:
                device, host = 0.0, host + device
            operations = cost.operations.times(count)
            before = found.get(cost.name, StagePlan(cost.name, 0, 0, 0, 0))
            found[cost.name] = StagePlan(
                cost.name,
                max(device, before.device),
                max(host, before.host),
                before.seconds + self.machine.seconds(operations),
                before.operations + operations.total,
            )
        return list(found.values())

    def disk(self, rate: float, stages: list[StagePlan]) -> dict[str, Any]:
        """What is read and written, and the seconds of everything."""
        rest = sum(shape.numel() for shape in self.model.rest().values()) * self.itemsize
        source = rest + sum(count * shape.stored for shape, count in self.shapes.items())
        files = self.block_files()
        shards, latents = (sum(file[i] * file[2] for file in files) for i in (0, 1))
        read, written, kept = 2 * source, rest + shards, 0.0
        if (trained := self.training) is not None:
            # Blocks for the training, and their shards once more, for those that take their place;
            # they and the last state, or two of these, are there beside the latents.
            read += latents + 2 * shards
            written += latents + shards + trained.saves * trained.state
            states = min(2, trained.saves) * trained.state
            kept = latents + max(states, min(1, trained.saves) * trained.state + shards)
        work = sum(stage.seconds for stage in stages)
        moved = (read - source + written) / rate
        seconds = {
            "fingerprint of the model": source / min(rate, _HASHED),
            "reading and writing": moved,
            "computing": work,
        }
        return {
            "read": read,
            "written": written,
            "disk": rest + shards + kept,
            "seconds": seconds,
        }

    def block_files(self) -> list[tuple[int, int, int]]:
        """Of each kind, bytes of a shard, of what its codes were rounded from; and how many."""
        layout = self.method.layout(self.config.skip)
        return [
            (*block_bytes(self.model.blocks[kind.first], kind.groups, layout), kind.count)
            for kind in self.kinds
        ]


def text_of(config: QuantizeConfig, ranks: int) -> Text | None:
    """The calibration text of the rank that has most; None where no activations are read.

    Raises: InputError for a rank without a batch.
    """
    if ranks < 1:
        raise InputError(f"`ranks` must be at least 1, got {ranks}")
    if not config.needs.inputs:
        return None
    sequences = max(1, TOKENS_PER_BATCH // config.seq_len)  # of a batch
    batches = -(-config.samples // sequences)
    if ranks > batches:
        raise InputError(
            f"`ranks` is {ranks}, and there are {batches} batches of calibration sequences: "
            "more `samples` make more"
        )
    refining = -(-(config.sequences - config.samples) // sequences)
    own, others = -(-batches // ranks), -(-refining // ranks)
    calibrating = min(config.samples, own * sequences)
    rest = min(config.sequences - config.samples, others * sequences)
    return Text(
        calibrating * config.seq_len,
        (calibrating + rest) * config.seq_len,
        ranks,
        config.samples * config.seq_len,
        config.sequences * config.seq_len,
        batches + refining,
    )


@dataclass
class _Kind:
    """Blocks of one shape. first: index of one of them. groups: of that, those quantized."""

    shape: BlockShape
    first: int
    groups: tuple[LinearGroup, ...]
    count: int = 1


def _kinds(model: ShapedModel, config: QuantizeConfig) -> list[_Kind]:
    found: dict[Any, _Kind] = {}
    for index, block in enumerate(model.blocks):
        groups = model.family.quantized_groups(index, config.skip)
        key = (tuple((g.name, g.linears) for g in groups), model.kinds[index])
        if key in found:
            found[key].count += 1
            continue
        shape = BlockShape.of(block, groups, model.config.hidden_size, model.forward(index))
        found[key] = _Kind(shape, index, groups)
    return list(found.values())
