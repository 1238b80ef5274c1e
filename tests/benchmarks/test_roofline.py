"""Peaks and roofs, and the shapes that they are counted from."""

import pytest
import roofline
import torch
from roofline import Peaks, attempt, fp8_mm, matmul_rates, measured_peaks, to_fp8
from shapes import MODELS, POWERS, mxfp4_bytes

from duqpp.format import ScaleRule, quantize
from duqpp.tools.selfcheck import LLAMA_3


def test_the_roof_that_binds_is_named():
    peaks = Peaks({"copy": 1e12}, {"bf16": 5e14, "fp8": 1e15})
    assert peaks.roof(1e9, 1e9) == ("copy", 1e-3)
    assert peaks.roof(1e9, 2e15) == ("fp8", 2.0)  # of the rates, the fastest
    assert peaks.roof(1e9, 0) == ("copy", 1e-3)
    assert Peaks({"read": 1e10}).roof(1e9, 1e18) == ("read", 0.1)


def test_peaks_have_units_and_say_what_is_absent():
    peaks = Peaks({"copy": 1.0}, {"bf16": 2.0}, {"fp8": "not available: too old"})
    assert peaks.to_dict() == {
        "copy_bytes_per_second": 1.0,
        "bf16_operations_per_second": 2.0,
        "fp8_absent": "not available: too old",
    }


def test_rates_of_products_or_why_there_are_none():
    rates, absent = matmul_rates("cpu", seconds=0, size=64)
    assert rates.keys() | absent.keys() == {"bf16", "fp8", "fp4"}
    assert rates["bf16"] > 0
    assert all(why.startswith("not available: ") for why in absent.values())


def test_the_peaks_of_a_cpu(monkeypatch):
    monkeypatch.setattr(roofline, "BYTES", 1 << 20)
    peaks = measured_peaks("cpu", 1, seconds=0.001)
    assert list(peaks.bandwidth) == ["read"] and peaks.bandwidth["read"] > 1e6
    assert all(rate > 1e6 for rate in peaks.rates.values())  # without AVX-512 VNNI there is none
    assert roofline.copy_bandwidth(0.001) > 1e6


def test_the_rates_of_a_gpu_are_of_its_products(monkeypatch):
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda seconds, device: 7.0)
    monkeypatch.setattr(roofline, "matmul_rates", lambda *_: ({"bf16": 1.0}, {"fp8": "no"}))
    assert measured_peaks("cuda", 1) == Peaks({"copy": 7.0}, {"bf16": 1.0}, {"fp8": "no"})


def test_what_torch_refuses_is_reported_in_its_words():
    def refused() -> None:
        raise RuntimeError("needs compute capability 8.9\nand a stack trace")

    assert attempt(lambda: refused) == (None, "not available: needs compute capability 8.9")
    call, why = attempt(lambda: lambda: 3)
    assert call() == 3 and why == ""


def test_the_fp8_product_is_the_product():
    a, b = torch.randn(16, 64), torch.randn(32, 64) * 1e-3
    call, why = attempt(lambda: lambda: fp8_mm(to_fp8(a), to_fp8(b)))
    if call is None:
        pytest.skip(why)
    exact = a @ b.T
    assert (call().float() - exact).norm() < 0.06 * exact.norm()  # see operands.TOLERANCES


def test_shapes_are_those_of_selfcheck():
    found = {
        f"{name.upper()} {linear}": shape
        for name in ("8b", "70b")
        for linear, shape in MODELS[name].linears.items()
    }
    assert found == LLAMA_3
    assert POWERS[0] == 1 and POWERS[-1] == 16384


def test_bytes_are_those_of_a_quantized_tensor():
    tensor = quantize(torch.randn(8, 96), rule=ScaleRule.EVEN)
    assert mxfp4_bytes(8, 96) == tensor.codes.nbytes + tensor.scales.nbytes
