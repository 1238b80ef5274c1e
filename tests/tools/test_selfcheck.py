"""selfcheck: passes on what is right, and says what is wrong."""

import json

import pytest
import torch
from typer.testing import CliRunner

from duqpp.cli.main import app, main
from duqpp.format import MXFP4Tensor
from duqpp.ops import dispatch
from duqpp.ops.native import CpuBackend
from duqpp.tools import gemm_checks
from duqpp.tools import selfcheck as module
from duqpp.tools.gemm_checks import Check
from duqpp.tools.selfcheck import selfcheck
from tests.cuda.library import extension


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    for part in (module, gemm_checks):
        monkeypatch.setattr(part, "ROWS", (1, 17))
        monkeypatch.setattr(part, "K", (32, 160))


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
def gpu(monkeypatch):
    """A GPU with stream-K, whose steps are noted instead of run: each with what the table chooses.

    Returns: the notes, and the failures that stream-K's check is to report.
    """
    notes, failures = [], []
    backend = next(b for b in dispatch.BACKENDS if b.name == "cuda-sm100")

    def note(what: str) -> None:
        plan = extension().select_gemm(1, 4096, 4096, arch=100, sm_count=148)
        notes.append((what, plan.kernel.endswith("streamk")))

    def run(backend, device) -> Check:
        note("check")
        return Check(backend.name, "mxfp4_gemm", 1, ())

    def check_streamk(backend) -> list[Check]:
        note("stream-K")
        return [Check(backend.name, "mxfp4_gemm: stream-K", 1, tuple(failures))]

    def timings(backend, device):
        note("timings")
        yield from ()

    monkeypatch.setattr(module, "_runnable", lambda: ([(backend, "mxfp4_gemm", "cuda")], []))
    monkeypatch.setattr(module, "_checks", lambda *_: [run, run])
    monkeypatch.setattr(module, "has_streamk", lambda: True)
    monkeypatch.setattr(module, "check_streamk", check_streamk)
    monkeypatch.setattr(module, "_copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(module, "_timings", timings)
    return notes, failures


def test_streamk_is_checked_after_all_else_and_then_timed(gpu):
    notes, _ = gpu
    report = selfcheck()
    assert report.passed and report.skipped == ()
    assert notes == [("check", False)] * 2 + [("stream-K", True), ("timings", True)]


def test_streamk_that_fails_is_not_timed(gpu):
    notes, failures = gpu
    failures.append("no end within 180 s")
    assert not selfcheck().passed
    assert notes[-1] == ("timings", False)
    assert extension().allow_streamk(True), "as it was before"


def test_streamk_that_is_off_is_not_checked(gpu):
    notes, _ = gpu
    extension().allow_streamk(False)
    try:
        report = selfcheck()
    finally:
        extension().allow_streamk(True)
    assert report.passed
    assert report.skipped == ("stream-K on cuda-sm100: DUQPP_STREAMK=off",)
    assert [what for what, _ in notes] == ["check", "check", "timings"]
    assert not any(streamk for _, streamk in notes)


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
