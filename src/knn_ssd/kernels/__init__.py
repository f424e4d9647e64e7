"""The C kernels: sources in `csrc/`, compiled once for this processor, and their binding."""
