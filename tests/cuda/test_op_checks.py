"""What the CUDA ops refuse before they touch a device; no GPU is needed.

Their code is called on tensors of the CPU: where a check is missing, the call goes on to that of
the device, whose message is another. What mxfp4_gemm checks besides is in
test_mxfp4_gemm_host.py.
"""

import pytest
import torch

from tests.cuda.library import cuda_extension

X = torch.zeros(2, 64, dtype=torch.bfloat16)
CODES = torch.zeros(8, 32, dtype=torch.uint8)
SCALES = torch.zeros(512, dtype=torch.uint8)
MATRIX = torch.zeros(32, 32, dtype=torch.bfloat16)
WEIGHT = torch.zeros(64, dtype=torch.bfloat16)
ONE_DEVICE = "must be on the CUDA device of the first argument"
ALIGNED = "must start at a multiple of 16 bytes"


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element further on in memory."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape)


def call_on_cuda(name: str, *arguments: object) -> object:
    cuda_extension()
    op = getattr(torch.ops.duqpp_native, name).default
    return op._op_dk(torch._C.DispatchKey.CUDA, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.float(), None, 0), "rotate_quantize: x must be bfloat16 or float16 on CUDA"),
        ((X.long(), None, 0), "x must be bfloat16"),
        ((X.t(), None, 0), "x must be contiguous"),
        ((X[:, :48].contiguous(), None, 0), "x must be .M, K., K a multiple of 32"),
        ((misaligned(X), None, 0), f"rotate_quantize: x {ALIGNED}"),
        ((X, None, 4), "rule must be"),
        ((X, MATRIX.float(), 0), "rotation must be bfloat16"),
        ((X, MATRIX.t(), 0), "rotation must be contiguous"),
        ((X, MATRIX[:16], 0), "rotation must be .32, 32. or .K/32, 32, 32."),
        ((X, misaligned(MATRIX), 0), f"rotate_quantize: rotation {ALIGNED}"),
        ((X, MATRIX, 0), f"rotate_quantize: rotation {ONE_DEVICE}"),
    ],
)
def test_rotate_quantize_names_the_argument(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        call_on_cuda("rotate_quantize", *arguments)


def test_fused_forms_name_the_argument():
    for name, *arguments, message in (
        ("silu_mul_rotate_quantize", X, X, None, 0, f"up {ONE_DEVICE}"),
        ("rmsnorm_rotate_quantize", X, WEIGHT, 1e-5, None, 0, f"norm_weight {ONE_DEVICE}"),
        ("rmsnorm_rotate_quantize", misaligned(X), None, 1e-5, None, 0, f"x {ALIGNED}"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call_on_cuda(name, *arguments)


def test_large_inputs_are_refused():
    x = torch.empty((1 << 26) + 1, 32, dtype=torch.bfloat16)  # address space only: never written
    with pytest.raises(RuntimeError, match=r"rotate_quantize: x must have at most 2\^31"):
        call_on_cuda("rotate_quantize", x, None, 0)


BAD_OPERANDS = (
    (CODES.long(), SCALES, "codes must be uint8"),
    (CODES.repeat(1, 2)[:, ::2], SCALES, "codes must be contiguous"),
    (CODES[0], SCALES, r"codes must be \[rows, K/2\]"),
    (CODES, SCALES.float(), "scales must be uint8"),
    (CODES, SCALES[::2], "scales must be contiguous"),
)


@pytest.mark.parametrize(("codes", "scales", "message"), BAD_OPERANDS)
def test_products_name_the_operand(codes, scales, message):
    good = (CODES, SCALES)
    for name, *arguments, operand in (
        ("mxfp4_gemm", codes, scales, *good, None, torch.bfloat16, "a"),
        ("mxfp4_gemm", *good, codes, scales, None, torch.bfloat16, "b"),
        ("mxfp4_linear", X, None, 0, codes, scales, None, "weight"),
    ):
        with pytest.raises(RuntimeError, match=rf"{operand}\.{message}"):
            call_on_cuda(name, *arguments)


def test_operands_have_one_k():
    half = CODES[:, :16].contiguous()
    with pytest.raises(RuntimeError, match=r"b\.codes must be \[8, 32\]"):
        call_on_cuda("mxfp4_gemm", CODES, SCALES, half, SCALES, None, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"weight\.codes must be \[8, 32\]"):
        call_on_cuda("mxfp4_linear", X, None, 0, half, SCALES, None)


def test_products_name_what_is_on_another_device():
    with pytest.raises(RuntimeError, match=rf"mxfp4_gemm: a\.codes {ONE_DEVICE}"):
        call_on_cuda("mxfp4_gemm", CODES, SCALES, CODES, SCALES, None, torch.bfloat16)
    with pytest.raises(RuntimeError, match=rf"mxfp4_gemm: weight\.codes {ONE_DEVICE}"):
        call_on_cuda("mxfp4_linear", X, None, 0, CODES, SCALES, None)


def test_expansion_names_what_is_not_on_the_device():
    row_scales = torch.zeros(16, dtype=torch.uint8)
    for name, *arguments in (
        ("expand_activation", CODES, SCALES, torch.bfloat16),
        ("expand_weight", CODES, row_scales, 0, 8, torch.bfloat16),
    ):
        with pytest.raises(RuntimeError, match=rf"{name}: codes {ONE_DEVICE}"):
            call_on_cuda(name, *arguments)
