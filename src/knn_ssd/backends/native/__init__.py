"""Llama-like decoders on the processor: a whole forward pass in one call of the C kernels."""
