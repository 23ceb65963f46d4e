"""Megatron's column- and row-parallel linears with a frozen weight and the LoRA adapters of many jobs.

Both are megatron-core's own layers with another forward: `fused_ops.lora.linear.multi_lora_linear`
computes Y = X W^T + bias and adds to each segment's rows the LoRA term of its job's adapter; its
backward accumulates dA and dB. The microbatch's route says which rows belong to which adapter.
Collectives around it:

    |                  | before the GEMM | after it (Y)       | backward, before (dY) | after it (dX)      | dS for dA          |
    | column           |                 |                    |                       | all-reduce         |                    |
    | column, sequence | all-gather rows |                    |                       | reduce-scatter     | reduce-scatter     |
    | row              |                 | all-reduce         |                       |                    |                    |
    | row, sequence    |                 | reduce-scatter     | all-gather rows       |                    |                    |

dS is the gradient of S = X A^T: with rows sharded, dA needs dS of this rank's rows, summed over
ranks. The gradient of an A or B that every tensor rank has in full is a partial sum on each of
them; the optimizer sums it, once per step (optimizer.py).

Words: a *module* is a projection that PEFT targets (q_proj); a *linear* is Megatron's layer, which
merges one to three modules. A linear holds its modules' output columns side by side on every rank:
q | k | v of this rank's heads (not interleaved as in Megatron), gate | up of its features. Every
module keeps an A and a B of its own, so adapters are those of the unmerged model.

How the linear gets what Megatron does not pass it: its adapters are views of the arena's buffers,
which the arena sets (`adapters`). The route is an argument of its forward, passed down with the
packed rows (attention.PackedRows). With a `Refill` (recompute: cheap) the linear does not keep X
for backward. The norm or SwiGLU that made X recomputes it in its own backward, and dA is computed
then (fused_ops.lora.refill).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from fused_ops.lora.adapters import LoraGroup
from fused_ops.lora.fp8 import Rounded
from fused_ops.lora.frozen import FrozenWeight
from fused_ops.lora.linear import Collectives, multi_lora_linear
from fused_ops.lora.magnitude import Magnitudes, scale_outputs
from fused_ops.lora.refill import Refill
from fused_ops.lora.route import Route
from megatron_lora.parallel.collectives import ColumnCollectives, ColumnSequenceCollectives, RowCollectives, RowSequenceCollectives

CollectivesOver = Callable[[dist.ProcessGroup], Collectives]


EXPERT = "{}"  # in a path: an expert's number


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGeometry:
    """The shape of a linear on this rank, and of the modules that it merges; "local" counts are this rank's shard."""

    modules: tuple[str, ...]  # ("q_proj", "k_proj", "v_proj")
    paths: tuple[str, ...]  # ("model.layers.0.self_attn.q_proj", ...); of experts with EXPERT in place of the number
    in_features: int  # local
    out_features: tuple[int, ...]  # local, per module
    parallel: str  # "column" or "row"
    first_feature: int  # global index of the local input feature 0
    parts: tuple[tuple[int, ...], ...] = ()  # local output features of what each module computes side by side; (): one thing each
    tensor_ranks: int = 1  # that share its features
    experts: range = range(0)  # numbers of those on this rank that have such a linear; empty: the layer has

    def pieces(self, module: int, tensor_rank: int) -> tuple[tuple[int, int], ...]:
        """Return the (first, number) of the global output features of a module, by its index, that a tensor rank has, in its order."""
        widths = self.parts[module] if self.parts else (self.out_features[module],)
        firsts = accumulate((width * self.tensor_ranks for width in widths), initial=0)
        here = tensor_rank % self.tensor_ranks if self.parallel == "column" else 0
        return tuple((first + here * width, width) for first, width in zip(firsts, widths, strict=False))

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """The (start, stop) output columns of each module."""
        return tuple(pairwise(accumulate(self.out_features, initial=0)))


