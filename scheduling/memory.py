"""How much memory a stage needs at its peak, and what follows from it: recomputation policies and the token budget.

    bytes = weights + adapters + runtime + kept per token in flight * tokens in flight + workspace of the running microbatch

Stage s of P holds at most P - s microbatches, so tokens in flight are bounded by any P - s consecutive slots of the stream. The workspace
is found by going once forward and once backward through the stage's layers (layer_memory.py), with everything that the executor holds:
messages, the loss's chunk of logits, less what upper layers have freed. The loss's gradient is counted as if every token were a target,
since one microbatch may be full of targets whatever their share is. An adapter weight costs 16 bytes (master, gradient, Adam's moments)
and its copy in the compute dtype, if that is not float32.

Prediction and `torch.cuda.max_memory_allocated` count the same bytes. RESERVED is for what CUDA, NCCL and fragmentation add.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from scheduling.cost import OFFLOADED, Device, offloaded, stage_policies
from scheduling.layer_memory import EXPERT_MODULES, FUSED_MODULES, MAGNITUDES, MODULES, Adapter, LayerMemory, layer_memory
from scheduling.model_shape import ModelShape
from scheduling.slot_cost import SlotCost, estimate_of, work_time
from scheduling.types import Lengths, Stream

RESERVED = 0.05  # share of the memory that is free at the start, for NCCL and fragmentation: 4 of an H100's 84 GB; 3 were measured
LOSS_CHUNK_BYTES = 300 * 10**6  # of the logits that are alive at a time
_LOSS_ROWS = 256  # chunks are multiples of it, so that they fill the tiles of a GEMM
_MULTIPLE = 256  # budgets are multiples of it
_WORTH = 0.002  # efficiency that a larger budget must gain
_NORM_BYTES = 8  # of a magnitude, besides its state: its output's factor, and the inverse of the norm
_STATE_BYTES = 16  # of an adapter weight: master, gradient and Adam's two moments
_CUBLAS_BYTES = 2 * 32 * 2**20  # workspaces of the forward's and the backward's thread
_INPUT_BYTES = 32  # of a token: tokens, labels, positions, weight and dropout key


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one stage on one tensor rank; `policies` are those of its layers, in order."""

    weights: float
    adapters: float
    runtime: float
    layer: LayerMemory
    policies: tuple[str, ...]
    is_first: bool
    base: float  # per token in flight, outside the layers: rotary table, tokens; on the last stage the loss's gradient too
    num_messages: int  # hidden states being sent, and the received gradient, while the stage computes
    head_rows: int  # of the vocabulary on this rank; 0 on stages without the loss
    logit_copies: int = 1  # of a chunk's logits that are alive at once

    @property
    def per_token_in_flight(self) -> float:
        """Bytes per token that a microbatch keeps between its forward and its backward."""
        return self.base + sum(map(self.layer.kept, self.policies))

    @property
    def on_host_per_token(self) -> float:
        """Bytes of host memory per token in flight."""
        return self.policies.count(OFFLOADED) * self.layer.hidden

    def with_policies(self, policies: Sequence[str], offload: bool) -> StageMemory:
        """Return the same stage under other policies of its layers; `offload` inputs of `full` ones to host memory."""
        return replace(self, policies=offloaded(policies, self.is_first) if offload else tuple(policies))

    def total(self, tokens_in_flight: float, largest_slot: int) -> float:
        """Return the bytes with this number of tokens in flight and in the largest microbatch."""
        fixed = self.weights + self.adapters + self.runtime
        return fixed + self.per_token_in_flight * tokens_in_flight + self.workspace(largest_slot)

    def workspace(self, tokens: int) -> float:
        """Return the bytes that a running microbatch of `tokens` needs beyond what it keeps after its forward."""
        if not tokens:
            return 0.0
        kept = self.per_token_in_flight * tokens
        return max(*self._forward(tokens), *self._backward(tokens)) - kept + self.num_messages * self.layer.hidden * tokens

    def _forward(self, tokens: int) -> list[float]:
        """Bytes of one microbatch at the top of each run of equal layers, and at the loss."""
        per_token, moments = self.base - self._tail, []
        for policy, run in groupby(self.policies):
            per_token += self.layer.kept(policy) * sum(1 for _ in run)
            moments.append((per_token + self.layer.forward(policy)) * tokens)
        if self.head_rows:
            layer = self.layer
            held = 2 * layer.hidden + layer.statistics + layer.gathered * (1 + layer.sequence)  # sum, x, gathered x, gradient
            num_logits = self.logit_copies * min(tokens, loss_chunk_rows(self.head_rows, layer.item)) * self.head_rows
            moments.append((per_token + held) * tokens + num_logits * layer.item)
        return moments

    def _backward(self, tokens: int) -> list[float]:
        """Its bytes during the backward of the loss and of the top layer of each run; S of the layers above is still kept."""
        layer, moments = self.layer, [self.per_token_in_flight * tokens]
        if self.head_rows:
            moments[0] += layer.hidden * tokens  # the gradient times its weights
        per_token, above = self.per_token_in_flight - self._tail, 0.0
        for policy, run in groupby(reversed(self.policies)):
            count = sum(1 for _ in run)
            moments.append((per_token + above) * tokens + layer.backward(policy, tokens))
            per_token -= count * layer.kept(policy)
            above += count * sum(layer.widths.values()) * (policy not in ("full", OFFLOADED))
        return moments

    @property
    def _tail(self) -> float:
        """What the last stage keeps after its layers: the final norm's input, and the gradient that the loss computed."""
        return (2 * self.layer.hidden + self.layer.statistics) * (self.head_rows > 0)


