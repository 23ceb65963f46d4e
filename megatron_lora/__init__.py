"""Train many LoRA adapters at once over one frozen base model, on Megatron's tensor and pipeline parallel layers."""

import logging
import warnings

# megatron-core warns at import of each optional package it does not find; `megatron-lora doctor` says what is missing and what it costs.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# So does torch of a CUDA toolkit on a machine without a GPU, when megatron-core imports its extension builder.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

__version__ = "0.1.0"
