"""The table of GPUs that says from how many rows of x on `large_gemm` multiplies."""

import json

import pytest
import torch

from duqpp.format import MXFP4Tensor
from duqpp.ops import native
from duqpp.ops.crossover import TABLE, Crossover, crossover, table
from duqpp.ops.dispatch import BACKENDS


def test_each_entry_says_where_it_is_from():
    for capability, entry in json.loads(TABLE.read_text()).items():
        assert entry["source"].startswith(("a model of ", "a measurement: ")), capability
        assert entry["rows"] >= 0 and entry["fixed"] >= 0, capability
    assert sorted(table()) == list(table()), "in order, as it is written"


def test_every_gpu_of_the_backend_is_in_it_and_no_other():
    backend = next(b for b in BACKENDS if b.name == "cuda-sm80")
    for capability in backend._code:
        assert crossover(capability) is not None, capability
    assert crossover((8, 7)) == crossover((8, 6))
    for capability in ((7, 5), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)):
        assert crossover(capability) is None, capability


def test_a_small_weight_takes_more_rows():
    entry = Crossover(rows=100, fixed=20, source="")
    assert entry.at(4096, 4096) == 120  # 2**24 weights
    assert entry.at(8192, 4096) == 110
    assert entry.at(8192, 28672) == 101


@pytest.mark.parametrize(("rows", "large"), [(119, False), (120, True)])
def test_the_backend_goes_by_the_table(rows, large, monkeypatch):
    monkeypatch.setattr(native, "crossover", {(9, 0): Crossover(100, 20, "")}.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    native._large_rows.cache_clear()
    weight = MXFP4Tensor(torch.empty(4096, 2048, dtype=torch.uint8), torch.empty(0))
    monkeypatch.setattr(native, "large_gemm", lambda *_: "large")
    monkeypatch.setattr(native.CudaBackend, "mxfp4_gemm", lambda *_: "few")
    monkeypatch.setattr(native.CudaBackend, "run_linear", lambda *_: "few")
    monkeypatch.setattr(native.CudaBackend, "run_quantization", lambda _, asked: asked.x)
    backend = next(b for b in BACKENDS if b.name == "cuda-sm80")
    x = torch.empty(rows, 4096, dtype=torch.bfloat16)
    a = MXFP4Tensor(torch.empty(rows, 2048, dtype=torch.uint8), torch.empty(0))
    expected = "large" if large else "few"
    try:
        assert backend.mxfp4_gemm(a, weight, None, torch.bfloat16) == expected
        assert backend.mxfp4_linear(x, None, None, weight, None) == expected
        assert backend.mxfp4_gemm(a, weight, None, torch.float32) == "few"
        assert backend.mxfp4_linear(x.float(), None, None, weight, None) == "few"
        direct = backend.direct_ops(4096, 4096, x.device)
        assert (x.numel() > direct.most_values) is large
    finally:
        native._large_rows.cache_clear()
