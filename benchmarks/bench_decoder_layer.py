"""One decoder layer of LLaMA-3, its linears quantized, against the bfloat16 layer of transformers.

Random weights, made on the device. Decode: M sequences, one token each, over a key-value cache of
`--context` tokens, launched one by one (eager) and as a CUDA graph. Prefill: one sequence of M
tokens. Cold layers are copied and used in turn, as a model's layers are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness import Run, add_device, parser, skip, start
from operands import ROTATION, RULE, latest, quantized_rows
from shapes import HEAD_DIM, MODELS, Model
from timing import Call, alternate, clock_for, copied, in_turn
from torch import Tensor, nn

from duqpp.checkpoint.layout import Layout, convert_block
from duqpp.models.family import LinearGroup, family_of
from duqpp.nn import MXFP4Linear
from duqpp.ops.dispatch import select
from duqpp.rotation.block_rotation import BlockRotation

DECODE_ROWS = (1, 4, 16, 64)
PREFILL_ROWS = (128, 512, 2048, 8192)
FOLDED = 2048  # rows of a weight that are folded at a time, in float64
LAYOUT = Layout("hadamard", "shared", False, RULE, RULE)
COLUMNS = {
    "model": "s",
    "phase": "s",
    "launch": "s",
    "cache": "s",
    "M": "d",
    "time_us": ".1f",
    "bf16_us": ".1f",
    "vs_bf16": ".2f",
}


class FixedCache:
    """Keys and values of a context, [M, heads, context, head_dim]; new ones replace the last.

    It has what attention calls of a cache of transformers, writes in place, and never grows: what
    is captured in a graph is the same at each replay.
    """

    def __init__(self, rows: int, heads: int, context: int, like: Tensor) -> None:
        shape = (rows, heads, context, HEAD_DIM)
        self._keys, self._values = (torch.randn(shape, device=like.device) for _ in "kv")
        self._keys, self._values = self._keys.to(like.dtype), self._values.to(like.dtype)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        length = keys.shape[2]
        self._keys[:, :, -length:].copy_(keys)
        self._values[:, :, -length:].copy_(values)
        return self._keys, self._values


class Layers:
    """A random float layer and its quantized form, in copies that no cache holds."""

    def __init__(self, model: Model, device: str, seed: int) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        config = LlamaConfig(
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=HEAD_DIM,
            num_hidden_layers=1,
            vocab_size=32,
            attn_implementation="sdpa",
        )
        self.model = model
        groups = family_of(config).quantized_groups(0, LAYOUT.skip)

        def empty() -> nn.Module:
            with torch.device("meta"):
                return LlamaDecoderLayer(config, 0).bfloat16().eval().requires_grad_(False)

        torch.manual_seed(seed)
        with torch.device(device):
            weights = {name: _random(t.shape) for name, t in empty().state_dict().items()}
        quantized = dict(_quantized(weights, empty(), groups))

        def float_layer() -> nn.Module:
            layer = empty()
            layer.load_state_dict({n: t.clone() for n, t in weights.items()}, assign=True)
            return layer

        def quantized_layer() -> nn.Module:
            layer = empty()
            convert_block(layer, groups, LAYOUT)
            layer.load_state_dict({n: t.clone() for n, t in quantized.items()}, assign=True)
            for module in layer.modules():
                if isinstance(module, MXFP4Linear):
                    module.requires_grad_(False).prepare()
            return layer

        self.floats, self.quantized = (
            list(copied(make, sum(t.nbytes for t in tensors.values())))
            for make, tensors in ((float_layer, weights), (quantized_layer, quantized))
        )

    def inputs(self, phase: str, rows: int, context: int) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states of M = `rows`, [M, 1, hidden] or [1, M, hidden]; the other arguments."""
        like = next(self.floats[0].parameters())
        shape = (rows, 1) if phase == "decode" else (1, rows)
        x = torch.randn(*shape, self.model.hidden, device=like.device).to(like.dtype)
        angles = torch.rand(1, shape[1], HEAD_DIM, device=like.device)
        embeddings = (angles.cos().to(like.dtype), angles.sin().to(like.dtype))
        arguments: dict[str, Any] = {"position_embeddings": embeddings, "attention_mask": None}
        if phase == "decode":
            cache = FixedCache(rows, self.model.kv_heads, context, like)
            arguments["past_key_values"] = cache
        return x, arguments

    def calls(self, x: Tensor, arguments: dict[str, Any], *, cold: bool) -> dict[str, Call]:
        """What the float layer adds to x, and what the quantized one does."""

        def call(copies: list[nn.Module]) -> Call:
            layers = in_turn(copies if cold else copies[:1])

            @torch.no_grad()
            def forward() -> Tensor:
                out = layers()(x, **arguments)
                return (out[0] if isinstance(out, tuple) else out) - x

            return forward

        return {"bf16": call(self.floats), "duqpp": call(self.quantized)}


