"""Definitions of MXFP4 written from OCP MX v1.0, independent of the package under test.

Values are float64, which holds every float32 and every E2M1 * E8M0 product exactly, or Python
integers. Rules are plain strings ("floor", "even", "ceil", "mse"). Inputs are numpy arrays or CPU
tensors of any dtype; results are numpy arrays.
"""

import math
from fractions import Fraction

import numpy as np
import torch

BLOCK = 32
NAN_SCALE = 255


def _e2m1_value(code: int) -> float:
    """OCP MX v1.0, table 5 (E2M1): exponent bias 1, one mantissa bit, no infinity and no NaN."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return math.copysign(magnitude, -1 if code & 8 else 1)


E2M1_VALUES = np.array([_e2m1_value(code) for code in range(16)])


def _float64(x) -> np.ndarray:
    return torch.as_tensor(x).double().numpy()


def encode_e2m1(x) -> np.ndarray:
    """Codes of the nearest E2M1 values: of two at the same distance the even code; 6 saturates.

    The distances are float64. They are exact from 2**-29 upwards, and below that zero is nearest
    by far. NaN has no code; what it gives here means nothing.
    """
    x = _float64(x)
    distance = np.abs(np.minimum(np.abs(x), 6.0)[..., None] - E2M1_VALUES[:8])
    nearest = distance == distance.min(-1, keepdims=True)
    even = np.arange(8) % 2 == 0
    index = np.argmax(nearest * (1 + even), axis=-1)
    return (index + 8 * np.signbit(x)).astype(np.uint8)


def pack(codes) -> np.ndarray:
    """uint8 codes [..., K] to bytes [..., K/2]: columns 2i and 2i + 1 are low and high nibble."""
    codes = np.asarray(codes, dtype=np.uint8)
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // 2), dtype=np.uint8)
    for i in range(packed.shape[-1]):
        packed[..., i] = codes[..., 2 * i] + 16 * codes[..., 2 * i + 1]
    return packed


def unpack(packed) -> np.ndarray:
    """The inverse of `pack`."""
    packed = np.asarray(packed, dtype=np.uint8)
    codes = np.zeros((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    for i in range(packed.shape[-1]):
        codes[..., 2 * i] = packed[..., i] % 16
        codes[..., 2 * i + 1] = packed[..., i] // 16
    return codes


def decode_e8m0(scales) -> np.ndarray:
    """2**(byte - 127) in float64; NaN for 255. OCP MX v1.0, section 5.4.1."""
    scales = np.asarray(scales, dtype=np.int64)
    return np.where(scales == NAN_SCALE, np.nan, np.ldexp(1.0, scales - 127))


def scale_exponent(amax, rule: str) -> np.ndarray:
    """Biased exponents, uint8, of block amax under "floor", "even" or "ceil".

    floor: floor(log2 amax) - 2, where 2 is the exponent of the largest E2M1 value (section 6.3).
    even: the same of amax rounded to a significand of one mantissa bit, halves up.
    ceil: ceil(log2(amax / 6)), the least n with amax <= 6 * 2**n.
    Clamped at biased 0; 0 for amax 0; 255 for infinite or NaN amax.
    """
    amax = _float64(amax)
    finite = np.where(np.isfinite(amax) & (amax > 0), amax, 1.0)
    fraction, exponent = np.frexp(finite)
    significand, log2_floor = fraction * 2, exponent.astype(np.int64) - 1
    if rule == "floor":
        unbiased = log2_floor - 2
    elif rule == "even":
        rounded = np.floor(significand * 2 + 0.5) / 2  # 1, 1.5 or 2
        unbiased = log2_floor + (rounded == 2) - 2
    elif rule == "ceil":
        candidates = log2_floor[..., None] + np.arange(-5, 2)
        fits = finite[..., None] <= np.ldexp(6.0, candidates)
        first = np.argmax(fits, axis=-1)[..., None]
        unbiased = np.take_along_axis(candidates, first, axis=-1)[..., 0]
    else:
        raise ValueError(f"oracle.scale_exponent: no rule {rule}")
    biased = np.maximum(unbiased + 127, 0)
    biased = np.where(amax == 0, 0, biased)
    return np.where(np.isfinite(amax), biased, NAN_SCALE).astype(np.uint8)


def _as_integers(x) -> np.ndarray:
    """x * 2**149 as Python integers: exact for float32, and for an E2M1 value times a scale."""
    return np.vectorize(int, otypes=[object])(np.ldexp(_float64(x), 149))


def squared_error(blocks, values) -> np.ndarray:
    """Exact sums of (values - blocks)**2 over the last dimension, as Python integers * 2**-298."""
    difference = _as_integers(values) - _as_integers(blocks)
    return (difference * difference).sum(-1)


def round_block(blocks, scales) -> np.ndarray:
    """Exact values, float64 [..., 32], of blocks [..., 32] rounded to E2M1 under scales [...]."""
    exponent = np.asarray(scales, dtype=np.int64)[..., None] - 127
    return np.ldexp(E2M1_VALUES[encode_e2m1(np.ldexp(_float64(blocks), -exponent))], exponent)


def quantize(x, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantize [..., K] as float32: packed codes uint8 [..., K/2], scales uint8 [..., K/32].

    mse: of the floor exponent and the next one, the one of least squared error; ties to floor.
    Codes under a scale of 255 mean nothing.
    """
    x = _float64(torch.as_tensor(x).float())
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    amax = np.abs(blocks).max(-1)
    if rule == "mse":
        scales = scale_exponent(amax, "floor")
        finite = scales != NAN_SCALE
        above = scales + finite.astype(np.uint8)
        known = np.where(finite[..., None], blocks, 0.0)
        error = squared_error(known, round_block(known, scales))
        better = squared_error(known, round_block(known, above)) < error
        scales = np.where(better.astype(bool), above, scales)
    else:
        scales = scale_exponent(amax, rule)
    codes = encode_e2m1(np.ldexp(blocks, 127 - scales.astype(np.int64)[..., None]))
    return pack(codes.reshape(x.shape)), scales


