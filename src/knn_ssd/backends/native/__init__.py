"""Llama-like decoders on the CPU: a whole forward pass in one call of the C kernels."""
