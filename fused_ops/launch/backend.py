"""Which twin of an operator runs: the Triton kernels on CUDA, plain torch elsewhere. Nothing else decides it."""

import torch


def backend_name(device: torch.device, backend: str | None = None) -> str:
    """Return "triton" for a CUDA device and "reference" for any other, unless `backend` names one of the two (else ValueError)."""
    name = backend or ("triton" if device.type == "cuda" else "reference")
    if name not in ("reference", "triton"):
        raise ValueError(f"backend {name!r} is neither 'reference' nor 'triton'")
    return name


def gradients(function, inputs: tuple[torch.Tensor, ...], upstream: tuple[torch.Tensor | None, ...]):
    """Return (outputs, gradients of `inputs`) of a plain-torch twin, recomputed and differentiated: the backward of references.

    `upstream` has the gradient of each output, None where it has none.
    """
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        outputs = function(*leaves)
    used = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if dy is not None]
    grads = torch.autograd.grad([y for y, _ in used], leaves, [dy for _, dy in used])
    return tuple(y.detach() for y in outputs), grads
