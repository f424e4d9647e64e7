"""The C kernels: sources in `csrc/`, their build for this processor, and their Python binding."""
