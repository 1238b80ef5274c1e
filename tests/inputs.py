"""Seeded inputs for the tests: each function names the trouble that its values make.

Shapes are (rows, K). Every function takes a seed and builds its own generator, so that a failure is
reproduced by the arguments in its message.
"""

import math

import torch
from torch import Tensor

AWKWARD_ROWS = (0, 1, 31, 127, 128, 129, 1000)
AWKWARD_K = (32, 96, 160, 4096)
# (N, K) of the linears of LLaMA-3-8B: q and o, k and v, gate and up, down.
LLAMA_LINEARS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_bfloat16() -> Tensor:
    """Every bfloat16 once, in the order of its bits: bfloat16 [65536]."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def neighbours(values: Tensor, ulps: int) -> Tensor:
    """Each value and the float32 numbers up to `ulps` steps around it: [n, 2 * ulps + 1]."""
    bits = values.float().view(torch.int32)[:, None] + torch.arange(-ulps, ulps + 1).int()
    return bits.view(torch.float32)


def gaussian(rows: int, k: int, seed: int) -> Tensor:
    return torch.randn(rows, k, generator=generator(seed))


def outliers(rows: int, k: int, seed: int) -> Tensor:
    """Gaussian with one channel in 32 a hundred times larger, as in LLaMA activations."""
    x = gaussian(rows, k, seed)
    channels = torch.randperm(k, generator=generator(seed + 1))[: math.ceil(k / 32)]
    x[:, channels] *= 100
    return x


def small_integers(rows: int, k: int, seed: int, limit: int = 8) -> Tensor:
    """Integers in [-limit, limit]: sums and products of a few thousand are exact in float32."""
    return torch.randint(-limit, limit + 1, (rows, k), generator=generator(seed)).float()


def all_magnitudes(rows: int, k: int, seed: int) -> Tensor:
    """Finite float32 with uniformly random bits: every exponent, subnormals and both zeros."""
    bits = torch.randint(-(2**31), 2**31, (rows, k), generator=generator(seed)).int()
    x = bits.view(torch.float32)
    return torch.where(x.isfinite(), x, torch.zeros(()))


def subnormals(rows: int, k: int, seed: int) -> Tensor:
    """Float32 subnormals of both signs, down to the least (2**-149) and to zero."""
    size = torch.randint(0, 24, (rows, k), generator=generator(seed)).int()
    magnitude = torch.randint(0, 2**23, (rows, k), generator=generator(seed + 1)).int() >> size
    sign = torch.randint(0, 2, (rows, k), generator=generator(seed + 2)).int() << 31
    return (magnitude | sign).view(torch.float32)


def grid_and_ties(rows: int, k: int, seed: int, exponents: tuple[int, int] = (-20, 20)) -> Tensor:
    """E2M1 values and the midpoints between them, each block of 32 times its own power of two."""
    candidates = torch.tensor(E2M1_MAGNITUDES + E2M1_TIES)
    choice = torch.randint(0, len(candidates), (rows, k), generator=generator(seed))
    sign = torch.randint(0, 2, (rows, k), generator=generator(seed + 1)) * 2 - 1
    power = torch.randint(*exponents, (rows, k // 32), generator=generator(seed + 2))
    return candidates[choice] * sign * torch.exp2(power.float()).repeat_interleave(32, dim=-1)


def zero_blocks(rows: int, k: int, seed: int) -> Tensor:
    """Gaussian in which about half of the blocks of 32 are all zero."""
    keep = torch.randint(0, 2, (rows, k // 32), generator=generator(seed + 1))
    return gaussian(rows, k, seed) * keep.repeat_interleave(32, dim=-1)


def nonfinite(rows: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian with NaN, inf or -inf planted: (x, poisoned bool [rows, K/32]).

    About a third of the blocks is poisoned, each in one random place.
    """
    x = gaussian(rows, k, seed)
    poisoned = torch.rand(rows, k // 32, generator=generator(seed + 1)) < 1 / 3
    place = torch.randint(0, 32, (rows, k // 32), generator=generator(seed + 2))
    kinds = torch.tensor([math.nan, math.inf, -math.inf])
    kind = kinds[torch.randint(0, 3, (rows, k // 32), generator=generator(seed + 3))]
    blocks = x.view(rows, k // 32, 32)
    hit = poisoned[..., None] & (torch.arange(32) == place[..., None])
    return torch.where(hit, kind[..., None], blocks).view(rows, k), poisoned


def mxfp4_operand(rows: int, k: int, seed: int, spread: int = 1) -> tuple[Tensor, Tensor]:
    """Random operand of a GEMM: packed codes uint8 [rows, K/2] and scales uint8 [rows, K/32].

    All 256 code bytes occur; scale bytes lie in [127 - spread, 127]. Products of two codes are
    multiples of 1/4 and at most 36, so a sum over K = 14336 takes 21 of float32's 24 bits: while
    the spreads of both operands add up to 3 or less, every partial sum in any order is exact.
    """
    codes = torch.randint(0, 256, (rows, k // 2), generator=generator(seed)).to(torch.uint8)
    scales = torch.randint(127 - spread, 128, (rows, k // 32), generator=generator(seed + 1))
    return codes, scales.to(torch.uint8)


def mse_ties(rows: int, seed: int) -> Tensor:
    """Blocks [rows, 32] whose squared error is exactly the same under floor and the exponent above.

    7.5 is off by 1.5 (6) or by 0.5 (8); eight times 0.5 are off by nothing or by 0.5 each; what is
    below 0.25 becomes zero either way. 1.5**2 + 0 = 0.5**2 + 8 * 0.5**2, but the small values make
    sums of squares round, differently in each order. Places, signs and powers of two are random.
    """
    small = (torch.rand(rows, 23, generator=generator(seed)) - 0.5) * 2.0**-24
    large = torch.tensor([7.5] + 8 * [0.5]).expand(rows, 9)
    order = torch.rand(rows, 32, generator=generator(seed + 1)).argsort(-1)
    sign = torch.randint(0, 2, (rows, 32), generator=generator(seed + 2)) * 2 - 1
    power = torch.randint(-60, 60, (rows, 1), generator=generator(seed + 3))
    return torch.cat((large, small), dim=-1).gather(-1, order) * sign * torch.exp2(power.float())
