"""Train many LoRA adapters at once over one frozen base model, on Megatron's tensor and pipeline parallel layers."""

import logging
import warnings

# megatron-core warns at import of each optional package that is missing; `megatron-lora doctor` says which, and what that costs.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# torch warns of a missing CUDA toolkit, on machines without a GPU, when megatron-core imports its extension builder.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

__version__ = "0.1.0"
