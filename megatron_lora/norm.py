"""RMS normalisation for Megatron's norm slots: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension, statistics in fp32.

Works on shards of rows as on all of them; the weight is frozen, so sequence parallelism needs no gradient reduction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """One frozen weight [hidden_size]; built as Megatron builds norms."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
