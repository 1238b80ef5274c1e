"""torch's global settings that a result, or the time that it takes, depends on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from duqpp.placement import HOST


@contextmanager
def plain_torch() -> Iterator[None]:
    """Run with torch's own defaults, whatever the caller has set, and set that again afterwards.

    So a job gives the same bytes under another default dtype or device, under autocast, with less
    precision in float32 products, and in inference mode. As a decorator it holds for every call.
    """
    dtype = torch.get_default_dtype()
    products = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    precisions = [product.fp32_precision for product in products]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # which also turns gradients on
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != HOST:
            stack.enter_context(HOST)
        try:
            torch.set_default_dtype(torch.float32)
            for product in products:
                product.fp32_precision = "ieee"
            yield
        finally:
            torch.set_default_dtype(dtype)
            for product, precision in zip(products, precisions, strict=True):
                product.fp32_precision = precision


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch's CPU operations on one thread meanwhile.

    In a loop of operations on some 10,000 elements each, waking a second thread costs several times
    what it gives: measured 0.04 s against 1.2 s for a 256-step rotation search on two busy cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
