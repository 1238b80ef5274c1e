"""How a decoder block is quantized, method by method."""
