"""The compiled library: what is in it, and the CPU backend on each instruction set."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import duqpp._C as _C
from duqpp import ops
from duqpp.format import MXFP4Tensor, ScaleRule, quantize
from duqpp.format.scale_layout import unswizzle_scales
from duqpp.ops import (
    dispatch,
    kernels,
    mxfp4_gemm,
    native,
    prepare_weight,
    restore_weight,
    rotate_quantize,
)
from duqpp.ops import quantize as fast_quantize
from duqpp.ops.kernels import Machine
from duqpp.ops.native import CUDA_BACKENDS, CpuBackend
from duqpp.ops.reference import ReferenceBackend
from duqpp.rotation.basis import random_orthogonal
from tests import inputs, oracle

ROOT = Path(__file__).parents[2]
LIBRARY = Path(_C.__file__)
CPU = torch.device("cpu")


def tool(name: str, *arguments: str) -> str:
    try:
        return subprocess.run(
            [name, *arguments], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    except FileNotFoundError:
        pytest.skip(f"{name} is not installed")


def test_the_library_needs_nothing_of_cuda():
    """It loads where there is no CUDA: nothing undefined is CUDA's, no CUDA library is named."""
    undefined = tool("nm", "-D", "--undefined-only", str(LIBRARY)).split()
    foreign = [name for name in undefined if name.startswith(("cuda", "cu", "__cuda"))]
    assert not foreign
    needed = [line for line in tool("readelf", "-d", str(LIBRARY)).splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "cuda" in line or "nvrtc" in line]


def test_the_library_names_no_folder_of_the_machine_that_built_it():
    data = LIBRARY.read_bytes()
    for folder in {str(ROOT), sys.prefix, str(Path(torch.__file__).parent), "site-packages"}:
        assert folder.encode() not in data, folder
    paths = {path.decode() for path in re.findall(rb"(?:/[\w.+-]+){3,}", data)}
    asked_at_run_time = ("/proc/", "/sys/")
    assert not [p for p in paths if Path(p).exists() and not p.startswith(asked_at_run_time)]


def test_torch_symbols_are_those_of_the_stable_abi():
    """Its undefined symbols of torch are C functions of the shim: no C++ of one torch version."""
    lines = tool("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines()
    names = [line.split()[-1].partition("@")[0] for line in lines]
    assert any(name.startswith("aoti_torch_") for name in names), "the shim itself"
    mangled = [name for name in names if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))]
    assert not mangled


def test_no_kernel_for_one_instruction_set_can_serve_another():
    """Objects under isa/ define no weak symbol: of equal weak functions the linker keeps one, which
    might be the one that this CPU cannot run."""
    objects = sorted(ROOT.glob("build/cmake-*/**/cpu/isa/*.o"))
    if not objects:
        pytest.skip("the build folder is not here: duqpp was not built in place")
    for path in objects:
        symbols = [line.split() for line in tool("nm", "--defined-only", str(path)).splitlines()]
        weak = [fields[-1] for fields in symbols if fields[-2] in "WVwvu"]
        assert not weak, f"{path.name}: {weak}"


def test_build_info():
    info = _C.build_info()
    assert set(info) >= {"compiler", "cuda_architectures"}
    assert _C.cpu_isas()[0] == "portable"
    assert _C.cpu_isa() in _C.cpu_isas()


def test_the_cpu_backend_is_the_default_on_a_cpu(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert dispatch.select("rotate_quantize", CPU).name == "cpu"
    assert dispatch.select("mxfp4_gemm", CPU).name == "cpu"
    reason = CpuBackend().unavailable_reason("mxfp4_gemm", torch.device("meta"))
    assert reason == "needs a tensor on the CPU, not on meta"


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda backend: backend.name)
def test_cuda_backends_say_what_they_need(backend, monkeypatch):
    reason = backend.unavailable_reason("mxfp4_gemm", CPU)
    assert reason == "needs a tensor on a CUDA device, not on cpu"
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_architectures": ""})
    assert "this build has no kernels" in backend.unavailable_reason("rotate_quantize", device)
    everything = {"cuda_architectures": "80,90a,100f,120f"}
    monkeypatch.setattr(_C, "build_info", lambda: everything)
    reason = backend.unavailable_reason("rotate_quantize", device)
    assert reason.startswith("needs compute capability") and reason.endswith("7.5")


