"""What one decoder layer keeps between its forward and its backward, and what it needs beyond that at its peaks.

Bytes on one tensor rank, per token of the microbatch (T of them), as the trainer's layer (GEMMs with LoRA, flash attention, fused norms,
rotation and SwiGLU) allocates them:

    kept     none    input, first norm's x, q, k, v, attention's output, sum and x of the second norm, gate | up, swiglu; S of each linear
             cheap   without the two x and swiglu, which backward recomputes
             full    the input alone; nothing where it waits in host memory: then the input, and the next one to come back, count at peaks
    forward  what is alive beyond that when the layer's output is complete
    backward the maximum over down's gradients, SwiGLU's, gate | up's, attention's, less what is freed by then

SwiGLU's backward writes its gradient over gate | up, and the output that it computes again over that output's gradient. A `full` layer
runs again as a `cheap` one, up to the input of its last linear, whose product backward does not need.

For backward DoRA keeps the output of each linear that it targets, of its rows: counted as if all were. A linear that no adapter
targets keeps nothing. Experts keep gate | up of each expert of a token, and with adapters x. S and the norms'
statistics are kept as long as the microbatch. With head norms the GEMM's q | k | v is kept too. Norms after attention and the MLP keep
their inputs, 2 H more. Sequence parallelism shards the rows of what tensor parallelism does not shard, and gathers them for a GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduling.cost import OFFLOADED
from scheduling.model_shape import ModelShape

POLICIES = ("none", "cheap", "full")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
MERGED = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "o": ("o_proj",),
    "up": ("gate_proj", "up_proj", "gate_up_proj"),
    "down": ("down_proj",),
}
EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj")  # of each expert, where a model has experts
MAGNITUDES = "magnitudes"  # of a DoRA adapter, among its modules: one row in all linears
RANK_ALIGN = 16  # an adapter has its rank in rows, rounded up to this
_ITEM_ROWS = 2048  # of one job, over which a program sums dA
_FEWEST_ROWS = 256  # of one job, over which a program sums dB at least
_PROGRAMS = 132  # rows are cut so that each program has something to sum
_SHARE_COLUMNS = 512  # of dY, over which a program sums dS
# Up to this rank dS and dB come from one read of dY, by shares of column blocks, in rank classes of 16, 32 and 64. On other GPUs than
# Hopper the limit is 32, and the estimate is too high.
_MAX_FUSED_RANK = 64
_SCALED_ROWS = 1024  # of an output that DoRA scales; as many are float32 at a time in backward
_CHOICE_BYTES = 4 * 4  # of each expert of a token: its number, weight and place, and the weight at that place
_KEY_BYTES = 4  # of dropout, of each of these where experts have adapters
_CAPPED_BYTES = 64 * 4 * 5  # of a head and key: scores of a block of rows, in float32, and what is computed of them


@dataclass(frozen=True, slots=True)
class Adapter:
    """One job's rank and the modules that it targets, MAGNITUDES among them where it is a DoRA adapter.

    With an `expert_rank` those of EXPERT_MODULES are each expert's.
    """

    rank: int
    modules: tuple[str, ...] = MODULES
    expert_rank: int = 0

    @property
    def rows(self) -> int:
        """Rows of each of its factors but for experts'."""
        return -(-self.rank // RANK_ALIGN) * RANK_ALIGN

    def rows_of(self, module: str) -> int:
        """Rows of each of a module's factors."""
        if module == MAGNITUDES:
            return 1
        return self.expert_rank if self.expert_rank and module in EXPERT_MODULES else self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMemory:
    """The sizes of a layer, in bytes per token: `hidden` of this rank's rows, `gathered` of all rows of a hidden state, and so on."""

    hidden: float
    gathered: float
    query: float
    key_value: float
    ffn: float
    sums: float  # logsumexp of attention
    statistics: float  # of one norm
    item: int  # bytes of a number
    widths: dict[str, float]  # of S, by merged linear; 0 where nothing targets it
    blocks: dict[str, float]  # column blocks of a linear's output in which dS is summed
    largest_rank: int
    num_jobs: int
    head_norms: bool
    grouped: bool  # several query heads share a key
    sums_of_dq: int  # float32 copies of dQ that attention's backward sums into
    sequence: bool
    after: float = 0.0  # what norms after attention and the MLP keep, of each its input and statistics
    copies: float = 0.0  # another hidden state, where results are normed or multiplied before they are added
    routed: float = 0.0  # a hidden state for each expert of a token, while they compute
    choice: float = 0.0  # probabilities and places of the experts, kept
    scaled: dict[str, float] = field(default_factory=dict)  # outputs that DoRA scales, by merged linear; none without
    capped: float = 0.0  # scores of the rows that plain torch computes at once, where attention caps them

    def kept(self, policy: str) -> float:
        """Bytes per token between forward and backward."""
        if policy in ("full", OFFLOADED):
            return self.hidden * (policy == "full")
        qkv = self.query + 2 * self.key_value
        bare = 2 * self.hidden + 2 * self.statistics + qkv * (1 + self.head_norms) + self.query + self.sums + 2 * self.ffn
        bare += sum((*self.widths.values(), *self.scaled.values())) + 2 * self.after + self.choice
        bare += self.hidden * (self.routed > 0 and self.widths["up"] > 0)
        return bare if policy == "cheap" else bare + self.inputs

    @property
    def inputs(self) -> float:
        """Bytes per token of the linears' inputs that are kept for dA and could be recomputed."""
        of_mlp = 0.0 if self.routed else self.hidden * (self.widths["up"] > 0) + self.ffn * (self.widths["down"] > 0)
        return self.hidden * (self.widths["qkv"] > 0) + of_mlp

    def forward(self, policy: str) -> float:
        """Bytes per token beyond `kept` at the forward's peak: the MLP's result and the output; of a `full` layer, what it drops too."""
        if policy == OFFLOADED:
            return self.hidden + self.forward("full")
        output = max(2 * self.hidden, self.hidden + self.gathered * self.sequence) + self.hidden * (self.after > 0)
        swiglu = self.ffn * (policy != "none" or not self.widths["down"] or self.routed > 0)
        if self.routed and policy != "full":  # what experts computed is summed once their inputs are gone
            return max(self.gathered + self.hidden * self.sequence + swiglu, output) + self.routed
        if policy != "full":
            return max(output + swiglu, self.capped)
        qkv = self.query + 2 * self.key_value
        attention = self.hidden + 2 * qkv + self.query + self.sums + self.widths["o"] + max(self.gathered, self.capped) + self.copies
        swiglu = self.hidden * (1 + (self.routed > 0)) + 3 * self.ffn  # experts' caller holds their input
        up = max(2 * self.hidden + self.gathered * self.sequence + 2 * self.ffn, swiglu) + self.routed
        return max(attention, up, self.hidden + output + self.ffn + self.routed)  # beside the second norm's sum

    def backward(self, policy: str, tokens: int) -> float:
        """Bytes beyond `kept`, for `tokens` tokens, at the peak of the backward."""
        if policy == OFFLOADED:
            return 2 * self.hidden * tokens + self.backward("full", tokens)
        if policy == "full":
            copies = 0.0 if self.after else self.copies
            down = self.hidden * ("down" in self.scaled)  # its product, which backward needs then
            return (self.kept("cheap") - self.hidden + copies + down) * tokens + self.backward("cheap", tokens)
        cheap, widths = policy == "cheap", self.widths
        swiglu_kept = 0.0 if cheap or not widths["down"] or self.routed else self.ffn
        dy = self.hidden + self.copies + (self.routed or self.gathered * self.sequence)  # experts' rows are copies of gathered ones
        down = dy + widths["down"] + max(self._shares("down", tokens), self.ffn) + self._partial("down", self.ffn, tokens)
        swiglu = self.hidden + self.ffn - swiglu_kept
        if cheap and widths["down"]:
            swiglu += widths["down"] + self._partial("down", self.ffn, tokens)
        freed = 2 * self.ffn + swiglu_kept
        dx = self.gathered + (self.gathered if self.routed else self.hidden) * self.sequence + self.routed  # X is gathered again for rows
        up = self.hidden + 2 * self.ffn + widths["up"] + max(self._shares("up", tokens), dx) - freed
        freed += self.hidden * (1 + (not cheap and widths["up"] > 0))
        expanded = 2 * self.query * 4 / self.item if self.grouped else 0.0  # dK, dV of all query heads by cuDNN; torch's take half
        sums = self.query * 4 / self.item * self.sums_of_dq
        attention = self.hidden + self.query + (self.query + 2 * self.key_value) + sums + expanded + self.capped + self.copies - freed
        if not self.scaled:
            return max(down, swiglu, up, attention, 0.0) * tokens
        of_down, of_up, of_o, of_qkv = (self.scaled.get(name, 0.0) for name in ("down", "up", "o", "qkv"))
        scaling = (
            dy + of_down + self._widened("down", tokens),
            self.hidden + of_up + self._widened("up", tokens) - swiglu_kept - of_down,
            self.hidden + of_qkv + self._widened("qkv", tokens) - freed - of_down - of_up - of_o,
        )
        linears = down, swiglu - of_down, up - of_down - of_up, attention - of_down - of_up - of_o
        return max(*linears, *scaling, 0.0) * tokens

    def _widened(self, linear: str, tokens: int) -> float:
        """Bytes per token of the rows of an output that DoRA has in float32 while it sums its gradient; none where they are anyway."""
        return self.scaled.get(linear, 0.0) * 4 / self.item * min(1.0, _SCALED_ROWS / tokens) * (self.item < 4)

    def _of_experts(self, linear: str) -> bool:
        """Whether a linear is of experts, whose sums belong to one program each."""
        return self.routed > 0 and linear in ("up", "down")

    def _shares(self, linear: str, tokens: int) -> float:
        """Bytes per token of the shares of dS, summed over column blocks in float32, and of the partial sums of dB, one for each item."""
        if self.largest_rank > _MAX_FUSED_RANK or not self.widths[linear] or self._of_experts(linear):
            return 0.0
        rank, blocks = max(16, 1 << (self.largest_rank - 1).bit_length()), self.blocks[linear]
        fewest, most = (tokens / rows + self.num_jobs for rows in (_ITEM_ROWS, _FEWEST_ROWS))
        items = min(most, max(fewest, _PROGRAMS / blocks))
        return 4 * blocks * rank * (1 + items * _SHARE_COLUMNS / tokens)

    def _partial(self, linear: str, num_bytes: float, tokens: int) -> float:
        """Bytes per token of dA's partial sums over an input of `num_bytes`: a float32 matrix per item (some rows of one job)."""
        if self._of_experts(linear):
            return 0.0
        items = tokens / _ITEM_ROWS + self.num_jobs
        return 4 * items * self.widths[linear] / self.item * num_bytes / self.item / tokens


def layer_memory(
    shape: ModelShape,
    adapters: Sequence[Adapter],
    item: int,
    tensor: int = 1,
    sequence: bool = False,
    deterministic: bool = False,
    residents: int | None = None,
    expert: int = 1,
) -> LayerMemory:
    """Derive a layer's sizes from the model's shape; `item` is the bytes of a number of the compute dtype.

    A rank has room for all rows of all experts, even where the tensor ranks divide the experts (`expert` ranks).

    At most `residents` jobs (None: one for each of `adapters`) are in a microbatch.
    Flash attention in a fixed order (`deterministic`) has a copy of dQ for each program that works on a head at once.
    """
    local = tensor if sequence else 1
    query, key_value = shape.num_heads * shape.head_dim // tensor, shape.num_kv_heads * shape.head_dim // tensor
    hidden, ffn = shape.hidden_size, shape.ffn_size // (tensor // expert) * max(1, shape.top_k)
    outputs = {"qkv": (query, key_value, key_value), "o": (hidden,), "up": (ffn, ffn), "down": (hidden,)}
    return LayerMemory(
        hidden=hidden * item / local,
        gathered=hidden * item,
        query=query * item,
        key_value=key_value * item,
        ffn=ffn * item,
        sums=4 * shape.num_heads / tensor,
        statistics=4 / local,
        item=item,
        widths={
            name: item
            * max((sum(adapter.rows_of(module) for module in modules if module in adapter.modules) for adapter in adapters), default=0)
            * (shape.top_k if shape.num_experts and name in ("up", "down") else 1)
            for name, modules in MERGED.items()
        },
        blocks={name: sum(-(-size // _SHARE_COLUMNS) for size in sizes) for name, sizes in outputs.items()},
        largest_rank=max((adapter.rows for adapter in adapters), default=0),
        num_jobs=len(adapters) if residents is None else residents,
        head_norms=shape.qk_norm,
        grouped=shape.num_heads != shape.num_kv_heads,
        sums_of_dq=-(-_PROGRAMS * tensor // shape.num_heads) if deterministic else 1,
        sequence=sequence,
        after=(hidden * item + 4) / local * shape.post_norms,
        copies=hidden * item / local * (shape.post_norms or shape.scaled),
        routed=hidden * item * shape.top_k,
        scaled={
            name: sum(outputs[name]) * item / (local if name in ("o", "down") else 1)
            for name, modules in MERGED.items()
            if any(MAGNITUDES in each.modules and set(modules) & set(each.modules) for each in adapters)
        },
        choice=4 * shape.num_experts + (_CHOICE_BYTES + _KEY_BYTES * any(adapter.expert_rank for adapter in adapters)) * shape.top_k,
        capped=_CAPPED_BYTES * shape.num_heads / tensor * shape.capped_scores,
    )
