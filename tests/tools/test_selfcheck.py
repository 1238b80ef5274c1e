"""selfcheck: passes on what is right, and says what is wrong."""

import json

import pytest
import torch
from typer.testing import CliRunner

from duqpp.cli.main import app, main
from duqpp.format import MXFP4Tensor
from duqpp.ops import dispatch
from duqpp.ops.large_gemm import Route, large_gemm
from duqpp.ops.native import CpuBackend
from duqpp.tools import selfcheck as module
from duqpp.tools.selfcheck import selfcheck


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", (1, 17))
    monkeypatch.setattr(module, "_K", (32, 160))


@pytest.fixture
def install(monkeypatch):
    """Replace the CPU backend for one test."""

    def replace(backend) -> None:
        monkeypatch.setattr(dispatch, "BACKENDS", (backend, dispatch.BACKENDS[-1]))
        monkeypatch.setattr(module, "BACKENDS", dispatch.BACKENDS)
        dispatch._select.cache_clear()

    yield replace
    monkeypatch.undo()
    dispatch._select.cache_clear()


def test_the_kernels_of_this_machine_pass():
    steps = []
    report = selfcheck(progress=lambda *step: steps.append(step))
    assert report.passed, report.checks
    cases = {(check.backend, check.op): check.cases for check in report.checks}
    assert cases["cpu", "rotate_quantize"] == 2 * 2 * 3 * 4 * 3
    assert cases["cpu", "mxfp4_gemm"] == 2 * 3 * 2 * 3
    assert cases["cpu", "fused rotate_quantize"] > 0
    assert steps[0][1] == 0
    assert steps[-1][1] == steps[-1][2]
    if not torch.cuda.is_available():
        assert any("torch sees no CUDA device" in line for line in report.skipped)


class WrongCodes(CpuBackend):
    def rotate_quantize(self, x, rotation, rule):
        right = super().rotate_quantize(x, rotation, rule)
        codes = right.codes.clone()
        codes[-1, -1] ^= 1
        return MXFP4Tensor(codes, right.scales)


class TransposedRotation(CpuBackend):
    def rotate_quantize(self, x, rotation, rule):
        turned = None if rotation is None else rotation.transpose(-1, -2).contiguous()
        return super().rotate_quantize(x, turned, rule)


class ForgottenBias(CpuBackend):
    def mxfp4_gemm(self, a, b, bias, out_dtype):
        return super().mxfp4_gemm(a, b, None, out_dtype)


class NoNan(CpuBackend):
    def mxfp4_gemm(self, a, b, bias, out_dtype):
        return super().mxfp4_gemm(a, b, bias, out_dtype).nan_to_num()


class ForgottenUp(CpuBackend):
    def silu_mul_rotate_quantize(self, gate, up, rotation, rule):
        return super().silu_mul_rotate_quantize(gate, torch.ones_like(up), rotation, rule)


@pytest.mark.parametrize(
    ("backend", "op"),
    [
        (WrongCodes, "rotate_quantize"),
        (TransposedRotation, "rotate_quantize"),
        (ForgottenBias, "mxfp4_gemm"),
        (NoNan, "mxfp4_gemm with NaN scales"),
        (ForgottenUp, "fused rotate_quantize"),
    ],
)
def test_a_wrong_kernel_is_found(backend, op, install):
    install(backend())
    report = selfcheck()
    assert not report.passed
    failed = [check for check in report.checks if check.failures]
    assert [check.op for check in failed] == [op]


@pytest.fixture
def many_rows(monkeypatch):
    """Check products of many rows, as on a Hopper, on this CPU; returns the failures."""
    backend = next(b for b in dispatch.BACKENDS if b.name == "cuda-sm80")
    monkeypatch.setattr(module, "route_on", lambda device: Route.CUTLASS)

    def check(large_gemm) -> tuple[str, ...]:
        monkeypatch.setattr(module, "large_gemm", large_gemm)
        run = module._checks(backend, "mxfp4_gemm")[-1]
        check = run(backend, "cpu")
        assert check.op == "mxfp4_gemm of many rows" and check.cases == 4
        return check.failures

    return check


def test_products_of_many_rows_pass(many_rows):
    assert many_rows(large_gemm) == ()
    names = [check.__name__ for check in module._checks(CpuBackend(), "mxfp4_gemm")]
    assert names == ["_check_gemm", "_check_nan"]


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


def test_nothing_to_check_is_no_pass(install):
    class Absent(CpuBackend):
        def unavailable_reason(self, op, device):
            return "it rained"

    install(Absent())
    report = selfcheck()
    assert not report.passed
    assert "rotate_quantize on cpu: it rained" in report.skipped


@pytest.mark.parametrize(
    ("place", "reason"), [("", "it is a folder"), ("none/x.json", "none is no folder that can be")]
)
def test_a_report_that_cannot_be_written_is_refused_before_any_check(
    place, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(module, "selfcheck", None)
    assert main(["selfcheck", "--report", str(tmp_path / place)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: cannot write the report to ")
    assert reason in err and err.count("\n") == 1


def test_command_writes_its_report(tmp_path):
    file = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["selfcheck", "--report", str(file), "--json"])
    assert done.exit_code == 0
    written = json.loads(file.read_text())
    assert written["passed"] is True
    assert written == json.loads(done.stdout)
    assert written["machine"]["versions"]["torch"] == torch.__version__
    table = CliRunner().invoke(app, ["selfcheck"]).stdout
    assert "equal to the reference" in table
    assert "skipped:" in table


def test_command_fails_when_a_kernel_is_wrong(install):
    install(WrongCodes())
    done = CliRunner().invoke(app, ["selfcheck"])
    assert done.exit_code == 1
    assert "[1, 32]" in done.stdout
