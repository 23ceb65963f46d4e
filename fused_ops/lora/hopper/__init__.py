"""Kernels of the multi-LoRA linear in Gluon, for Hopper, and what they share."""