def _random(shape: torch.Size) -> Tensor:
    """A norm's weight near one, a linear's with outputs as large as its inputs; bfloat16."""
    values = torch.randn(shape)
    scaled = 1 + values / 10 if len(shape) == 1 else values / shape[1] ** 0.5
    return scaled.bfloat16()


def _quantized(
    weights: dict[str, Tensor], empty: nn.Module, groups: Sequence[LinearGroup]
) -> Iterator[tuple[str, Tensor]]:
    """The state of the converted layer: `weights`, the linears' folded and quantized."""
    convert_block(empty, groups, LAYOUT)
    linears = {n for n, module in empty.named_modules() if isinstance(module, MXFP4Linear)}
    for name, values in weights.items():
        linear = name.removesuffix(".weight")
        if linear not in linears:
            yield name, values
            continue
        rotation = ROTATION.to(values.device)
        parts = (BlockRotation(rotation).fold(p).float() for p in values.split(FOLDED))
        weight = quantized_rows(torch.cat(list(parts)))
        yield f"{linear}.weight_packed", weight.codes
        yield f"{linear}.weight_scale", weight.scales
        yield f"{linear}.rotation", rotation


def check(calls: dict[str, Call]) -> None:
    """What is timed is the layer: on random values, MXFP4's errors add up to 0.15 to 0.25."""
    exact, result = calls["bf16"]().float(), calls["duqpp"]().float()
    error = ((result - exact).norm() / exact.norm()).item()
    assert 0.05 < error < 0.5, f"relative error {error}"


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    add_device(options, cpu_cache="cold")
    options.add_argument("--models", nargs="+", choices=MODELS, default=("8b", "70b"))
    options.add_argument("--decode", type=int, nargs="*", default=DECODE_ROWS, help="M of decode")
    options.add_argument(
        "--prefill", type=int, nargs="*", default=PREFILL_ROWS, help="M of prefill"
    )
    options.add_argument("--context", type=int, default=2048, help="tokens in the cache")
    options, _ = start(options, arguments)
    device, on_gpu = options.device, options.device == "cuda"
    backend = select("mxfp4_gemm", torch.device(device)).name
    if on_gpu and backend == "reference":
        skip("no kernel of mxfp4_gemm for this GPU; `duqpp doctor` says why")
    run = Run("decoder_layer", COLUMNS, options, {"context": options.context})
    layers = latest(lambda model: Layers(MODELS[model], device, options.seed))

    def measured(
        *, seconds: float, model: str, phase: str, launch: str, cache: str, M: int
    ) -> dict[str, str | float]:
        cold = cache == "cold"
        layer = layers(model)
        calls = layer.calls(*layer.inputs(phase, M, options.context), cold=cold)
        check(calls)
        clock = clock_for(device, cold=cold, graph=launch == "graph")
        times, ratios = alternate(calls, clock, seconds=seconds)
        return {
            "backend": backend,
            "turns": times["duqpp"].turns,
            **times["duqpp"].microseconds("time"),
            **times["bf16"].microseconds("bf16"),
            "vs_bf16": ratios["duqpp"],
        }

    launches = {"decode": ("eager", "graph") if on_gpu else ("eager",), "prefill": ("eager",)}
    run.measure(
        [
            {"model": model, "phase": phase, "launch": launch, "cache": cache, "M": m}
            for model in options.models
            for phase, rows in (("decode", options.decode), ("prefill", options.prefill))
            for m in rows
            for launch in launches[phase]
            for cache in options.cache
        ],
        measured,
    )
    run.finish()


if __name__ == "__main__":
    main()
