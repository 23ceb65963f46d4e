"""Fused multi-LoRA operators: Triton kernels and the plain torch references that define them. Imports torch, triton and numpy only."""
