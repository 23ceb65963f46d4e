"""AdamW over a stage's flat arena, for all jobs that step, in one launch (torch.optim.AdamW's formulas, decoupled decay).

    g = clip * grad        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    p = p (1 - lr * decay) - lr / (1 - b1^n) * m / (sqrt(v) / sqrt(1 - b2^n) + eps)          n = the job's count of applied steps

`chunks` lists (first element, number of elements, row of `settings`) of at most CHUNK elements; `settings` has one row of ten
floats per job (see `setting_row`). A row whose apply flag is zero is skipped: its elements keep their bits.
Master weights, gradients and both moments are float32. The compute copy is rewritten from the new master. The gradient of every
listed element is set to zero, also where the job is skipped (a skipped step still ends).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fused_ops.launch.optional_triton import constants, tl, triton

CHUNK = 4096
_WIDTH = 10
CHUNK_FIELDS, SETTINGS = constants(3, _WIDTH)


def make_chunks(ranges: Iterable[tuple[int, int, int]]) -> Tensor:
    """Cut (first element, number of elements, settings row) ranges of the arena into chunks: int64 [n, 3] on the host."""
    first, length, job = torch.tensor(list(ranges), dtype=torch.int64).view(-1, 3).unbind(1)
    counts = -(-length // CHUNK)
    which = torch.repeat_interleave(counts)
    offset = (torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]) * CHUNK
    return torch.stack([first[which] + offset, (length[which] - offset).clamp(max=CHUNK), job[which]], 1)


def adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, compute: Tensor, chunks: Tensor, settings: Tensor,
    backend: str | None = None,
) -> None:  # fmt: skip
    """Apply one AdamW step in place to the listed chunks and zero their gradients.

    All but `compute` are float32 and flat; chunks int64 [n, 3] and settings float32 [jobs, 10] on the arena's device.
    """
    _check(master, grad, exp_avg, exp_avg_sq, compute, chunks, settings)
    if (backend or ("triton" if master.is_cuda else "reference")) == "reference":
        adamw_reference_(master, grad, exp_avg, exp_avg_sq, compute, chunks, settings)
    elif len(chunks):
        _adamw_kernel[(len(chunks),)](master, grad, exp_avg, exp_avg_sq, compute, chunks, settings, BLOCK=1024, num_warps=4)


def adamw_reference_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, compute: Tensor, chunks: Tensor, settings: Tensor
) -> None:
    """Apply the step chunk by chunk in plain torch: the twin of the kernel, and the CPU path."""
    for first, length, job in chunks.tolist():
        step_size, beta1, beta2, epsilon, decay, clip, correction2_root, apply, one_minus_beta1, one_minus_beta2 = settings[job].tolist()
        at = slice(first, first + length)
        if apply:
            g = grad[at] * clip
            exp_avg[at].mul_(beta1).add_(g, alpha=one_minus_beta1)
            exp_avg_sq[at].mul_(beta2).addcmul_(g, g, value=one_minus_beta2)
            master[at].mul_(decay).addcdiv_(exp_avg[at], (exp_avg_sq[at].sqrt() / correction2_root).add_(epsilon), value=-step_size)
            compute[at].copy_(master[at])
        grad[at] = 0.0


@triton.jit
def _load_row(row_ptr, NUM: tl.constexpr):
    values = ()
    for i in tl.static_range(NUM):
        values += (tl.load(row_ptr + i),)
    return values


@triton.jit
def _adamw_kernel(master_ptr, grad_ptr, avg_ptr, sq_ptr, compute_ptr, chunks_ptr, settings_ptr, BLOCK: tl.constexpr):
    i_chunk = tl.program_id(0)
    first, length, job = _load_row(chunks_ptr + i_chunk * CHUNK_FIELDS, CHUNK_FIELDS)
    row = _load_row(settings_ptr + job * SETTINGS, SETTINGS)
    step_size, beta1, beta2, epsilon, decay, clip, correction2_root, apply, one_minus_beta1, one_minus_beta2 = row
    for start in range(0, length, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m_in = o < length
        o = first + o
        if apply != 0.0:
            g = tl.load(grad_ptr + o, m_in, 0.0) * clip
            avg = tl.load(avg_ptr + o, m_in, 0.0) * beta1 + g * one_minus_beta1
            sq = tl.load(sq_ptr + o, m_in, 0.0) * beta2 + g * g * one_minus_beta2
            p = tl.load(master_ptr + o, m_in, 0.0) * decay - step_size * (avg / (tl.sqrt(sq) / correction2_root + epsilon))
            tl.store(avg_ptr + o, avg, m_in)
            tl.store(sq_ptr + o, sq, m_in)
            tl.store(master_ptr + o, p, m_in)
            tl.store(compute_ptr + o, p.to(compute_ptr.dtype.element_ty), m_in)
        tl.store(grad_ptr + o, tl.zeros([BLOCK], tl.float32), m_in)


def _check(master, grad, exp_avg, exp_avg_sq, compute, chunks, settings) -> None:
    for name, value in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("compute", compute)):
        if value.shape != master.shape or (name != "compute" and value.dtype != torch.float32) or not value.is_contiguous():
            raise ValueError(
                f"{name} is {value.dtype} {list(value.shape)}; the master weights are {list(master.shape)} (float32, contiguous)"
            )
    if chunks.dtype != torch.int64 or chunks.dim() != 2 or chunks.shape[1] != 3 or not chunks.is_contiguous():
        raise ValueError(f"chunks must be contiguous int64 [n, 3], not {chunks.dtype} {list(chunks.shape)}")
    if settings.dtype != torch.float32 or settings.dim() != 2 or settings.shape[1] != _WIDTH or not settings.is_contiguous():
        raise ValueError(f"settings must be contiguous float32 [jobs, {_WIDTH}], not {settings.dtype} {list(settings.shape)}")
