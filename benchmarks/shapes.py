"""The models whose shapes are measured, and the bytes that their products move."""

from dataclasses import dataclass

HEAD_DIM = 128
POWERS = tuple(2**i for i in range(15))  # M from 1 to 16384


@dataclass(frozen=True)
class Model:
    """Widths of a decoder layer of the LLaMA family, heads of HEAD_DIM."""

    title: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(K, N) of x [M, K] and a weight [N, K]; linears that read one input are one product."""
        attention = self.heads * HEAD_DIM
        return {
            "qkv": (self.hidden, attention + 2 * self.kv_heads * HEAD_DIM),
            "o": (attention, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }


MODELS = {
    "8b": Model("LLaMA-3 8B", 4096, 14336, 32, 8),
    "70b": Model("LLaMA-3 70B", 8192, 28672, 64, 8),
    "tiny": Model("tiny", 256, 352, 2, 1),  # for tests of the benchmarks
}


def mxfp4_bytes(n: int, k: int) -> int:
    """Of a tensor [N, K]: 4 bits a value and a scale byte for each 32."""
    return n * k // 2 + n * k // 32