def loss_chunk_rows(head_rows: int, item: int) -> int:
    """Return the rows of a chunk of the loss; `head_rows` tokens of the vocabulary are on this rank, `item` is the bytes of a logit."""
    if item > 2:  # float32 means a CPU, which needs no large products to be busy
        return max(1, min(128, LOSS_CHUNK_BYTES // (head_rows * item)))
    return max(1, LOSS_CHUNK_BYTES // (head_rows * item * _LOSS_ROWS)) * _LOSS_ROWS


def stage_memory(
    shape: ModelShape,
    layers: Sequence[int],
    stage: int,
    adapters: Sequence[Adapter],
    tensor: int = 1,
    recompute: str | Sequence[str] = "none",
    item: int = 2,
    weight_bytes: float | None = None,
    sequence: bool = False,
    cuda: bool = True,
    replicas: int = 1,
    offload: bool = False,
    deterministic: bool = False,
    room: Mapping[str, int] | None = None,
    residents: int | None = None,
    scratch_bytes: float = 0.0,
    expert: int = 1,
) -> StageMemory:
    """Model one stage with its `adapters`.

    At most `residents` of them (None: all) lie at once in the `room` that there is for them, module -> rank rows (None: what they take).
    `item` is the bytes of a number of the compute dtype, `weight_bytes` those of a frozen linear's weight (`item` unless it is quantised),
    `scratch_bytes` those that it has where it is unpacked for a product, in memory for the largest linear.
    `expert` of the tensor ranks divide the experts: all, or 1 where each has a part of every one.
    A tied matrix counts on the first and on the last stage. With `offload`, inputs of `full` layers wait in host memory.
    """
    first, last, num_layers = stage == 0, stage == len(layers) - 1, layers[stage]
    layer = layer_memory(shape, adapters, item, tensor, sequence, deterministic, residents, expert)
    head_rows = -(-shape.vocab_size // tensor)
    router = shape.hidden_size * shape.num_experts  # which every tensor rank has
    linears = ((shape.layer_weights - router) / tensor + router) * (item if weight_bytes is None else weight_bytes)
    widest = max(2 * shape.ffn_size, shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads))
    scratch = scratch_bytes * shape.hidden_size * widest / tensor
    norm_item = 4 if shape.zero_centred else item
    norms = (2 * (1 + shape.post_norms) * shape.hidden_size + 2 * shape.head_dim * shape.qk_norm) * norm_item
    row_bytes = {module: num_bytes * num_layers for module, num_bytes in rank_row_bytes(shape, item, tensor, expert).items()}
    sizes = [sum(row_bytes[module] * adapter.rows_of(module) for module in adapter.modules) for adapter in adapters]
    summed = 4 * max(sizes, default=0) / _state_bytes(item) if tensor * replicas > 1 else 0  # one job's gradients while ranks sum them
    arena = sum(sizes) if room is None else sum(row_bytes[module] * rows for module, rows in room.items())
    memory = StageMemory(
        weights=scratch + (linears + norms) * num_layers + shape.hidden_size * (item * head_rows * (first + last) + norm_item * last),
        adapters=arena + summed,
        runtime=float(_CUBLAS_BYTES if cuda else 0),
        layer=layer,
        policies=(),
        is_first=first,
        base=shape.num_ropes * shape.head_dim * item + _INPUT_BYTES + (2 * layer.hidden + layer.statistics) * last,
        num_messages=(not first) + 2 * (not last),
        head_rows=head_rows if last else 0,
        logit_copies=1 + shape.capped_logits,
    )
    return memory.with_policies(stage_policies(layers, recompute)[stage], offload)


def rank_row_bytes(shape: ModelShape, item: int, tensor: int = 1, expert: int = 1) -> dict[str, int]:
    """Return module -> bytes of one rank row of its A and B^T in one layer on one tensor rank, with gradients and Adam's state.

    Of experts it is a row of each that the rank has; `expert` ranks divide them. Under MAGNITUDES those of one adapter's magnitudes.
    """
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    outputs = {"q_proj": query, "k_proj": key_value, "v_proj": key_value, "gate_proj": shape.ffn_size, "up_proj": shape.ffn_size}
    outputs |= {"qkv_proj": query + 2 * key_value, "gate_up_proj": 2 * shape.ffn_size}
    inputs = {"o_proj": query, "down_proj": shape.ffn_size}
    modules = FUSED_MODULES if shape.fused else MODULES
    experts = {module: shape.num_experts // expert for module in EXPERT_MODULES if shape.num_experts}  # of the rank
    shares = {module: tensor // expert if module in experts else tensor for module in modules}
    columns = {module: shape.hidden_size + (outputs | inputs)[module] // shares[module] for module in modules}
    found = {module: count * experts.get(module, 1) * _state_bytes(item) for module, count in columns.items()}
    of_linears = sum(outputs[module] for module in modules if module in outputs and module not in experts) // tensor
    of_linears += shape.hidden_size * sum(module in inputs and module not in experts for module in modules)  # not sharded
    return found | {MAGNITUDES: of_linears * (_state_bytes(item) + _NORM_BYTES)}


def _state_bytes(item: int) -> int:
    """Return the bytes of an adapter weight, gradient and moments, with its copy in the compute dtype if that is not float32."""
    return _STATE_BYTES + (item if item < 4 else 0)


def copied_share(item: int) -> float:
    """Return which share of an adapter's bytes a copy of its weights alone, as the kernels take them, has."""
    return item / _state_bytes(item)


def tokens_in_flight(stream: Stream, stage: int, num_stages: int) -> int:
    """Return the most tokens that a stage holds at once: the fullest num_stages - stage consecutive slots."""
    width, tokens = num_stages - stage, [microbatch.num_tokens for microbatch in stream]
    return max((sum(tokens[k : k + width]) for k in range(len(tokens))), default=0)


def usable_bytes(device: Device) -> float:
    """Return the bytes of a device that a stage may use."""
    return device.memory_bytes * (1 - RESERVED)


def peak_bytes(memory: StageMemory, stage: int, num_stages: int, budget: int) -> float:
    """Return the bytes of a stage when every slot is as full as the budget allows."""
    return memory.total(budget * (num_stages - stage), budget)


def fitting_tokens(stages: Sequence[StageMemory], device: Device) -> int:
    """Return the largest token budget at which every stage fits with full slots (0 when not even the weights do)."""

    def fits(budget: int) -> bool:
        return all(peak_bytes(memory, stage, len(stages), budget) <= usable_bytes(device) for stage, memory in enumerate(stages))

    return _last(fits, 2**31) if fits(0) else 0


def cheapest_policies(num_layers: int, fits: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...] | None:
    """Return the fastest policies of a stage's layers that fit: first as few `full` as possible, then as few `cheap`.

    `full` layers come first and `none` last: backward reaches the first layers when it has freed the others. None where nothing fits.
    """

    def policies(num_full: int, num_cheap: int) -> tuple[str, ...]:
        return ("full",) * num_full + ("cheap",) * num_cheap + ("none",) * (num_layers - num_full - num_cheap)

    if not fits(policies(num_layers, 0)):
        return None
    num_not_full = _last(lambda num_not_full: fits(policies(num_layers - num_not_full, num_not_full)), num_layers)
    num_none = _last(lambda num_none: fits(policies(num_layers - num_not_full, num_not_full - num_none)), num_not_full)
    return policies(num_layers - num_not_full, num_not_full - num_none)


def _last(holds: Callable[[int], bool], high: int) -> int:
    """Return the largest number up to `high` for which `holds`; it holds for 0 and, once it fails, fails for all above."""
    return bisect_left(range(1, high + 1), True, key=lambda number: not holds(number))


def choose_capacity(
    lengths: Lengths, num_stages: int, fitting: int, cost: SlotCost | None = None, slowdown: Callable[[int], float] | None = None
) -> int:
    """Choose microbatch_tokens: as large as memory allows and as pays off, a multiple of 256 where that fits.

    Larger budgets stop paying off where the even-slot estimate is flat, or where `slowdown(budget)` grows faster: the factor of time
    that the recomputation for such a budget costs. Raises ValueError when the longest sample does not fit.
    """
    longest = max((tokens for steps in lengths for batch in steps for tokens in batch), default=1)
    if longest > fitting:
        raise ValueError(f"the longest sample has {longest} tokens, memory allows {fitting} per microbatch")
    rounded = -(-longest // _MULTIPLE) * _MULTIPLE
    sizes = list(range(rounded, min(fitting, 32 * longest) + 1, _MULTIPLE)) or [longest]
    cost = cost or SlotCost()
    work, tokens = work_time(lengths, cost), sum(tokens for steps in lengths for batch in steps for tokens in batch)
    slow = slowdown or (lambda size: 1.0)
    gains = [(estimate_of(work, tokens, num_stages, size, cost) / slow(size), size) for size in sizes]
    best = max(gain for gain, _ in gains)
    return next(size for gain, size in gains if gain >= best - _WORTH)
