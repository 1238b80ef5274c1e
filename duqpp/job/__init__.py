"""A quantization from start to end: the loop over decoder blocks, its folder, resuming."""
