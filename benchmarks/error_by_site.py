"""Where a quantized model's error comes from: weights or activations, which linears, which blocks.

python benchmarks/error_by_site.py FLOAT QUANTIZED --texts last30.txt builtin --windows 4 --out F

Each row is the float model with a part of the quantized one's rounding: of weights, of activations
or of both, in the linears of one group or in one part of the decoder blocks. What is not rounded is
exact: a linear computes (x R)(W R^-T).T, whose factors are rounded one by one. So the row that
rounds everything is the quantized model, and the rows need not add up to it.
"""

import hashlib
from collections.abc import Iterator
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from harness import Case, Run, add_resume, parser, start
from torch import Tensor, nn

from duqpp.calibration.tokens import BUILTIN, read_text, tokenize
from duqpp.evaluation.perplexity import perplexity, perplexity_and_reference
from duqpp.format import dequantize
from duqpp.integrations.transformers import load_model
from duqpp.models.family import Family, family_of
from duqpp.nn import MXFP4Linear
from duqpp.ops import quantize
from duqpp.rotation import BlockRotation, InputTransform

COLUMNS = {"text": "s", "rounded": "s", "linears": "s", "blocks": "s"}
COLUMNS |= {"ratio": ".3f", "kl": ".4f", "agreement": ".4f"}
ALL = "all"
ROUNDED = ("both", "weights", "activations")
PARTS = 3  # of the decoder blocks, in their order


class PartlyRounded(nn.Module):
    """A float linear in the basis of its quantized one, with `rounded` of its factors rounded.

    Args: linear: the float one. quantized: the same linear in MXFP4.
    """

    def __init__(self, linear: nn.Linear, quantized: MXFP4Linear) -> None:
        super().__init__()
        rotations = [
            None if matrix is None else BlockRotation(matrix.data)
            for matrix in (quantized.rotation, quantized.pre_rotation)
        ]
        self._transform = InputTransform(*rotations, quantized.permutation)
        self._rule = quantized.rule
        self._exact = self._transform.fold(linear.weight.data).float()
        self._codes = dequantize(quantized.weight)
        self._bias = None if linear.bias is None else linear.bias.data.float()
        self.rounded: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in the dtype of x; float32 inside."""
        y = self._transform.apply(x.float())
        if self.rounded in ("both", "activations"):
            y = dequantize(quantize(y, rule=self._rule))
        weight = self._codes if self.rounded in ("both", "weights") else self._exact
        return F.linear(y, weight, self._bias).to(x.dtype)


def partly_rounded(model: nn.Module, quantized: nn.Module) -> dict[tuple[int, str], PartlyRounded]:
    """Put a PartlyRounded into the float model for each quantized linear.

    Returns: them by block and name in the block.
    """
    found = {}
    family = family_of(model.config)
    for index in range(model.config.num_hidden_layers):
        for name in (name for group in family.groups(index) for name in group.linears):
            path = f"{family.block_name(index)}.{name}"
            linear = quantized.get_submodule(path)
            if isinstance(linear, MXFP4Linear):
                found[index, name] = PartlyRounded(model.get_submodule(path), linear)
                model.set_submodule(path, found[index, name])
    return found


def check_alike(model: nn.Module, quantized: nn.Module) -> None:
    """Raise SystemExit when the models differ outside of their quantized linears.

    Smoothed ones do, in their norms.
    """
    floats = dict(model.named_parameters())
    for name, parameter in quantized.named_parameters():
        if isinstance(quantized.get_submodule(name.rpartition(".")[0]), MXFP4Linear):
            continue
        if name not in floats or not torch.equal(parameter, floats[name]):
            raise SystemExit(f"error: {name} differs: the model is smoothed, or of another one")


def fingerprint(model: nn.Module) -> str:
    """Of all parameters and buffers: two models that differ in one byte have another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def cases(family: Family) -> Iterator[Case]:
    """What is rounded, in the linears of which group or "all", and in which blocks, "0-29"."""
    blocks = family.config.num_hidden_layers
    every = range(blocks)
    parts = min(PARTS, blocks)
    bounds = [blocks * part // parts for part in range(parts + 1)]
    chosen = [(name, every) for name in (ALL, *family.kinds())]
    chosen += [(ALL, range(first, end)) for first, end in pairwise(bounds)]
    for (name, part), rounded in product(chosen, ROUNDED):
        yield {"rounded": rounded, "linears": name, "blocks": f"{part.start}-{part.stop - 1}"}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("float", help="the model that was quantized")
    options.add_argument("quantized", help="a folder of duqpp quantize")
    options.add_argument("--texts", nargs="+", default=[BUILTIN], help="as for duqpp eval --text")
    options.add_argument("--windows", type=int, default=4)
    options.add_argument("--seq-len", type=int, default=2048)
    add_resume(options)
    options, _ = start(options, arguments)
    window = {"seq_len": options.seq_len, "windows": options.windows}
    model, tokenizer = load_model(options.float)
    quantized, _ = load_model(options.quantized)
    check_alike(model, quantized)
    references = {}
    for text in options.texts:
        name = text.rpartition("/")[2]
        if name in references:
            raise SystemExit(f"error: two texts have the name {name}")
        tokens = tokenize(tokenizer, read_text(text, part="evaluation"))
        references[name] = (tokens, *perplexity_and_reference(model, tokens, **window))
    facts = {"quantized": quantized.config.quantization_config.layout.provenance}
    common = window | {"quantized": fingerprint(quantized)}
    places = partly_rounded(model, quantized)
    del quantized
    family = family_of(model.config)

    def measured(text: str, rounded: str, linears: str, blocks: str, **_: object) -> Case:
        first, last = (int(index) for index in blocks.split("-"))
        for (index, name), linear in places.items():
            group = next(g.name for g in family.groups(index) if name in g.linears)
            chosen = first <= index <= last and linears in (ALL, group)
            linear.rounded = rounded if chosen else None
        tokens, exact, reference = references[text]
        found = perplexity(model, tokens, **window, reference=reference)
        return {
            "ratio": found.perplexity / exact.perplexity,
            "kl": found.divergence.kl,
            "agreement": found.divergence.agreement,
        }

    run = Run("error_by_site", COLUMNS, options, facts)
    each = cases(family)
    run.measure(({"text": t, **case, **common} for case, t in product(each, references)), measured)
    run.finish()


if __name__ == "__main__":
    main()
