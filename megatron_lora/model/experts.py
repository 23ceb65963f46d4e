"""A layer's experts and their router, frozen, in place of Megatron's MLP (fused_ops/experts/layer.py), and where their adapters are.

Every tensor rank has the whole router, and a part of each expert's features, gate over up as in linear_fc1, or with `parallel.expert`
some experts, complete. All tensor ranks choose alike, since they have the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops.experts.adapters import ExpertGroup
from fused_ops.experts.layer import ExpertWeights, expert_mlp
from fused_ops.lora.route import Route
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.huggingface.weight_slices import Part
from megatron_lora.model.linears import EXPERT, LinearGeometry, MultiLoraColumnParallelLinear, MultiLoraRowParallelLinear
from megatron_lora.parallel.process_groups import tensor_group


@dataclass(slots=True)
class ExpertLinear:
    """Gate and up, or down, of the experts of a layer that this rank has, as the arena sees it."""

    geometry: LinearGeometry
    adapters: ExpertGroup | None = None  # of all resident jobs; None: the base model alone


class Experts(torch.nn.Module):
    """The experts of one layer; its arguments are those of Megatron's MLP."""

    def __init__(self, config, **_):
        super().__init__()
        architecture: Architecture = config.architecture
        self.architecture, self.group = architecture, tensor_group()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        number, hidden, self.sharing = architecture.num_experts, architecture.hidden_size, self.group.size() // config.expert_ranks
        own, width = number // config.expert_ranks, architecture.ffn_size // self.sharing
        first = self.group.rank() * own * (config.expert_ranks > 1)
        self.own = range(first, first + own)

        def frozen(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device), requires_grad=False)

        self.router, self.up, self.down = frozen(number, hidden), frozen(own, 2 * width, hidden), frozen(own, hidden, width)
        linears = MultiLoraColumnParallelLinear, MultiLoraRowParallelLinear
        self.before, self.after = (linear.collectives_over(self.group, config.sequence_parallel) for linear in linears)

    def set_layer(self, layer: int) -> None:
        """Set the layer (its index in the complete model) that the experts belong to."""
        modules = self.architecture.expert_modules
        paths, (hidden, width) = self.architecture.expert_paths(layer, EXPERT), self.down.shape[1:]
        shared = {"tensor_ranks": self.sharing, "experts": self.own}
        up = LinearGeometry(
            modules=modules[:2],
            paths=paths[:2],
            in_features=hidden,
            out_features=(width, width),
            parallel="column",
            first_feature=0,
            **shared,
        )
        down = LinearGeometry(
            modules=modules[2:],
            paths=paths[2:],
            in_features=width,
            out_features=(hidden,),
            parallel="row",
            first_feature=self.group.rank() % self.sharing * width,
            **shared,
        )
        self.linears = ExpertLinear(up), ExpertLinear(down)

    def forward(self, x: Tensor, route: Route | None, values: bool = True) -> Tensor:
        """Return the experts' output [T_local, 1, H] of x; without `values`, for backward alone."""
        weights = ExpertWeights(
            router_EH=self.router,
            up_EFH=self.up,
            down_EHF=self.down,
            top_k=self.architecture.top_k,
            normalised=self.architecture.normalised,
            first_expert=self.own.start,
            before=self.before,
            after=self.after,
        )
        up, down = self.linears
        return expert_mlp(x.squeeze(1), weights, values=values, groups=(up.adapters, down.adapters), segments=route).unsqueeze(1)

    def parts(self, layer: int) -> Iterator[Part]:
        """Yield the parts of the weights, with the name and slice of the checkpoint tensor that each is loaded from."""
        everything, width = slice(None), self.down.shape[2]
        first = self.group.rank() % self.sharing * width
        part = slice(first, first + width)
        yield Part(target=self.router, name=self.architecture.router(layer), index=(everything, everything))
        for expert, up_FH, down_HF in zip(self.own, self.up, self.down, strict=True):
            gate, up, down = (f"{path}.weight" for path in self.architecture.expert_paths(layer, str(expert)))
            yield Part(target=up_FH[:width], name=gate, index=(part, everything))
            yield Part(target=up_FH[width:], name=up, index=(part, everything))
            yield Part(target=down_HF, name=down, index=(everything, part))