def dequantize(packed, scales) -> np.ndarray:
    """Exact values, float64 [..., K], of packed codes [..., K/2] and scales [..., K/32]."""
    values = E2M1_VALUES[unpack(packed)]
    return values * np.repeat(decode_e8m0(scales), BLOCK, axis=-1)


def swizzle(scales) -> np.ndarray:
    """The scale layout of block-scaled tensor cores, written byte after byte; padding is 0.

    Tiles of 128 rows x 4 blocks run along K first. A tile is 32 lines of 16 bytes; line i holds the
    four blocks of row i, then those of rows i + 32, i + 64 and i + 96.
    """
    scales = np.asarray(scales, dtype=np.uint8)
    rows, blocks = scales.shape
    out = []
    for first_row in range(0, rows, 128):
        for first_block in range(0, blocks, 4):
            for line in range(32):
                for row in range(first_row + line, first_row + 128, 32):
                    for block in range(first_block, first_block + 4):
                        inside = row < rows and block < blocks
                        out.append(scales[row, block] if inside else 0)
    return np.array(out, dtype=np.uint8)


def gemm(a_packed, a_scales, b_packed, b_scales, bias=None) -> np.ndarray:
    """a [M, K] times b [N, K] transposed, plus bias [N]: float64 [M, N], correctly rounded.

    A block's 32 products are multiples of 1/4 and sum exactly; so do their scales multiply; the sum
    over blocks (and the bias) rounds once, by math.fsum.
    """
    a, b = E2M1_VALUES[unpack(a_packed)], E2M1_VALUES[unpack(b_packed)]
    m, n, blocks = a.shape[0], b.shape[0], a.shape[1] // BLOCK
    dots = np.einsum(
        "mbk,nbk->mnb", a.reshape(m, blocks, BLOCK), b.reshape(n, blocks, BLOCK), optimize=True
    )
    terms = dots * decode_e8m0(a_scales)[:, None, :] * decode_e8m0(b_scales)[None, :, :]
    offsets = np.zeros(n) if bias is None else _float64(bias)
    out = np.empty((m, n))
    for i in range(m):
        for j in range(n):
            out[i, j] = math.fsum((*terms[i, j], offsets[j]))
    return out


def round_to_float32(value: Fraction) -> Fraction | float:
    """The float32 nearest to an exact value, ties to even; an infinity beyond the largest."""
    if value == 0:
        return Fraction(0)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent  # 2**exponent <= size < 2**(exponent + 1)
    unit = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(value / unit) * unit  # of halves, Python takes the even one
    return rounded if abs(rounded) < 2**128 else math.copysign(math.inf, rounded)


def gemm_in_order(a_packed, a_scales, b_packed, b_scales, segment: int = 16) -> np.ndarray:
    """a [M, K] times b [N, K] transposed as kernels add it up: float32 [M, N] in float64.

    Of each segment of 16 blocks a sum, and of those the total: in order, exact terms, each addition
    rounded to float32. Scales below 255; fractions throughout, so for few values.
    """
    a, b = E2M1_VALUES[unpack(a_packed)], E2M1_VALUES[unpack(b_packed)]
    m, n, blocks = a.shape[0], b.shape[0], a.shape[1] // BLOCK
    dots = np.einsum("mbk,nbk->mnb", a.reshape(m, blocks, BLOCK), b.reshape(n, blocks, BLOCK))
    out = np.zeros((m, n))
    for i, j in np.ndindex(m, n):
        total = Fraction(0)
        for start in range(0, blocks, segment):
            part = Fraction(0)
            for block in range(start, min(start + segment, blocks)):
                exponent = int(a_scales[i, block]) + int(b_scales[j, block]) - 254
                part = _added(part, Fraction(dots[i, j, block]) * Fraction(2) ** exponent)
            total = _added(total, part)
        out[i, j] = float(total)
    return out


def _added(x: Fraction | float, y: Fraction | float) -> Fraction | float:
    finite = isinstance(x, Fraction) and isinstance(y, Fraction)
    return round_to_float32(x + y) if finite else float(x) + float(y)


def assert_same(actual, expected, what: str) -> None:
    """Fail unless both have the same shape and the same bits (any NaN equals any NaN).

    The message has what was compared, the mismatch count, the first index and both values. Either
    side is an array or a tensor of any dtype; the expected side is cast to the actual dtype.
    """
    __tracebackhide__ = True
    actual = torch.as_tensor(actual).detach().cpu()
    expected = torch.as_tensor(expected).detach().cpu().to(actual.dtype)
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    different = actual != expected
    if actual.is_floating_point():
        different |= torch.signbit(actual) != torch.signbit(expected)
        different &= ~(actual.isnan() & expected.isnan())
    if different.any():
        index = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} differ, first at {index}: "
            f"got {actual[index].item()!r}, expected {expected[index].item()!r}"
        )
