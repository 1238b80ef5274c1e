"""The format against implementations by other hands: ml_dtypes, torch, torchao, compressed-tensors.

`make test` installs torchao and compressed-tensors into a folder of their own and names it in
DUQPP_CROSSCHECK; without the variable their tests are skipped. Where such a package departs from
the definition on purpose or by rounding, the comment says how, and only those inputs are left out.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

from duqpp.format.e2m1 import decode_e2m1, encode_e2m1, pack_e2m1, unpack_e2m1
from duqpp.format.e8m0 import ScaleRule, decode_e8m0, scale_exponent
from duqpp.format.mxfp4 import dequantize, quantize
from duqpp.format.scale_layout import swizzle_scales, unswizzle_scales
from tests import inputs, oracle

ALL_CODES = torch.arange(16, dtype=torch.uint8)
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def encode_domain() -> torch.Tensor:
    """Every bfloat16 and the float32 numbers around ties and grid values, both signs, no NaN."""
    points = torch.tensor(inputs.E2M1_TIES + inputs.E2M1_MAGNITUDES[1:])
    near = inputs.neighbours(torch.cat((points, -points)), 50).flatten()
    x = torch.cat((inputs.all_bfloat16().float(), near))
    return x[~x.isnan()]


def test_ml_dtypes_float4_encode():
    x = encode_domain()
    codes = x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    oracle.assert_same(encode_e2m1(x), codes, "encode_e2m1 against float4_e2m1fn")


def test_ml_dtypes_float4_decode():
    values = ALL_CODES.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    oracle.assert_same(decode_e2m1(ALL_CODES), values, "decode_e2m1 against float4_e2m1fn")


def test_ml_dtypes_float8_decode():
    values = ALL_BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    oracle.assert_same(decode_e8m0(ALL_BYTES), values, "decode_e8m0 against float8_e8m0fnu")


def test_torch_float8_decode():
    values = ALL_BYTES.view(torch.float8_e8m0fnu).float()
    oracle.assert_same(decode_e8m0(ALL_BYTES), values, "decode_e8m0 against torch's e8m0fnu")


@pytest.fixture(scope="module")
def aside() -> Iterator[None]:
    """The folder named by DUQPP_CROSSCHECK at the end of sys.path, so that it shadows nothing."""
    folder = os.environ.get("DUQPP_CROSSCHECK")
    if not folder:
        pytest.skip("DUQPP_CROSSCHECK names no folder with torchao and compressed-tensors")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both warn about deprecations of their own while importing
        patch.setattr(sys, "path", [*sys.path, folder])
        yield


@pytest.fixture(scope="module")
def torchao(aside: None) -> SimpleNamespace:
    from torchao.prototype.mx_formats import kernels, mx_tensor, utils
    from torchao.prototype.mx_formats.config import ScaleCalculationMode

    return SimpleNamespace(
        kernels=kernels,
        mx=mx_tensor,
        utils=utils,
        modes={
            ScaleRule.FLOOR: ScaleCalculationMode.FLOOR,
            ScaleRule.EVEN: ScaleCalculationMode.EVEN,
            ScaleRule.CEIL: ScaleCalculationMode.RCEIL,
        },
    )


@pytest.fixture(scope="module")
def compressed_tensors(aside: None) -> SimpleNamespace:
    from compressed_tensors.compressors import mx_utils
    from compressed_tensors.compressors.nvfp4 import helpers
    from compressed_tensors.quantization.utils import mxfp_utils

    return SimpleNamespace(
        pack=helpers.pack_fp4_to_uint8,
        unpack=helpers.unpack_fp4_from_uint8,
        quantize_and_pack=helpers.quantize_and_pack_fp4,
        generate_scales=mxfp_utils.generate_mx_scales,
        decompress_scale=mx_utils.decompress_mx_scale,
    )


AMAX_RULES = [ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.CEIL]
MX_INPUTS = {
    "gaussian": inputs.gaussian(64, 160, 0),
    "outliers": inputs.outliers(64, 160, 0),
    "small integers": inputs.small_integers(64, 160, 0),
    "grid and ties": inputs.grid_and_ties(64, 160, 0),
    "zero blocks": inputs.zero_blocks(64, 160, 0),
    "all magnitudes": inputs.all_magnitudes(64, 160, 0),
    "subnormals": inputs.subnormals(64, 160, 0),
    "bfloat16": inputs.all_bfloat16().view(2048, 32).float(),
    "non-finite": inputs.nonfinite(64, 160, 0)[0],
}


def to_mx(torchao: SimpleNamespace, x: torch.Tensor, rule: ScaleRule):
    return torchao.mx.to_mx(x.contiguous(), torch.float4_e2m1fn_x2, 32, torchao.modes[rule])


@pytest.mark.crosscheck
@pytest.mark.parametrize("rule", AMAX_RULES)
@pytest.mark.parametrize("name", MX_INPUTS)
def test_torchao_to_mx(torchao, name, rule):
    x = MX_INPUTS[name]
    scales, codes = to_mx(torchao, x, rule)
    quantized = quantize(x, rule=rule)
    amax = x.unflatten(-1, (-1, 32)).abs().amax(-1)
    # torchao gives a block with an infinity a finite scale (253, or 254 under RCEIL).
    same_scale = ~amax.isinf()
    # RCEIL takes ceil(log2(amax / 6)) in float32: where amax is a few ulp above 6 * 2**k, log2
    # rounds down to k. Its quotient is a subnormal below 6 * 2**-126, and may round as well.
    if rule is ScaleRule.CEIL:
        quotient = amax.double() / 6
        steps = torch.log2(quotient)
        same_scale &= ((steps - steps.round()).abs() > 2.0**-17) | (steps == steps.round())
        same_scale &= (quotient >= 2.0**-126) | (amax == 0)
    zero = torch.zeros((), dtype=torch.uint8)
    oracle.assert_same(
        torch.where(same_scale, quantized.scales, zero),
        torch.where(same_scale, scales.view(torch.uint8), zero),
        "scales",
    )
    # Under byte 0 torchao divides by 2**-126 (FLOOR, EVEN) or by 1 (RCEIL) and not by 2**-127,
    # which differs unless all is zero. Codes under a NaN scale mean nothing.
    same_codes = same_scale & ((quantized.scales != 0) | (amax == 0)) & (quantized.scales != 255)
    keep = same_codes.repeat_interleave(16, dim=-1)
    assert name == "subnormals" or keep.float().mean() > 0.6  # what is left out is the exception
    oracle.assert_same(
        torch.where(keep, quantized.codes, zero), torch.where(keep, codes, zero), "codes"
    )


@pytest.mark.crosscheck
@pytest.mark.parametrize("rule", AMAX_RULES)
def test_torchao_scales_of_every_bfloat16_amax_and_around_thresholds(torchao, rule):
    amax = inputs.all_bfloat16()[:32640].float()  # finite
    if rule is ScaleRule.CEIL:
        amax = amax[(amax == 0) | (amax >= 6 * 2.0**-126)]  # see above, as for the thresholds
    else:
        powers = torch.exp2(torch.arange(-126, 127))
        thresholds = torch.cat((powers, powers * 1.5, powers * 1.75))
        amax = torch.cat((amax, inputs.neighbours(thresholds, 2).flatten()))
    x = torch.zeros(len(amax), 32)
    x[:, 5] = amax
    scales, _ = to_mx(torchao, x, rule)
    oracle.assert_same(scale_exponent(amax, rule), scales.view(torch.uint8).flatten(), f"{rule}")


@pytest.mark.crosscheck
def test_torchao_encodes_and_packs(torchao):
    x = encode_domain()
    codes = encode_e2m1(x)
    oracle.assert_same(codes, torchao.kernels.f32_to_f4_unpacked(x), "encode_e2m1")
    codes = codes[: codes.numel() // 64 * 64].view(-1, 64)
    oracle.assert_same(pack_e2m1(codes), torchao.kernels.pack_uint4(codes), "pack_e2m1")


@pytest.mark.crosscheck
@pytest.mark.parametrize("rule", AMAX_RULES)
def test_torchao_reads_our_tensors(torchao, rule):
    x = inputs.outliers(64, 160, seed=1)
    quantized = quantize(x, rule=rule)
    values = torchao.mx.to_dtype(
        quantized.codes,
        quantized.scales.view(torch.float8_e8m0fnu),
        torch.float4_e2m1fn_x2,
        32,
        torch.float32,
    )
    oracle.assert_same(dequantize(quantized), values, "dequantize")


@pytest.mark.crosscheck
@pytest.mark.parametrize("rows", [1, 31, 128, 129, 1000])
@pytest.mark.parametrize("blocks", [1, 4, 5, 128])
def test_torchao_swizzles_scales(torchao, rows, blocks):
    scales = torch.randint(1, 256, (rows, blocks), generator=inputs.generator(rows)).byte()
    blocked = torchao.utils.to_blocked(scales)
    oracle.assert_same(swizzle_scales(scales), blocked, f"swizzle_scales {rows} x {blocks}")
    restored = unswizzle_scales(blocked, rows, blocks)
    oracle.assert_same(restored, torchao.utils.from_blocked(blocked, rows, blocks), "unswizzle")


@pytest.mark.crosscheck
def test_compressed_tensors_packs_and_unpacks(compressed_tensors):
    packed = torch.cat((ALL_BYTES, ALL_BYTES.flip(0))).view(16, 32)
    values = decode_e2m1(unpack_e2m1(packed))
    unpacked = compressed_tensors.unpack(packed, 16, 64, torch.float32)
    oracle.assert_same(values, unpacked, "decode_e2m1(unpack_e2m1(bytes))")
    oracle.assert_same(compressed_tensors.pack(values), packed, "their packing of our values")


@pytest.mark.crosscheck
def test_compressed_tensors_scales(compressed_tensors):
    # Its rule is `even`. It neither clamps at 0 nor knows amax 0, and takes log2 of a power of two
    # in float32, so normal results only: from 2**-124.
    amax = inputs.all_bfloat16()[:32640].float()
    amax = amax[amax >= 2.0**-124]
    scales = compressed_tensors.generate_scales(amax)
    finite = scales.isfinite()  # amax from 1.75 * 2**127 rounds to infinity there
    assert (~finite == (amax >= 1.75 * 2.0**127)).all()
    oracle.assert_same(
        scale_exponent(amax, ScaleRule.EVEN)[finite], scales[finite], "scale_exponent even"
    )
    # Byte 255 is infinity there. bfloat16, in which it decodes, holds all the other powers of two.
    scales = ALL_BYTES[:255]
    oracle.assert_same(
        decode_e8m0(scales), compressed_tensors.decompress_scale(scales).float(), "decode_e8m0"
    )


@pytest.mark.crosscheck
@pytest.mark.parametrize("name", ["gaussian", "outliers", "small integers", "grid and ties"])
def test_compressed_tensors_codes(compressed_tensors, name):
    x = MX_INPUTS[name] + 0.0  # without -0.0, whose sign it drops (that of -0.1 it keeps)
    quantized = quantize(x, rule=ScaleRule.EVEN)
    scale = decode_e8m0(quantized.scales)
    packed = compressed_tensors.quantize_and_pack(x, scale, group_size=32)
    oracle.assert_same(quantized.codes, packed, "codes under even scales")
