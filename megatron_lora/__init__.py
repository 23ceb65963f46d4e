"""Train many LoRA adapters at once over one frozen base model, on Megatron's tensor and pipeline parallel layers."""

__version__ = "0.1.0"
