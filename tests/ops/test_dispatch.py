"""Which backend runs an op, and what is said when none can."""

import pytest
import torch

from duqpp.errors import BackendUnavailableError, DuqppError
from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.ops import (
    dispatch,
    mxfp4_gemm,
    mxfp4_linear,
    prepare_weight,
    quantize,
    rotate_quantize,
)
from duqpp.ops.reference import ReferenceBackend

CPU = torch.device("cpu")
OPS = ("rotate_quantize", "mxfp4_gemm")


class Partial(ReferenceBackend):
    """A backend that runs some ops, and counts what it was asked to run."""

    def __init__(self, name: str, ops: tuple[str, ...]) -> None:
        self.name, self.ops, self.calls = name, ops, 0

    def unavailable_reason(self, op: str, device: torch.device) -> str | None:
        return None if op in self.ops else f"needs a {self.name} machine, not {device}"

    def rotate_quantize(self, x, rotation, rule):
        self.calls += 1
        return super().rotate_quantize(x, rotation, rule)


@pytest.fixture
def install(monkeypatch):
    """Replace the backends for one test: ``install(Partial(...), ...)``; reference comes last."""

    def replace(*backends: Partial) -> None:
        monkeypatch.setattr(dispatch, "BACKENDS", (*backends, ReferenceBackend()))
        dispatch._select.cache_clear()
        dispatch.warn_of_reference.cache_clear()

    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    yield replace
    monkeypatch.undo()
    dispatch._select.cache_clear()