def test_code_for_one_capability_is_not_run_on_another(monkeypatch):
    sm100, sm120, sm80 = CUDA_BACKENDS
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_architectures": "80,100a,120a"})
    for backend, able, unable in (
        (sm100, (10, 0), (10, 3)),
        (sm120, (12, 0), (12, 1)),
        (sm80, (8, 9), (9, 0)),
    ):
        assert backend.unavailable_on(able) is None
        reason = backend.unavailable_on(unable)
        major, minor = unable
        assert reason == f"this build has no kernels for compute capability {major}.{minor}"


def test_each_gpu_has_one_cuda_backend(monkeypatch):
    expected = {(8, 0): "cuda-sm80", (9, 0): "cuda-sm80", (10, 0): "cuda-sm100"}
    expected |= {(10, 3): "cuda-sm100", (12, 0): "cuda-sm120", (12, 1): "cuda-sm120"}
    everything = {"cuda_architectures": "80,90a,100f,120f"}
    monkeypatch.setattr(_C, "build_info", lambda: everything)
    monkeypatch.setattr(_C, "cuda_versions", lambda: (13000, 13000), raising=False)
    for capability, name in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        for op in ("rotate_quantize", "mxfp4_gemm"):
            able = [
                backend.name
                for backend in CUDA_BACKENDS
                if backend.unavailable_reason(op, torch.device("cuda")) is None
            ]
            assert able == [name], (capability, op)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, and versions of CUDA: ``hopper(runtime, driver)``."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_architectures": "80,90a"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def install(*versions: int) -> None:
        monkeypatch.setattr(_C, "cuda_versions", lambda: versions, raising=False)

    return install


@pytest.mark.parametrize("driver", [12080, 12090, 0])
def test_a_driver_that_is_too_old_for_the_library_is_named_before_a_launch(driver, hopper):
    """torch for CUDA 12.8 sees the GPU all the same; a static runtime of CUDA 13 would throw."""
    hopper(13000, driver)
    backend = CUDA_BACKENDS[-1]
    reason = (
        "this build's runtime of CUDA 13.0 needs a driver for CUDA 13, this machine's is for "
        f"{driver // 1000}.{driver % 1000 // 10}; update the driver, or build duqpp with that "
        "CUDA's nvcc"
    )
    for op in ("rotate_quantize", "mxfp4_gemm"):
        assert backend.unavailable_reason(op, torch.device("cuda")) == reason
    machine = kernels.machines_here()[-1]
    assert kernels.unavailable(backend, "mxfp4_gemm", machine) == reason, "doctor says it"
    elsewhere = Machine(machine.capability, machine.sm_count)
    assert kernels.unavailable(backend, "mxfp4_gemm", elsewhere) is None


