"""Kernels of the multi-LoRA linear in plain Triton: for every GPU, and where those for Hopper do not serve."""
