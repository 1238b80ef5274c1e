"""What the CUDA ops refuse before they touch a device; no GPU is needed.

Their code is called on tensors of the CPU: where a check is missing, the call goes on to that of
the device, whose message is another.
"""

import pytest
import torch

from duqpp.format.scale_layout import swizzled_size
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
        ((X[:, :48].contiguous(), None, 0), r"x must be \[\.\.\., K\], K a multiple of 32"),
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
    (misaligned(CODES), SCALES, f"codes {ALIGNED}"),
    (CODES, misaligned(SCALES), f"scales {ALIGNED}"),
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


ROWS_OF_8 = r"must have a multiple of 8 rows, at least 8, got {}; pad the weight with zero rows"


@pytest.mark.parametrize("rows", [0, 4, 12])
def test_a_weight_has_rows_of_out_that_can_be_stored(rows):
    codes = torch.zeros(rows, 32, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mxfp4_gemm: b " + ROWS_OF_8.format(rows)):
        call_on_cuda("mxfp4_gemm", CODES, SCALES, codes, SCALES, None, torch.bfloat16)
    with pytest.raises(RuntimeError, match="mxfp4_gemm: weight " + ROWS_OF_8.format(rows)):
        call_on_cuda("mxfp4_linear", X, None, 0, codes, SCALES, None)


@pytest.mark.parametrize("columns", [0, 24, 1 << 30])
def test_k_is_a_multiple_of_32_that_fits_32_bits(columns):
    codes = torch.empty(1, columns, dtype=torch.uint8)  # address space only: never written
    message = f"K must be a multiple of 32, at least 32 and at most 2147483647, got {2 * columns}"
    with pytest.raises(RuntimeError, match=f"mxfp4_gemm: {message}"):
        call_on_cuda("mxfp4_gemm", codes, SCALES, codes, SCALES, None, torch.bfloat16)


def test_rows_fit_32_bits():
    codes = torch.empty(1 << 31, 0, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mxfp4_gemm: a must have at most 2147483647 rows"):
        call_on_cuda("mxfp4_gemm", codes, SCALES, CODES, SCALES, None, torch.bfloat16)


@pytest.mark.parametrize(("rows", "size"), [(8, 256), (129, 1023), (129, 2048)])
def test_scales_of_x_are_swizzled_with_their_padding(rows, size):
    codes = torch.zeros(rows, 32, dtype=torch.uint8)
    scales = torch.zeros(size, dtype=torch.uint8)
    expected = 512 if rows == 8 else 1024
    with pytest.raises(RuntimeError, match=f"a.scales must have {expected} bytes .* got {size}"):
        call_on_cuda("mxfp4_gemm", codes, scales, CODES, SCALES, None, torch.bfloat16)


def test_out_is_of_16_bits():
    with pytest.raises(RuntimeError, match="mxfp4_gemm: out_dtype must be bfloat16 or float16"):
        call_on_cuda("mxfp4_gemm", CODES, SCALES, CODES, SCALES, None, torch.float32)


@pytest.mark.parametrize(("rows", "n", "k"), [(0, 8, 32), (1, 72, 160), (129, 8, 96)])
def test_legal_shapes_get_as_far_as_the_device(rows, n, k):
    a, b = (torch.zeros(size, k // 2, dtype=torch.uint8) for size in (rows, n))
    scales = torch.zeros(swizzled_size(rows, k // 32), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=rf"a\.codes {ONE_DEVICE}"):
        call_on_cuda("mxfp4_gemm", a, scales, b, SCALES, None, torch.float16)


def test_products_name_what_is_on_another_device():
    with pytest.raises(RuntimeError, match=rf"mxfp4_gemm: a\.codes {ONE_DEVICE}"):
        call_on_cuda("mxfp4_gemm", CODES, SCALES, CODES, SCALES, None, torch.bfloat16)
    with pytest.raises(RuntimeError, match=rf"mxfp4_gemm: weight\.codes {ONE_DEVICE}"):
        call_on_cuda("mxfp4_linear", X, None, 0, CODES, SCALES, None)


def test_expansion_names_what_is_not_on_the_device():
    row_scales = torch.zeros(16 + 8, dtype=torch.uint8)
    for name, *arguments in (
        ("expand_activation", CODES, SCALES, torch.bfloat16),
        ("expand_weight", CODES, row_scales, 0, 8, torch.bfloat16),
    ):
        with pytest.raises(RuntimeError, match=rf"{name}: codes {ONE_DEVICE}"):
            call_on_cuda(name, *arguments)


def test_gptq_block_names_what_is_not_on_the_device():
    values = torch.zeros(4, 32)
    with pytest.raises(RuntimeError, match=rf"gptq_block: values {ONE_DEVICE}"):
        call_on_cuda("gptq_block", values, torch.zeros(32, 32), 0)