def test_the_reference_is_always_there(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    for op in OPS:
        assert dispatch.select(op, CPU, "reference").name == "reference"
        assert dispatch.select(op, CPU).unavailable_reason(op, CPU) is None


def test_auto_takes_the_first_that_can_run_every_op(install):
    """What one op writes is in the layout of its own backend's GEMM: two must not be mixed."""
    install(Partial("half", ("rotate_quantize",)), Partial("whole", OPS), Partial("late", OPS))
    for op in OPS:
        assert dispatch.select(op, CPU).name == "whole"
    assert dispatch.select("rotate_quantize", CPU, "half").name == "half", (
        "a name is taken as given"
    )


def test_a_name_overrides_the_order(install):
    install(Partial("fast", OPS))
    assert dispatch.select("mxfp4_gemm", CPU, "reference").name == "reference"
    assert dispatch.select("mxfp4_gemm", CPU, "auto").name == "fast"


def test_the_environment_replaces_auto_and_nothing_else(install, monkeypatch):
    install(Partial("fast", OPS), Partial("slow", OPS))
    assert dispatch.select("mxfp4_gemm", CPU).name == "fast"
    monkeypatch.setenv("DUQPP_BACKEND", "slow")
    assert dispatch.select("mxfp4_gemm", CPU).name == "slow", "read at each call"
    assert dispatch.select("mxfp4_gemm", CPU, "reference").name == "reference"
    monkeypatch.setenv("DUQPP_BACKEND", "auto")
    assert dispatch.select("mxfp4_gemm", CPU).name == "fast"


def test_the_chosen_backend_runs_the_op(install, monkeypatch):
    fast = Partial("fast", OPS)
    install(fast)
    x = torch.ones(1, 32)
    rotate_quantize(x, None, rule=ScaleRule.EVEN)
    rotate_quantize(x, None, rule=ScaleRule.EVEN, backend="fast")
    assert fast.calls == 2
    rotate_quantize(x, None, rule=ScaleRule.EVEN, backend="reference")
    monkeypatch.setenv("DUQPP_BACKEND", "reference")
    rotate_quantize(x, None, rule=ScaleRule.EVEN)
    assert fast.calls == 2


def test_prepare_weight_asks_the_backend_of_the_gemm(install):
    class Reordering(Partial):
        def prepare_weight(self, weight):
            return MXFP4Tensor(weight.codes, weight.scales.flip(0))

    install(Partial("half", ("rotate_quantize",)), Reordering("reordering", OPS))
    weight = MXFP4Tensor(torch.zeros(2, 16).byte(), torch.tensor([[1], [2]]).byte())
    assert prepare_weight(weight).scales.tolist() == [[2], [1]]
    assert prepare_weight(weight, backend="reference").scales.tolist() == [[1], [2]]


def test_an_unknown_backend_is_an_error_that_names_what_there_is(install):
    install()
    with pytest.raises(BackendUnavailableError) as error:
        rotate_quantize(torch.zeros(1, 32), None, rule=ScaleRule.EVEN, backend="abacus")
    assert str(error.value) == (
        "backend 'abacus' cannot run rotate_quantize on cpu here: no such backend; "
        "available: reference (DUQPP_BACKEND=...)"
    )
    assert isinstance(error.value, DuqppError)
    assert isinstance(error.value, RuntimeError)


@pytest.mark.parametrize("op", ["rotate_quantize", "mxfp4_gemm", "mxfp4_linear", "prepare_weight"])
def test_an_unknown_backend_in_the_environment_stops_every_op(op, install, monkeypatch):
    install()
    monkeypatch.setenv("DUQPP_BACKEND", "unknown")
    x = torch.zeros(1, 32)
    w = MXFP4Tensor(torch.zeros(2, 16).byte(), torch.zeros(2, 1).byte())
    calls = {
        "rotate_quantize": lambda: rotate_quantize(x, None, rule=ScaleRule.EVEN),
        "mxfp4_gemm": lambda: mxfp4_gemm(w, w, out_dtype=torch.float32),
        "mxfp4_linear": lambda: mxfp4_linear(x, None, w, rule=ScaleRule.EVEN),
        "prepare_weight": lambda: prepare_weight(w),
    }
    message = r"^backend 'unknown' cannot run \w+ on cpu here: no such backend; available: ref"
    with pytest.raises(BackendUnavailableError, match=message):
        calls[op]()


def test_a_backend_that_cannot_run_says_why(install):
    install(Partial("quantum", ("rotate_quantize",)), Partial("fast", OPS))
    with pytest.raises(BackendUnavailableError) as error:
        dispatch.select("mxfp4_gemm", CPU, "quantum")
    assert str(error.value) == (
        "backend 'quantum' cannot run mxfp4_gemm on cpu here: needs a quantum machine, not cpu; "
        "available: fast, reference (DUQPP_BACKEND=...)"
    )


def test_nothing_runs_an_op_that_does_not_exist():
    with pytest.raises(BackendUnavailableError, match=r"cannot run transpose .*; available: none"):
        dispatch.select("transpose", CPU)


def test_a_backend_is_asked_about_the_device_that_is_meant(install):
    asked = []

    class Curious(Partial):
        def unavailable_reason(self, op, device):
            asked.append(device)

    install(Curious("curious", OPS))
    for device in (CPU, torch.device("cuda", 0), torch.device("cuda", 3), torch.device("cuda")):
        asked.clear()
        dispatch.select("mxfp4_gemm", device)
        assert set(asked) == {device}


def test_the_reference_where_a_kernel_is_to_be_expected_warns_once(install, caplog):
    install(Partial("cpu", ()), Partial("cuda-sm100", ()))
    for _ in range(2):
        for op in OPS:
            assert dispatch.select(op, CPU).name == "reference"
        quantize(torch.ones(1, 32), rule=ScaleRule.EVEN)
    assert [(r.levelname, r.name) for r in caplog.records] == [("WARNING", "duqpp.ops.dispatch")]
    assert caplog.messages[0].startswith(
        "duqpp runs on cpu by its reference, which is slow (not cpu: needs a cpu machine, not cpu)."
    )
    dispatch.select("mxfp4_gemm", torch.device("cuda"))
    assert "on cuda by its reference" in caplog.messages[1]
    assert "(not cuda-sm100: needs a cuda-sm100 machine, not cuda)" in caplog.messages[1]
    dispatch.select("mxfp4_gemm", torch.device("xpu"))
    assert "(there are no kernels for xpu)" in caplog.messages[2]
    assert len(caplog.messages) == 3


def test_quantizing_a_weight_by_the_reference_warns_too(install, caplog):
    install()
    quantize(torch.ones(1, 32), rule=ScaleRule.EVEN)
    assert len(caplog.messages) == 1


def test_no_warning_for_a_kernel_or_for_a_reference_that_was_asked_for(
    install, caplog, monkeypatch
):
    install(Partial("cpu", OPS))
    dispatch.select("mxfp4_gemm", CPU)
    install()
    dispatch.select("mxfp4_gemm", CPU, "reference")
    monkeypatch.setenv("DUQPP_BACKEND", "reference")
    dispatch.select("mxfp4_gemm", CPU)
    assert caplog.messages == []


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 96), (0, 2, 32), (0, 0, 64), (2, 3, 64), (64,)])
def test_quantize_of_any_leading_shape(shape):
    """Also of no rows at all, where a dimension of -1 would stand for any number."""
    made = quantize(torch.ones(shape), rule=ScaleRule.EVEN)
    assert made.codes.shape == (*shape[:-1], shape[-1] // 2)
    assert made.scales.shape == (*shape[:-1], shape[-1] // 32)
