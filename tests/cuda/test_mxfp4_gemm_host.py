"""What the CUDA kernels of mxfp4_gemm can compute, asked on the host: no GPU is needed."""

import itertools

import pytest

from tests.cuda.library import cuda_extension

M_GRID = (
    1,
    2,
    3,
    7,
    8,
    16,
    31,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    300,
    511,
    513,
    1000,
    8192,
)
N_GRID = (8, 16, 24, 64, 72, 120, 128, 136, 248, 264, 1024, 4096, 6144, 28672)
K_GRID = (32, 64, 96, 128, 160, 224, 256, 288, 1024, 2048, 4096, 4128, 14336, 28672)
SHAPES = tuple(itertools.product(M_GRID, N_GRID, K_GRID))

KERNELS = (
    "sm100_swapped_128x64",
    "sm100_swapped_128x64_streamk",
    "sm100_256x128",
    "sm100_256x192",
    "sm100_256x256",
    "sm120_128x128",
    "sm80_16x8",
    "sm80_32x8",
    "sm80_64x8",
    "sm80_16x16",
    "sm80_32x16",
    "sm80_64x16",
    "sm80_32x32",
)
SM_COUNTS = {
    80: (46, 108),
    86: (84,),
    89: (128,),
    90: (132,),
    100: (1, 20, 74, 132, 148, 160),
    103: (148,),
    120: (48, 170),
    121: (48,),
}


def built_plan(kernel: str):
    """The extension and a plan for a kernel; skips where the build leaves the kernel out."""
    module = cuda_extension()
    plan = module.GemmPlan(kernel, splits=2 if kernel.endswith("streamk") else 1, sm_count=148)
    if not module.has_mxfp4_gemm_kernel(plan):
        pytest.skip(f"the build leaves out {kernel}")
    return module, plan


def test_every_kernel_of_the_table_is_tested():
    assert tuple(cuda_extension().gemm_kernels()) == KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_can_implement_every_legal_shape(kernel):
    module, plan = built_plan(kernel)
    refused = [s for s in SHAPES if not module.can_implement_mxfp4_gemm(plan, *s)]
    assert not refused, f"{len(refused)} of {len(SHAPES)} refused, first {refused[0]}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_cutlass_refuses_what_tma_cannot_address(kernel):
    # Ours are the first to refuse; this shows that they are not stricter than need be.
    module, plan = built_plan(kernel)
    for M, N, K in [
        (16, 4096, 4112),
        (16, 4096, 16),
        (16, 4100, 4096),
        (16, 4, 4096),
        (16, 7, 4096),
    ]:
        assert not module.can_implement_mxfp4_gemm(plan, M, N, K), (M, N, K)


@pytest.mark.parametrize("arch", SM_COUNTS)
def test_the_kernel_of_every_legal_shape_can_implement_it_in_the_workspace_of_the_table(arch):
    family = "sm80" if arch < 100 else "sm100" if arch < 120 else "sm120"
    module, _ = built_plan(next(kernel for kernel in KERNELS if kernel.startswith(family)))
    chosen = set()
    for sm_count, (M, N, K) in itertools.product(SM_COUNTS[arch], SHAPES):
        plan = module.select_gemm(M, N, K, arch=arch, sm_count=sm_count)
        where = f"{plan} for {(M, N, K)}"
        assert module.can_implement_mxfp4_gemm(plan, M, N, K), where
        expected = module.mxfp4_gemm_workspace_size(plan, M, N, K)
        assert module.gemm_workspace_size(plan, M, N) == expected, where
        chosen.add(plan.kernel)
    assert chosen == {kernel for kernel in KERNELS if kernel.startswith(family)}


def test_workspace_of_explicit_splits_is_the_formula():
    module, _ = built_plan("sm100_swapped_128x64_streamk")
    for splits, (M, N, K) in itertools.product((2, 3, 4), SHAPES):
        if splits > -(-K // 256):
            continue  # CUTLASS lowers the splits; the table never asks for this
        plan = module.GemmPlan("sm100_swapped_128x64_streamk", splits=splits, sm_count=148)
        expected = module.mxfp4_gemm_workspace_size(plan, M, N, K)
        assert module.gemm_workspace_size(plan, M, N) == expected, (splits, M, N, K)


@pytest.mark.parametrize("kernel", KERNELS)
def test_shared_memory_fits_the_architecture(kernel):
    module, plan = built_plan(kernel)
    # Of a CTA for sm_80 to sm_90 with all of its warps: it has fewer where they do not fit.
    most = 99 * 1024 if kernel.startswith("sm120") else 227 * 1024
    assert 0 < module.mxfp4_gemm_shared_memory(plan) <= most
