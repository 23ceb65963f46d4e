"""A builder of small multi-LoRA problems: an arena, a route and the tensors of one linear."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_ops.lora import reference
from fused_ops.lora.adapters import AdapterTable, LoraGroup, padded_rank
from fused_ops.lora.dropout import row_keys
from fused_ops.lora.route import Route, make_route


@dataclass
class Problem:
    x: torch.Tensor
    weight: torch.Tensor
    dy: torch.Tensor
    group: LoraGroup
    route: Route

    def zero_grads(self):
        self.group.grad_a_RK.zero_()
        for grad in self.group.grad_b_RN:
            grad.zero_()

    def steps(self, ops, weight=None):
        """Return what the operators `ops` make of a forward and a backward, by name."""
        weight = self.weight if weight is None else weight
        self.zero_grads()
        s = ops.down(self.x, self.group, self.route)
        y = ops.up(self.x, weight, None, s, self.group, self.route)
        ds = ops.grad_s_and_b(self.dy, s, self.group, self.route)
        dx = ops.grad_x(self.dy, weight, ds, self.group, self.route)
        ops.grad_a(self.x, ds, self.group, self.route, after_dx=True)
        grads = {f"db{m}": grad.clone() for m, grad in enumerate(self.group.grad_b_RN)}
        return {"y": y, "dx": dx, "da": self.group.grad_a_RK.clone(), **grads}

    def differentiable(self, x, bias=None):
        """Return Y as one expression that autograd differentiates in X, A and B: y = x W^T + c B (A (M * x) / (1 - p)), in x's dtype."""
        group, y = self.group, F.linear(x, self.weight, bias)
        for rows, adapter, module, _, a_rows, b_rows in reference._parts(group, self.route):
            start, stop = group.columns[module]
            dropped = reference._dropped(x[rows], group, self.route.row_keys[rows], adapter, module)
            part = (dropped * group.adapters.effective_scales[adapter] @ group.a_RK[a_rows].T) @ group.b_RN[module][b_rows]
            y = y + F.pad(part, (start, y.shape[1] - stop, rows.start, y.shape[0] - rows.stop))
        return y

    @property
    def grads(self):
        return (self.group.grad_a_RK, *self.group.grad_b_RN)


def build_problem(
    lengths,
    ranks,
    k=48,
    n=(40,),
    dropouts=None,
    scales=None,
    gaps=0,
    missing=(),
    dtype=torch.float32,
    device="cpu",
    seed=0,
    first_feature=0,
    adapter_order=None,
):
    """Make a Problem: `lengths` rows per adapter, `gaps` base-only rows before each segment, `missing` = (adapter, module) not targeted."""
    gen = torch.Generator().manual_seed(seed)
    num_adapters, num_modules = len(ranks), len(n)
    adapters = AdapterTable(
        ranks=tuple(ranks),
        scales=tuple(scales or [2.0 / (1 + i % 3) for i in range(num_adapters)]),
        dropouts=tuple(dropouts or [0.0] * num_adapters),
    )
    a_rows, b_rows, a_end, b_end = [], [], 0, [0] * num_modules
    for adapter, r in enumerate(ranks):
        a_row, b_row = [-1] * num_modules, [-1] * num_modules
        for m in range(num_modules):
            if (adapter, m) not in missing:
                a_row[m], b_row[m] = a_end, b_end[m]
                a_end += padded_rank(r)
                b_end[m] += padded_rank(r)
        a_rows.append(tuple(a_row))
        b_rows.append(tuple(b_row))
    a, b = torch.zeros(a_end, k), [torch.zeros(b_end[m], n[m]) for m in range(num_modules)]
    for adapter, r in enumerate(ranks):
        for m in range(num_modules):
            if a_rows[adapter][m] >= 0:
                a[a_rows[adapter][m] :][:r] = torch.randn(r, k, generator=gen) / k**0.5
                b[m][b_rows[adapter][m] :][:r] = torch.randn(r, n[m], generator=gen) / r**0.5
    starts = np.cumsum([0, *n])
    segments, keys, row = [], [], 0
    for adapter in adapter_order or range(num_adapters):
        keys.append(np.zeros(gaps, np.int32))
        segments.append((row + gaps, row + gaps + lengths[adapter], adapter))
        keys.append(row_keys(seed + adapter, adapter, 0, lengths[adapter]))
        row += gaps + lengths[adapter]
    to = {"dtype": dtype, "device": device}
    group = LoraGroup(
        a_RK=a.to(**to),
        b_RN=tuple(part.to(**to) for part in b),
        grad_a_RK=torch.zeros(a_end, k, device=device),
        grad_b_RN=tuple(torch.zeros_like(part).to(device) for part in b),
        columns=tuple((int(starts[m]), int(starts[m + 1])) for m in range(num_modules)),
        a_rows=tuple(a_rows),
        b_rows=tuple(b_rows),
        adapters=adapters,
        first_feature=first_feature,
    )
    return Problem(
        x=torch.randn(row, k, generator=gen).to(**to),
        weight=(torch.randn(sum(n), k, generator=gen) / k**0.5).to(**to),
        dy=torch.randn(row, sum(n), generator=gen).to(**to),
        group=group,
        route=make_route(row, segments, np.concatenate(keys), device),
    )


@pytest.fixture
def make_problem():
    return build_problem
