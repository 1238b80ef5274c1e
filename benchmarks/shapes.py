"""The linears that benchmarks multiply: (name, K, N) of x [M, K] and a weight [N, K]."""

# LLaMA-3 8B; qkv and gate_up are read by one input each, so that they are one product.
LLAMA_3_8B = (
    ("qkv", 4096, 6144),
    ("o", 4096, 4096),
    ("gate_up", 4096, 28672),
    ("down", 14336, 4096),
)
ROWS = (1, 4, 16, 64, 512, 2048)


def mxfp4_bytes(n: int, k: int) -> int:
    """Of a weight [N, K]: 4 bits a value and a scale byte for each 32."""
    return n * k // 2 + n * k // 32
