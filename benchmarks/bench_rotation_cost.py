"""The online cost of one aligned rotation (DuQuant++) and of DuQuant's two and its permutation.

Fused: what duqpp runs, where the last rotation is one kernel with the quantization. Unfused: each
step a torch operation of its own on bfloat16, as research code runs them. `cost` is the time beyond
quantizing without any rotation, and `half` what share of DuQuant's cost DuQuant++ has.
Source of the claim, half the online cost: arXiv 2604.17789.
"""

import torch
from harness import Table, add_shapes, parser, report, start
from timing import alternate
from torch import Tensor

from duqpp.format import ScaleRule
from duqpp.ops import rotate_quantize
from duqpp.ops.reference import rotate_blocks
from duqpp.rotation.basis import random_orthogonal

COLUMNS = {
    "variant": "s",
    "M": "d",
    "K": "d",
    "plain_us": ".0f",
    "duquant_us": ".0f",
    "duqpp_us": ".0f",
    "half": ".2f",
}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    add_shapes(options)
    options, generator = start(options, arguments)
    first, second = random_orthogonal(32, generator, count=2).bfloat16().contiguous()
    rule, table = ScaleRule.EVEN, Table(COLUMNS, options)

    def quantize(x: Tensor) -> object:
        return rotate_quantize(x, None, rule=rule)

    for k in options.columns:
        permutation = torch.randperm(k, generator=generator)
        for m in options.rows:
            x = torch.randn(m, k, generator=generator).bfloat16()

            def fused_duquant(x=x, permutation=permutation):
                permuted = rotate_blocks(x, first).index_select(-1, permutation)
                return rotate_quantize(permuted, second, rule=rule)

            def unfused_duquant(x=x, permutation=permutation):
                permuted = rotate_blocks(x, first).index_select(-1, permutation)
                return quantize(rotate_blocks(permuted, second))

            variants = {
                "fused": (fused_duquant, lambda x=x: rotate_quantize(x, second, rule=rule)),
                "unfused": (unfused_duquant, lambda x=x: quantize(rotate_blocks(x, second))),
            }
            for variant, (duquant, duqpp) in variants.items():
                candidates = {"plain": lambda x=x: quantize(x), "duquant": duquant, "duqpp": duqpp}
                times, _ = alternate(candidates, seconds=options.seconds)
                plain, two, one = (times[name].median for name in candidates)
                table.add(
                    {
                        "variant": variant,
                        "M": m,
                        "K": k,
                        "plain_us": plain * 1e6,
                        "duquant_us": two * 1e6,
                        "duqpp_us": one * 1e6,
                        "half": (one - plain) / (two - plain),
                    }
                )
    report(table.rows, options)


if __name__ == "__main__":
    main()
