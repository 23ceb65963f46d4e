"""RMS normalisation in place of Megatron's norms: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (fused_ops).

Every row is normalised alone, and the weight is frozen, so sequence parallelism needs no communication.
"""

import torch
from torch import Tensor

from fused_ops.elementwise.rms_norm import rms_norm
from fused_ops.lora.fp8 import Rounded
from fused_ops.lora.refill import Refill


class RMSNorm(torch.nn.Module):
    """A norm with a frozen weight [hidden_size]; its arguments are those of Megatron's norms."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        dtype = torch.float32 if config.architecture.family.zero_centred else config.params_dtype  # 1 + w has more digits than w
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return self.add(x)[0]

    def add(
        self, x: Tensor, residual: Tensor | None = None, refill: Refill | None = None, rounded: Rounded | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the normalised sum x + residual, and the sum itself, the new residual.

        With `refill`, backward recomputes the former; with `rounded` it is also given to a linear in 8 bits.
        """
        return rms_norm(x, self.weight, self.eps, residual, refill, rounded=rounded)