class MultiLoraLinear:
    """What the column- and the row-parallel layer share: geometry, adapters, and the product over [T, 1, K]."""

    parallel: str  # "column" or "row"
    kinds: tuple[CollectivesOver, CollectivesOver]  # its collectives without and with sequence parallelism
    config: Any  # a StageConfig
    tp_group: dist.ProcessGroup
    weight: torch.nn.Parameter  # on the meta device until `freeze_as`, then None, unless it is kept in `precision`
    bias: torch.nn.Parameter | None
    geometry: LinearGeometry
    adapters: LoraGroup | None = None  # of all resident jobs; None: the base model alone
    magnitudes: Magnitudes | None = None  # of those that have some; None: none has
    frozen: FrozenWeight | None = None  # takes the place of `weight`
    operator = staticmethod(multi_lora_linear)  # a benchmark replaces it by another with the same arguments

    def __init__(self, *args, config, tp_comm_buffer_name: str, **kwargs):
        """Build Megatron's layer, frozen; it calls the linear "qkv", "proj", "fc1" or "fc2"."""
        kwargs["bias"] = config.architecture.has_bias(config.architecture.family.linears[tp_comm_buffer_name][0])
        # Megatron's, of the class behind this one
        super().__init__(*args, config=config, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)  # pyright: ignore[reportCallIssue]
        self.role = tp_comm_buffer_name
        if config.base_weights != "native":
            self.weight = torch.nn.Parameter(self.weight.detach().to("meta"))
        freeze(cast(torch.nn.Module, self))
        self.collectives = self.collectives_over(self.tp_group, config.sequence_parallel)

    def set_layer(self, layer: int) -> None:
        """Set the layer (its index in the complete model) that the linear belongs to."""
        architecture, ranks, rank = self.config.architecture, self.tp_group.size(), self.tp_group.rank()
        modules = architecture.family.linears[self.role]
        column = self.parallel == "column"
        parts = tuple(tuple(n // ranks if column else n for n in architecture.module_parts(module)) for module in modules)
        self.geometry = LinearGeometry(
            modules=modules,
            paths=tuple(architecture.module_path(layer, module) for module in modules),
            in_features=self.weight.shape[1],
            out_features=tuple(map(sum, parts)),
            parallel=self.parallel,
            first_feature=0 if column else rank * self.weight.shape[1],
            parts=parts,
            tensor_ranks=ranks,
        )
        assert self.geometry.columns[-1][1] == self.weight.shape[0]

    @classmethod
    def collectives_over(cls, group: dist.ProcessGroup, sequence: bool) -> Collectives:
        """Return the collectives around such a linear over a tensor group."""
        return Collectives() if group.size() == 1 else cls.kinds[sequence](group)

    def freeze_as(self, weight: FrozenWeight) -> None:
        """Put the weight as it is stored in the place of the parameter."""
        assert weight.shape == self.weight.shape
        self.frozen = weight
        self.weight = None  # pyright: ignore[reportAttributeAccessIssue]  None is how torch drops a parameter

    def new_rounded(self) -> Rounded | None:
        """Return what a norm or SwiGLU beside the linear gives rows in 8 bits to; None where it multiplies in 16 or 32."""
        return Rounded() if self.frozen is not None and self.frozen.in_8_bits else None

    def _apply_linear(self, x: Tensor, bias: Tensor | None, route: Route | None, **options) -> Tensor:
        """Return Y [T or T_local, 1, N] for Megatron's x [rows, batch of 1, K]; `options` are the operator's."""
        scaled = self._has_scaled_rows(route)
        if scaled:  # dY is another one before it is scaled
            options["rounded"] = None
        y = self.operator(x.squeeze(1), self.stored_weight, bias, self.adapters, route, self.collectives, **options)
        if scaled and route is not None and self.magnitudes is not None:
            first = 0 if len(y) == route.num_rows else self.tp_group.rank() * len(y)  # rows are sharded
            y = scale_outputs(y, bias, self.magnitudes, route.rows(first, first + len(y)))
        return y.unsqueeze(1)

    @property
    def stored_weight(self) -> Tensor | FrozenWeight:
        """The frozen weight [N, K], as it is stored."""
        return self.weight if self.frozen is None else self.frozen

    def _has_scaled_rows(self, route: Route | None) -> bool:
        """Whether an adapter of the route has magnitudes; then backward needs the output's values."""
        return self.magnitudes is not None and bool(self.magnitudes.blocks(route))


class MultiLoraColumnParallelLinear(MultiLoraLinear, ColumnParallelLinear):
    """linear_qkv and linear_fc1: output features sharded. [T_local, 1, K] -> ([T, 1, N_local], None)."""

    parallel, kinds = "column", (ColumnCollectives, ColumnSequenceCollectives)

    def forward(
        self, input_: Tensor, route: Route | None, refill: Refill | None = None, rounded: Rounded | None = None
    ) -> tuple[Tensor, None]:
        """Return Y with its bias added, and None: Megatron adds a bias returned here, and there is none to add."""
        return self._apply_linear(input_, self.bias, route, refill=refill, rounded=rounded), None


class MultiLoraRowParallelLinear(MultiLoraLinear, RowParallelLinear):
    """linear_proj and linear_fc2: input features sharded. [T, 1, K_local] -> ([T_local, 1, N], None)."""

    parallel, kinds = "row", (RowCollectives, RowSequenceCollectives)

    def forward(
        self, input_: Tensor, route: Route | None, refill: Refill | None = None, rounded: Rounded | None = None
    ) -> tuple[Tensor, None]:
        """Return Y with its bias added once, after the reduction, and None: Megatron has no bias to add."""
        y = self._apply_linear(input_, None, route, refill=refill, rounded=rounded)
        return y if self.bias is None else y + self.bias, None

    def for_backward(self, input_: Tensor, route: Route | None, refill: Refill | None, output_shape: torch.Size) -> Tensor:
        """Return what `forward` returned, [T_local, 1, N], to run backward again; without values, unless its gradients depend on them."""
        if self._has_scaled_rows(route):
            return self.forward(input_, route, refill)[0]
        return self._apply_linear(input_, None, route, refill=refill, output_shape=torch.Size((output_shape[0], output_shape[-1])))


def freeze(module: torch.nn.Module) -> None:
    """Set requires_grad to False for all parameters of a module."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
