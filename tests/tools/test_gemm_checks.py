"""The checks of mxfp4_gemm: what is wrong is found, and stream-K cannot hold selfcheck up."""

import json
from dataclasses import asdict

import pytest
import torch

from duqpp.format import MXFP4Tensor
from duqpp.ops import dispatch
from duqpp.ops.cover import Product
from duqpp.ops.kernels import Machine
from duqpp.ops.large_gemm import Route, large_gemm
from duqpp.ops.native import CUDA_BACKENDS, CpuBackend
from duqpp.tools import gemm_checks
from duqpp.tools.gemm_checks import Check, check_ends, check_kernel, check_streamk, checks_of
from tests.cuda.library import extension

SHAPES = [Product(33, 72, 96), Product(5, 40, 544)]


@pytest.fixture
def install(monkeypatch):
    """Make a backend that of the name `cpu`."""

    def replace(backend: CpuBackend) -> CpuBackend:
        monkeypatch.setattr(dispatch, "BACKENDS", (backend, dispatch.BACKENDS[-1]))
        dispatch._select.cache_clear()
        return backend

    yield replace
    monkeypatch.undo()
    dispatch._select.cache_clear()


def test_a_right_kernel_passes():
    check = check_kernel(CpuBackend(), "cpu", "one", SHAPES)
    assert check == Check("cpu", "mxfp4_gemm: one", 2 * 3 * 4, ())
    assert check_ends(CpuBackend(), "cpu", "one", SHAPES).failures == ()


class NoBiasOfFloat16(CpuBackend):
    def mxfp4_gemm(self, a, b, bias, out_dtype):
        bias = None if bias is not None and bias.dtype == torch.float16 else bias
        return super().mxfp4_gemm(a, b, bias, out_dtype)


class RoundedTwice(CpuBackend):
    def mxfp4_gemm(self, a, b, bias, out_dtype):
        y = super().mxfp4_gemm(a, b, None, out_dtype)
        return y if bias is None else (y + bias).to(out_dtype)


class LastBlockLostOfMany(CpuBackend):
    def mxfp4_gemm(self, a, b, bias, out_dtype):
        codes = a.codes.clone()
        if a.shape[1] > 512:
            codes[:, -16:] = 0
        return super().mxfp4_gemm(MXFP4Tensor(codes, a.scales), b, bias, out_dtype)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (NoBiasOfFloat16, "[33, 96] x [72, 96] to torch.bfloat16, bias torch.float16"),
        (RoundedTwice, "[33, 96] x [72, 96] to torch.bfloat16, bias torch.bfloat16"),
        (LastBlockLostOfMany, "[5, 544] x [40, 544] to torch.bfloat16, bias None"),
    ],
)
def test_a_wrong_kernel_is_found(wrong, where, install):
    failures = check_kernel(install(wrong()), "cpu", "one", SHAPES).failures
    assert failures and failures[0].startswith(where), failures


class ScalesNear1(CpuBackend):
    """Scales beyond 2**100 are taken for it, as some conversion to another format might."""

    def mxfp4_gemm(self, a, b, bias, out_dtype):
        a = MXFP4Tensor(a.codes, torch.where(a.scales == 255, 255, a.scales.clamp(max=227)))
        return super().mxfp4_gemm(a, b, bias, out_dtype)


class ZeroFor2ToTheMinus127(CpuBackend):
    """The scale of byte 0 is subnormal in float32."""

    def mxfp4_gemm(self, a, b, bias, out_dtype):
        codes = torch.where((a.scales == 0).repeat_interleave(16, -1), 0, a.codes)
        return super().mxfp4_gemm(MXFP4Tensor(codes, a.scales), b, bias, out_dtype)


class NanIsLarge(CpuBackend):
    def mxfp4_gemm(self, a, b, bias, out_dtype):
        return super().mxfp4_gemm(a, b, bias, out_dtype).nan_to_num()


