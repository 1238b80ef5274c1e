"""Which kernel would run an op, and why: on this CPU, and on GPUs that are not here."""

from types import SimpleNamespace

import pytest
import torch

from duqpp.ops import dispatch, kernels
from duqpp.ops.crossover import crossover
from duqpp.ops.kernels import Machine
from tests.cuda.library import cuda_extension, extension, full_extension

SHAPE = (16, 4096, 4096)


@pytest.fixture(autouse=True)
def no_backend_is_asked_for(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def chosen(op: str, machine: Machine, shape=SHAPE) -> tuple[str, kernels.Kernel]:
    backend = kernels.select(op, machine)
    return backend.name, kernels.kernel(op, *shape, machine, backend)


@pytest.mark.parametrize("op", kernels.OPS)
def test_the_backend_on_a_cpu_is_the_one_that_runs(op):
    cpu = kernels.machines_here()[0]
    backend = kernels.select(op, cpu)
    base = "mxfp4_gemm" if op == "mxfp4_gemm" else "rotate_quantize"
    assert backend is dispatch.select(base, torch.device("cpu"))
    for other in dispatch.BACKENDS:
        assert kernels.why_not(other, op, cpu)


@pytest.fixture
def cpu_library(monkeypatch):
    """Make the compiled library speak of another CPU: ``cpu_library(chosen, runs)``."""
    features = [("portable", "nothing"), ("avx2", "AVX2"), ("avx-vnni", "VNNI"), ("avx512", "ZMM")]

    def install(isa: str, runs: list[str]) -> None:
        library = SimpleNamespace(
            cpu_isa_features=lambda: features,
            cpu_isas=lambda: runs,
            cpu_isa=lambda: isa,
            cpu_rotate_quantize_isa=lambda: "avx2" if isa == "avx-vnni" else isa,
            cpu_gemm_in_place=lambda m: m <= 4,
        )
        monkeypatch.setattr(kernels, "compiled_library", lambda: library)

    return install


def test_the_instruction_set_and_what_keeps_the_better_ones_away(cpu_library):
    cpu_library("avx512", ["portable", "avx2", "avx512"])
    _, kernel = chosen("rotate_quantize", Machine())
    assert (kernel.name, kernel.why) == ("avx512 code", "the best that there is")
    cpu_library("avx-vnni", ["portable", "avx2", "avx-vnni"])
    _, kernel = chosen("silu_mul_rotate_quantize", Machine())
    assert kernel.name == "avx2 code"
    lacks = "not avx512: this CPU or its system lacks some of ZMM"
    assert kernel.why == f"{lacks}; avx-vnni brings nothing to it"
    cpu_library("portable", ["portable", "avx2", "avx512"])
    _, kernel = chosen("mxfp4_gemm", Machine())
    why = "not avx2: DUQPP_CPU_ISA=portable; not avx-vnni: this CPU or its system lacks some of"
    assert kernel.name == "portable code, weights expanded"
    assert kernel.why.startswith(f"{why} VNNI; not avx512: DUQPP_CPU_ISA=portable")
    _, kernel = chosen("mxfp4_gemm", Machine(), (4, 8, 32))
    assert kernel.name == "portable code, weights as they lie"


GPUS = {
    (8, 0): ("cuda-sm80", "80"),
    (8, 9): ("cuda-sm80", "80"),
    (9, 0): ("cuda-sm80", "90a"),
    (10, 0): ("cuda-sm100", "100f"),
    (10, 3): ("cuda-sm100", "100f"),
    (12, 0): ("cuda-sm120", "120f"),
    (12, 1): ("cuda-sm120", "120f"),
    (7, 5): ("reference", None),
}


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("op", kernels.OPS)
def test_gpus_that_are_not_here(capability, op):
    full_extension()
    backend, code = GPUS[capability]
    name, kernel = chosen(op, Machine(capability, 148))
    assert name == backend
    if code is None:
        assert kernel.name == "torch operations"
    elif op == "mxfp4_gemm":
        assert kernel.name.startswith("sm80_" if backend == "cuda-sm80" else f"sm{code[:-1]}_")
    else:
        hardware = backend != "cuda-sm80"
        assert kernel.name.startswith(f"sm_{code} code")
        assert kernel.why == ("hardware E2M1" if hardware else "E2M1 by integer arithmetic")


def test_older_gpus_are_told_how_their_gemm_is_launched():
    full_extension()
    hopper = Machine((9, 0), 132)
    name, kernel = chosen("mxfp4_gemm", hopper, (16, 4096, 14336))
    assert name == "cuda-sm80"
    launch = "128 CTAs of 14 warps, K in 28 segments, 2 rounds"
    assert kernel.name == f"sm80_32x16 of N x M, {launch}"
    least = crossover((9, 0)).at(4096, 14336)
    assert kernel.why == (
        f"32 rows of W for a CTA: its SMs end first; from {least} on, torch multiplies"
    )


@pytest.mark.parametrize("k", [32, 4096, 14336])
def test_one_row_is_spread_over_the_gpu(k):
    """A CTA for each column of scale tiles, whatever comes before the rotation."""
    for op in kernels.OPS[:3]:
        launch = extension().rotate_quantize_launch(op, 1, k, arch=100, sm_count=148)
        assert (launch["ctas"], launch["threads"]) == (-(-k // 128), 128)


def test_many_rows_of_an_rmsnorm_fill_ctas_of_their_own():
    """A CTA sums the squares of whole rows: it has more warps, and there are fewer CTAs."""
    plain, norm = (
        extension().rotate_quantize_launch(op, 8192, 4096, arch=90, sm_count=132)
        for op in ("rotate_quantize", "rmsnorm_rotate_quantize")
    )
    assert norm["threads"] > plain["threads"] == 128
    assert norm["ctas"] < plain["ctas"]


def test_another_op_is_no_form_of_rotate_quantize():
    with pytest.raises(ValueError, match="'mxfp4_gemm' is no form of rotate_quantize"):
        extension().rotate_quantize_launch("mxfp4_gemm", 1, 32, arch=90, sm_count=132)


def test_shapes_that_are_refused():
    assert chosen("mxfp4_gemm", Machine(), (1, 8, 48))[1] == kernels.Kernel(
        None, "K must be a multiple of 32, got 48"
    )
    full_extension()
    _, kernel = chosen("mxfp4_gemm", Machine((10, 0), 148), (1, 4100, 32))
    assert kernel.name is None and "N must be a multiple of 8, got 4100" in kernel.why


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0)])
def test_many_rows_without_block_scaled_tensor_cores(capability, monkeypatch):
    """Operands are expanded, from as many rows on as the table says: more for a small weight."""
    cuda_extension()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    backend = next(b for b in dispatch.BACKENDS if b.name == "cuda-sm80")
    rows = {n: crossover(capability).at(n, 4096) for n in (1024, 28672)}
    assert 16 < rows[28672] <= rows[1024]
    for n, least in rows.items():
        machine = Machine(capability, 108)
        kernel = kernels.kernel("mxfp4_gemm", least, n, 4096, machine, backend)
        wide = "float8_e4m3fn" if capability in ((8, 9), (9, 0)) else "bfloat16"
        way = {(8, 9): "torch._scaled_mm, CUTLASS", (9, 0): "torch._scaled_mm, cuBLASLt"}
        assert kernel.name.startswith(f"{way.get(capability, 'torch.mm')}, operands expanded")
        assert f"to {wide}, weight in" in kernel.name
        assert int(kernel.name.split()[-4]) <= 64 << 20
        source = crossover(capability).source
        assert kernel.why == f"from {least} rows of x on, by {source}"
        few = kernels.kernel("mxfp4_gemm", least - 1, n, 4096, machine, backend)
        assert few.name.startswith("sm80_32x32")
