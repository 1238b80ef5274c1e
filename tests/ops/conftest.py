"""A test of a GPU's kernels is of its kernels."""

import pytest
import torch

from tests.ops.backends import refuse_reference


@pytest.fixture(autouse=True)
def kernels_compute(request, monkeypatch) -> None:
    """Where a test's parameter `backend` is a GPU's, it fails if the reference computes.

    Of its dtypes float32 is skipped there: the kernels read and write 16 bits.
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    backend = parameters.get("backend")
    if not isinstance(backend, str) or not backend.startswith("cuda"):
        return
    if torch.float32 in (parameters.get("dtype"), parameters.get("out_dtype")):
        pytest.skip(f"float32 on {backend} is the reference's")
    refuse_reference(monkeypatch)
