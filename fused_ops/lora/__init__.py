"""The multi-LoRA linear: its operators as plain torch (reference.py) and by kernels (fused.py), under the same names."""