@pytest.mark.parametrize(
    ("wrong", "failure"),
    [
        (ScalesNear1, "the largest scales of x"),
        (ZeroFor2ToTheMinus127, "the smallest scales of x"),
        (NanIsLarge, "NaN scales must make"),
    ],
)
def test_a_wrong_scale_is_found(wrong, failure, install):
    failures = check_ends(install(wrong()), "cpu", "one", SHAPES).failures
    assert len(failures) == 1 and failures[0].startswith(failure), failures


@pytest.fixture
def many_rows(monkeypatch):
    """Check products of many rows, as on a Hopper, on this CPU; returns the failures."""
    backend = next(b for b in CUDA_BACKENDS if b.name == "cuda-sm80")
    monkeypatch.setattr(gemm_checks, "route_on", lambda device: Route.CUTLASS)

    def check(large_gemm) -> tuple[str, ...]:
        monkeypatch.setattr(gemm_checks, "large_gemm", large_gemm)
        run = checks_of(backend, "cpu")[-1]
        check = run(backend, "cpu")
        assert check.op == "mxfp4_gemm of many rows" and check.cases == 4
        return check.failures

    return check


def test_products_of_many_rows_pass(many_rows):
    assert many_rows(large_gemm) == ()
    names = [check.__name__ for check in checks_of(CpuBackend(), "cpu")]
    assert names == ["check_shapes", "check_nan"]


def test_a_wrong_product_of_many_rows_is_found(many_rows):
    def one_block_lost(a, b, route):
        codes = a.codes.clone()
        codes[:, :16] = 0
        return large_gemm(MXFP4Tensor(codes, a.scales), b, route=route)

    def last_row_lost(a, b, route):
        out = large_gemm(a, b, route=route)
        out[-1] = 0
        return out

    for wrong in (one_block_lost, last_row_lost):
        failures = many_rows(wrong)
        assert len(failures) == 4 and "torch.mm" in failures[0], failures


# Stream-K, in another process; here a script in the place of Python.


@pytest.fixture
def process(tmp_path, monkeypatch):
    def be(script: str) -> None:
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setattr(gemm_checks.sys, "executable", str(file))

    return be


def test_streamk_that_hangs_is_stopped(process):
    process("exec sleep 60")
    (check,) = check_streamk(CpuBackend(), limit=0.2)
    assert check.failures == (
        "no end within 0.2 s; DUQPP_STREAMK=off keeps stream-K from being chosen",
    )


def test_streamk_that_fails_says_how(process):
    process("echo first >&2; echo 'CUDA error: launch failed' >&2; exit 3")
    (check,) = check_streamk(CpuBackend())
    assert check.failures[0].startswith("exit status 3: CUDA error: launch failed; DUQPP_STREAMK")


def test_checks_of_streamk_come_back(process, tmp_path, monkeypatch, capsys):
    """What the process prints, of the kernels that the table has for a GPU."""
    extension()
    monkeypatch.setattr(gemm_checks, "machines_here", lambda: [Machine((10, 0), 148)])
    ran = []

    def run(backend, device, kernel, shapes):
        plans = [shape.cell(Machine((10, 0), 148)).splits for shape in shapes]
        ran.append((backend.name, device, kernel, plans))
        return Check(backend.name, kernel, len(plans), ("wrong",))

    monkeypatch.setattr(gemm_checks, "check_kernel", run)
    monkeypatch.setattr(gemm_checks, "check_ends", run)
    gemm_checks.main("cuda-sm100")
    name = "sm100_swapped_128x64_streamk"
    assert ran == [("cuda-sm100", "cuda", name, [2, 3, 4])] * 2
    printed = capsys.readouterr().out
    expected = Check("cuda-sm100", name, 3, ("wrong",))
    assert json.loads(printed) == [asdict(expected) | {"failures": ["wrong"]}] * 2
    (tmp_path / "checks.json").write_text(printed)
    process(f"cat {tmp_path}/checks.json")
    assert check_streamk(CpuBackend()) == [expected] * 2
