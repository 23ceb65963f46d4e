"""What `deterministic: true` asks of torch and NCCL while a run trains, so that one plan gives the same bits again.

    flash attention     the order in which dQ is summed: torch takes it from use_deterministic_algorithms (cuDNN's attention, which a run
                        takes otherwise, has a fixed order only in plans for exact lengths)
    cuBLAS              workspaces of a fixed size for each stream (CUBLAS_WORKSPACE_CONFIG, without which torch refuses its products)
    NCCL                no sums in the switch, whose order is not documented
    torch's operators   the variant with a fixed order, or an error that names the operator where there is none

This project's kernels sum in a fixed order in any case, are cut by shapes alone, and draw dropout from counters. New tensors are not
filled, which torch would do for operators that read what they have not written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_lora.errors import UserError

CUBLAS, FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
_torchs: Any = torch.utils.deterministic  # a module with properties, which type checkers do not see
SETTINGS = {CUBLAS: FIXED[0], "NCCL_NVLS_ENABLE": "0"}


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Have what runs inside give the same bits again, if `wanted`; enter it before the first process group and GPU tensor are made."""
    if not wanted:
        yield
        return
    if os.environ.get(CUBLAS, FIXED[0]) not in FIXED:
        raise UserError(f"{CUBLAS}: {os.environ[CUBLAS]!r} does not fix cuBLAS's order of sums, as deterministic: true asks; unset it")
    before = torch.are_deterministic_algorithms_enabled(), _torchs.fill_uninitialized_memory
    unset = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(unset)
    torch.use_deterministic_algorithms(True)
    _torchs.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        _torchs.fill_uninitialized_memory = before[1]
        for name in unset:
            del os.environ[name]
