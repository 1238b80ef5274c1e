"""Every kernel of rotate_quantize over awkward shapes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m tests.ops.cuda_workload

Also mxfp4_linear, where the GPU has a GEMM, and what expands operands for products of many rows,
whose GEMM is torch's and not run. Results are not looked at here.
"""

from itertools import product

import torch

from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.format.scale_layout import swizzle_scales
from duqpp.format.weight_fragment import to_fragments
from duqpp.ops import (
    mxfp4_linear,
    prepare_weight,
    rmsnorm_rotate_quantize,
    rotate_quantize,
    silu_mul_rotate_quantize,
)
from duqpp.ops.cover import cover
from duqpp.ops.dispatch import available
from duqpp.ops.kernels import machines_here
from duqpp.ops.large_gemm import Route, chunks
from duqpp.rotation.basis import random_orthogonal
from tests import inputs

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, K, N = (1, 15, 33, 129), (32, 160, 4096), 136


def quantize() -> None:
    backend = available("rotate_quantize", GPU)[0]
    for rows, k, dtype, rule in product(ROWS, K, (torch.bfloat16, torch.float16), ScaleRule):
        x, up = (inputs.outliers(rows, k, seed).to(GPU, dtype) for seed in (1, 2))
        matrices = random_orthogonal(32, inputs.generator(3), count=k // 32).bfloat16().to(GPU)
        options = {"rule": rule, "backend": backend}
        for rotation in (None, matrices[0].contiguous(), matrices):
            rotate_quantize(x, rotation, **options)
            silu_mul_rotate_quantize(x, up, rotation, **options)
            rmsnorm_rotate_quantize(x, up[0], rotation, epsilon=1e-5, **options)


def multiply() -> None:
    backend = available("mxfp4_gemm", GPU)[0]
    if backend == "reference":
        return
    shapes = [(rows, N, k) for rows, k in product(ROWS, K)]
    machine = machines_here()[-1]
    for streamk in (False, True) if machine.capability else ():
        # Every kernel, with one wave of tiles: under the sanitizer more would take minutes.
        cells = cover(machine, streamk=streamk).items()
        shapes += [(shape.M, shape.N, shape.K) for cell, shape in cells if cell.waves == 1]
    for rows, n, k in shapes:
        codes, scales = (part.to(GPU) for part in inputs.mxfp4_operand(n, k, seed=4))
        weight = prepare_weight(MXFP4Tensor(codes, scales), backend=backend)
        x = inputs.outliers(rows, k, seed=5).to(GPU, torch.bfloat16)
        bias = torch.ones(n, device=GPU)
        mxfp4_linear(x, None, weight, bias, rule=ScaleRule.EVEN, backend=backend)


def expand() -> None:
    """Operands on every route: rows, a weight whose last tile is of 8 rows, and parts of it."""
    op = torch.ops.duqpp_native
    for k, dtype in product((*K, 544), {route.dtype for route in Route}):
        for rows in ROWS:
            codes, scales = inputs.mxfp4_operand(rows, k, seed=6, spread=60)
            op.expand_activation(codes.to(GPU), swizzle_scales(scales).to(GPU), dtype)
        for n in (8, 16, N, 1032):
            weight = to_fragments(MXFP4Tensor(*inputs.mxfp4_operand(n, k, seed=7, spread=60)))
            codes, scales = weight.codes.to(GPU), weight.scales.to(GPU)
            for part in chunks(n, 1, 1):  # of 256 rows each
                for rows in {part.stop - part.start, -(-part.stop // 16) * 16 - part.start}:
                    op.expand_weight(codes, scales, part.start, rows, dtype)


if __name__ == "__main__":
    quantize()
    multiply()
    if available("mxfp4_gemm", GPU)[0] == "cuda-sm80":  # other builds and GPUs lack these kernels
        expand()
    torch.cuda.synchronize()
    print("done")
