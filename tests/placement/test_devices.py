"""The device of a job: the one that is asked for, if it is here, or the best that is."""

import pytest
import torch

from duqpp.errors import InputError
from duqpp.placement import Placement, devices
from duqpp.placement.devices import choose_device, rest_for


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as far as choosing one of them goes: an H200 and a T4."""
    capabilities = {None: (9, 0), 0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(devices, "gpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Tesla T4")
    monkeypatch.delenv("DUQPP_BACKEND", raising=False)
    return capabilities


@pytest.mark.parametrize("unsaid", [None, "auto"])
def test_it_is_the_gpu_unless_the_kernels_of_the_cpu_are_asked_for(unsaid, gpus, monkeypatch):
    for backend, expected in (("cpu", "cpu"), ("reference", "cuda"), ("auto", "cuda")):
        monkeypatch.setenv("DUQPP_BACKEND", backend)
        assert choose_device(unsaid) == torch.device(expected)
    for asked in ("cuda", "cuda:0", "cpu", torch.device("cuda", 0)):
        assert choose_device(asked) == torch.device(asked)


def test_it_is_the_cpu_without_a_gpu():
    assert choose_device() == torch.device("cpu")


def test_it_is_the_cpu_where_the_gpu_is_too_old_and_says_so(gpus, caplog):
    gpus[None] = (7, 5)
    assert choose_device() == torch.device("cpu")
    assert caplog.messages == [
        "duqpp computes on the CPU, not on cuda: Tesla T4 has compute capability 7.5, and bfloat16 "
        "and the kernels of duqpp need 8.0"
    ]


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "meta", "cuda:1000"])
def test_no_name_of_a_device(name, gpus):
    with pytest.raises(InputError, match=r"^`device` must be auto, cpu, cuda or cuda:N, got '"):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda:2", 2, "`device` cuda:2: the last CUDA device here is cuda:1; "),
        ("cuda", 0, f"`device` cuda: torch {torch.__version__} sees no CUDA device here; "),
        ("cuda:1", 2, "`device` cuda:1: Tesla T4 has compute capability 7.5, and bfloat16 "),
    ],
)
def test_a_gpu_that_is_not_here_or_too_old(name, count, message, gpus, monkeypatch):
    monkeypatch.setattr(devices, "gpu_count", lambda: count)
    with pytest.raises(InputError) as found:
        choose_device(name)
    assert str(found.value).startswith(message)
    assert str(found.value).endswith("; `device=cpu` runs anywhere")


@pytest.mark.parametrize(("size", "rests"), [(95, "cuda:1"), (96, "cpu")])
def test_activations_rest_on_the_gpu_where_all_has_room(size, rests, monkeypatch):
    gpu = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000 + device.index))
    assert rest_for(Placement(gpu), lambda: size) == Placement(gpu, torch.device(rests))
    simulated = torch.device("cpu", 1)
    asked = iter(())  # without a GPU nothing is asked
    assert rest_for(Placement(simulated), lambda: next(asked)) == Placement(simulated, simulated)