@pytest.mark.parametrize("versions", [(13000, 13000), (13020, 13000), (12090, 13010)])
def test_a_driver_serves_runtimes_of_its_major_version_and_older_ones(versions, hopper):
    hopper(*versions)
    assert CUDA_BACKENDS[-1].unavailable_reason("mxfp4_gemm", torch.device("cuda")) is None


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda backend: backend.name)
def test_cuda_weights_are_in_their_layout_and_can_be_restored(backend):
    codes = torch.randint(0, 256, (136, 48), generator=inputs.generator(1)).byte()
    scales = torch.randint(0, 255, (136, 3), generator=inputs.generator(2)).byte()
    prepared = backend.prepare_weight(MXFP4Tensor(codes, scales))
    assert backend.scales_shape(136, 96) == (2 * 512,)
    assert prepared.scales.shape == backend.weight_scales_shape(136, 96)
    if backend.name != "cuda-sm80":  # tests/format/test_weight_fragment.py has its layout
        oracle.assert_same(prepared.scales, torch.from_numpy(oracle.swizzle(scales)), "scales")
    restored = backend.restore_weight(prepared)
    oracle.assert_same(restored.scales, scales, "restored scales")
    oracle.assert_same(restored.codes, codes, "codes")


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=lambda backend: backend.name)
def test_float32_on_cuda_is_the_reference_in_its_layout(backend):
    """The kernels take 16 bits only; this part of the backend runs on any device."""
    x, rotation = inputs.outliers(33, 96, seed=1), random_orthogonal(32, inputs.generator(1))
    rotation, weight = rotation.bfloat16(), MXFP4Tensor(*inputs.mxfp4_operand(40, 96, seed=2))
    reference, even = ReferenceBackend(), ScaleRule.EVEN
    for form, arguments in (
        ("rotate_quantize", (x, rotation, even)),
        ("rmsnorm_rotate_quantize", (x, x[0], 1e-5, rotation, even)),
        ("silu_mul_rotate_quantize", (x, x.flip(0), rotation, even)),
    ):
        quantized = getattr(backend, form)(*arguments)
        expected = getattr(reference, form)(*arguments)
        assert quantized.scales.shape == backend.scales_shape(33, 96)
        scales = unswizzle_scales(quantized.scales, 33, 3)
        oracle.assert_same(quantized.codes, expected.codes, f"codes, {form}")
        oracle.assert_same(scales, expected.scales, f"scales, {form}")
    prepared, bias = backend.prepare_weight(weight), torch.ones(40)
    y = backend.mxfp4_gemm(backend.rotate_quantize(x, rotation, even), prepared, bias, x.dtype)
    expected = reference.mxfp4_linear(x, rotation, even, weight, bias)
    oracle.assert_same(y, expected, "mxfp4_gemm")
    y = backend.mxfp4_linear(x, rotation, even, prepared, bias)
    oracle.assert_same(y, expected, "mxfp4_linear")


def test_float32_on_cuda_kernels_warns_once(caplog):
    native._warn_of_float32.cache_clear()
    backend = native.CudaBackend("cuda-sm100", {(10, 0): ("100f",)})
    x = inputs.gaussian(2, 64, seed=0)
    for _ in range(2):
        backend.rotate_quantize(x, None, ScaleRule.EVEN)
    assert len(caplog.messages) == 1
    assert "on float32 activations by its reference" in caplog.messages[0]
    assert "the kernels of cuda-sm100 take bfloat16 and float16" in caplog.messages[0]


# The same problems in a process for each instruction set; the results are compared as bytes.

PROBLEMS = """
import sys, torch
from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.ops import *
from tests import inputs
from duqpp.rotation.basis import random_orthogonal
results = []
for rows, k in ((1, 32), (7, 96), (16, 160), (33, 4096)):
    x = inputs.outliers(rows, k, seed=rows)
    matrices = random_orthogonal(32, inputs.generator(k), count=k // 32).bfloat16()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rotation in (None, matrices[0].contiguous(), matrices.contiguous()):
            for rule in ScaleRule:
                results += [rotate_quantize(x.to(dtype), rotation, rule=rule)]
            y = x.flip(0).to(dtype)
            results += [silu_mul_rotate_quantize(y, x.to(dtype), rotation, rule=ScaleRule.EVEN)]
            results += [rmsnorm_rotate_quantize(
                y, y[0], rotation, epsilon=1e-5, rule=ScaleRule.EVEN)]
    a = results[-1]
    for n in (1, 8, 40, 129):
        w = MXFP4Tensor(*inputs.mxfp4_operand(n, k, seed=n, spread=20))
        p = prepare_weight(w)
        for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
            results += [(p.codes, mxfp4_gemm(a, p, torch.ones(n), out_dtype=out_dtype))]
pairs = [(r.codes, r.scales) if isinstance(r, MXFP4Tensor) else r for r in results]
torch.save(pairs, sys.argv[1])
"""


