"""Where a quantized model's error comes from: weights or activations, which linears, which blocks.

python benchmarks/error_by_site.py FLOAT QUANTIZED --texts last30.txt builtin --windows 4

Each row is the float model with a part of the quantized one's rounding: of weights, of activations
or of both, in the linears of one group or in one part of the decoder blocks. What is not rounded is
exact: a linear computes (x R)(W R^-T).T, whose factors are rounded one by one. So the row that
rounds everything is the quantized model, and the rows need not add up to it.
"""

from collections.abc import Iterator
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from harness import Case, Table, parser, report, start
from torch import Tensor, nn

from duqpp.calibration.tokens import BUILTIN, read_text, tokenize
from duqpp.evaluate import perplexity, perplexity_and_reference
from duqpp.format import dequantize
from duqpp.integrations.transformers import load_model
from duqpp.models.llama import GROUPS, layer_prefix
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
    names = [name for group in GROUPS for name in group.linears]
    for index, name in product(range(len(model.model.layers)), names):
        path = f"{layer_prefix(index)}.{name}"
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


def cases(blocks: int) -> Iterator[tuple[str, str, range]]:
    """What is rounded, name of the group or "all", and blocks: one tuple for each row."""
    every = range(blocks)
    for name in (ALL, *(group.name for group in GROUPS)):
        yield from ((rounded, name, every) for rounded in ROUNDED)
    parts = min(PARTS, blocks)
    for first, end in pairwise(blocks * part // parts for part in range(parts + 1)):
        yield from ((rounded, ALL, range(first, end)) for rounded in ROUNDED)


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("float", help="the model that was quantized")
    options.add_argument("quantized", help="a folder of duqpp quantize")
    options.add_argument("--texts", nargs="+", default=[BUILTIN], help="as for duqpp eval --text")
    options.add_argument("--windows", type=int, default=4)
    options.add_argument("--seq-len", type=int, default=2048)
    options, _ = start(options, arguments)
    window = {"seq_len": options.seq_len, "windows": options.windows}
    model, tokenizer = load_model(options.float)
    quantized, _ = load_model(options.quantized)
    check_alike(model, quantized)
    members = {group.name: group.linears for group in GROUPS}
    references = {}
    for text in options.texts:
        tokens = tokenize(tokenizer, read_text(text, part="evaluation"))
        references[text] = (tokens, *perplexity_and_reference(model, tokens, **window))
    linears = partly_rounded(model, quantized)
    del quantized
    table = Table(COLUMNS, options)
    for rounded, group, blocks in cases(len(model.model.layers)):
        for (index, name), linear in linears.items():
            chosen = index in blocks and (group == ALL or name in members[group])
            linear.rounded = rounded if chosen else None
        for text, (tokens, exact, reference) in references.items():
            found = perplexity(model, tokens, **window, reference=reference)
            row: Case = {"text": text.rpartition("/")[2], "rounded": rounded, "linears": group}
            row["blocks"] = f"{blocks.start}-{blocks.stop - 1}"
            row["ratio"] = found.perplexity / exact.perplexity
            row |= {"kl": found.divergence.kl, "agreement": found.divergence.agreement}
            table.add(row)
    report(table.rows, options, windows=options.windows, seq_len=options.seq_len)


if __name__ == "__main__":
    main()