def results_on(isa: str, folder: Path) -> list:
    file = folder / f"{isa}.pt"
    environment = os.environ | {
        "DUQPP_CPU_ISA": isa,
        "DUQPP_BACKEND": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(
        [sys.executable, "-c", PROBLEMS, str(file)], env=environment, check=True, timeout=250
    )
    return torch.load(file)


def test_every_instruction_set_gives_the_same_bytes(tmp_path):
    expected = results_on("portable", tmp_path)
    assert len(expected) > 200
    for isa in _C.cpu_isas()[1:]:
        for index, (pair, other) in enumerate(
            zip(expected, results_on(isa, tmp_path), strict=True)
        ):
            for one, two in zip(pair, other, strict=True):
                oracle.assert_same(two, one, f"{isa}, result {index}")


def test_an_unknown_instruction_set_is_an_error():
    command = "import torch, duqpp._C as c; print(c.cpu_isa())"
    environment = os.environ | {"DUQPP_CPU_ISA": "mmx"}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "DUQPP_CPU_ISA" in done.stderr
    assert "mmx" in done.stderr


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 300])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_byte(rows, threads):
    x = inputs.outliers(rows, 8192, seed=rows)
    rotation = random_orthogonal(32, inputs.generator(1), count=256).bfloat16()
    w = prepare_weight(MXFP4Tensor(*inputs.mxfp4_operand(72, 8192, seed=2, spread=9)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        a = rotate_quantize(x, rotation, rule=ScaleRule.EVEN, backend="cpu")
        y = mxfp4_gemm(a, w, out_dtype=torch.float32, backend="cpu")
        torch.set_num_threads(1)
        b = rotate_quantize(x[-1:], rotation, rule=ScaleRule.EVEN, backend="cpu")
        z = mxfp4_gemm(b, w, out_dtype=torch.float32, backend="cpu")
    finally:
        torch.set_num_threads(before)
    oracle.assert_same(b.codes[0], a.codes[-1], "codes")
    oracle.assert_same(z[0], y[-1], "a row, alone and in its batch")


@pytest.mark.parametrize("rule", list(ScaleRule))
def test_quantize_is_that_of_the_format(rule):
    x = inputs.grid_and_ties(64, 96, seed=1).view(4, 16, 96)
    for values in (x, inputs.mse_ties(64, seed=2), inputs.subnormals(16, 64, seed=3)):
        expected, actual = quantize(values, rule=rule), fast_quantize(values, rule=rule)
        oracle.assert_same(actual.scales, expected.scales, "scales")
        oracle.assert_same(actual.codes, expected.codes, "codes")


@pytest.mark.parametrize("rule", list(ScaleRule))
def test_quantize_on_a_gpu_is_that_of_the_format(rule, monkeypatch):
    """By the kernel of GPTQ without a factor, here the CPU's; its bytes are the same everywhere."""
    cpu = dispatch.select("rotate_quantize", CPU, "cpu")
    monkeypatch.setattr(ops, "available", lambda op, device: ["cuda-sm80", "reference"])
    monkeypatch.setattr(ops, "select", lambda op, device, backend: cpu)
    x = inputs.grid_and_ties(64, 96, seed=1).view(4, 16, 96)
    infinite = inputs.subnormals(16, 64, seed=3).bfloat16()
    infinite[3, 40] = -torch.inf
    for values in (x, x.mT[:, :, :0].mT, infinite, inputs.mse_ties(64, seed=2).mT.contiguous().mT):
        expected, actual = quantize(values, rule=rule), ops.quantize(values, rule=rule)
        assert actual.shape == values.shape
        oracle.assert_same(actual.scales, expected.scales, "scales")
        oracle.assert_same(actual.codes, expected.codes, "codes")
    with pytest.raises(ValueError, match="multiple of 32"):
        ops.quantize(torch.ones(2, 48), rule=rule)


@pytest.mark.parametrize("n", [1, 8, 16, 17, 40, 129])
@pytest.mark.parametrize("k", [32, 96, 4096])
def test_a_prepared_weight_has_its_size_and_can_be_restored(n, k):
    codes = torch.randint(0, 256, (n, k // 2), generator=inputs.generator(n)).byte()
    scales = torch.randint(0, 256, (n, k // 32), generator=inputs.generator(k)).byte()
    weight = MXFP4Tensor(codes, scales)
    prepared = prepare_weight(weight, backend="cpu")
    assert prepared.codes.shape == codes.shape
    assert prepared.scales.shape == scales.shape
    restored = restore_weight(prepared, backend="cpu")
    oracle.assert_same(restored.codes, codes, "codes")
    oracle.assert_same(restored.scales, scales, "scales")


def test_raw_ops_refuse_what_would_read_beyond_a_tensor():
    ops = torch.ops.duqpp_native
    x = torch.zeros(2, 64)
    w = (torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8))
    bad = [
        (ops.rotate_quantize, (x.t(), None, 0), "contiguous"),
        (ops.rotate_quantize, (x[:, :40].contiguous(), None, 0), "multiple of 32"),
        (ops.rotate_quantize, (x, torch.zeros(3, 32, 32).bfloat16(), 0), "rotation must be"),
        (ops.rotate_quantize, (x, torch.zeros(32, 32), 0), "rotation must be bfloat16"),
        (ops.rotate_quantize, (x, None, 4), "rule"),
        (ops.rotate_quantize, (x.long(), None, 0), "x must be bfloat16"),
        (ops.silu_mul_rotate_quantize, (x, x[:1], None, 0), "up must have the shape"),
        (ops.rmsnorm_rotate_quantize, (x, x[0, :32], 0.0, None, 0), "norm_weight must be"),
        (ops.prepare_weight, (w[0], w[1][:2]), "weight must be"),
        (ops.mxfp4_gemm, (*w, w[0][:, :16], w[1], None, torch.float32), "contiguous"),
        (ops.mxfp4_gemm, (*w, *w, torch.zeros(3), torch.float32), "bias must be"),
        (ops.mxfp4_gemm, (*w, *w, None, torch.int32), "out must be"),
        (ops.mxfp4_linear, (x, None, 0, w[0][:, :16].contiguous(), w[1], None), "must be"),
        (ops.mxfp4_linear, (x, None, 0, *w, torch.zeros(3)), "bias must be"),
        (ops.gptq_block, (x, None, 0), r"values must be \[2, 32\]"),
        (ops.gptq_block, (x[:, ::2], None, 0), "values must be contiguous"),
        (ops.gptq_block, (x.view(4, 32).double(), None, 0), "values must be float32"),
        (ops.gptq_block, (x.view(4, 32), x.view(4, 32), 0), r"factor must be \[32, 32\]"),
        (ops.gptq_block, (x.view(4, 32), None, 4), "rule must be"),
    ]
    for op, arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


class Launches(TorchDispatchMode):
    """Ops that compute, in order, with the shape of their first tensor."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        if not op.is_view:
            self.seen.append((op._schema.name, list(arguments[0].shape)))
        return op(*arguments, **(options or {}))


@pytest.mark.parametrize("form", ["plain", "rmsnorm", "silu_mul", "linear"])
def test_the_copy_of_a_constant_is_not_the_launch_before_a_kernel(form):
    """A GPU's kernel reads rotation and norm_weight while the one just before it may be running."""
    backend, rule, x = CpuBackend(), ScaleRule.EVEN, inputs.gaussian(3, 64, seed=1).bfloat16()
    turned = random_orthogonal(32, inputs.generator(2)).bfloat16().contiguous().T
    norm_weight = torch.ones(128, dtype=torch.bfloat16)[::2]
    weight = backend.prepare_weight(MXFP4Tensor(*inputs.mxfp4_operand(8, 64, seed=3)))
    calls = {
        "plain": lambda r, w: backend.rotate_quantize(x, r, rule),
        "rmsnorm": lambda r, w: backend.rmsnorm_rotate_quantize(x, w, 1e-5, r, rule),
        "silu_mul": lambda r, w: backend.silu_mul_rotate_quantize(x, x, r, rule),
        "linear": lambda r, w: backend.mxfp4_linear(x, r, rule, weight, None),
    }
    with Launches() as launches:
        calls[form](turned, norm_weight)
    names = [name for name, _ in launches.seen]
    kernel = next(i for i, name in enumerate(names) if name.startswith("duqpp_native::"))
    assert launches.seen[kernel - 1] == ("aten::clone", [3, 64])
    assert ("aten::clone", [32, 32]) in launches.seen[: kernel - 1]
    with Launches() as launches:
        calls[form](turned.contiguous(), norm_weight.contiguous())
    assert "aten::clone" not in [n for n, s in launches.seen if s == [3, 64]]
