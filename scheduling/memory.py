"""How much memory a stage needs, and which token budget follows from it.

    bytes = weights + adapters + kept per token in flight * tokens in flight + workspace of one microbatch + loss chunk

Stage s of P holds at most P - s microbatches, so tokens in flight are bounded by any P - s consecutive slots of the stream, not by that
many full budgets. An adapter weight costs 2 (compute copy) + 4 (gradient) + 4 (master) + 8 (Adam) bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduling.cost import Device, ModelShape, stage_policies
from scheduling.slot_cost import SlotCost, estimate_of, work_time
from scheduling.types import Lengths, Stream

_BYTES_PER_ADAPTER_WEIGHT = 18
RESERVED = 0.08  # share of the device that CUDA, NCCL and fragmentation take
_WORTH = 0.002  # a larger budget must gain this much efficiency
LOSS_CHUNK_LOGITS = 2**25  # logits that exist at a time; three float32 tensors of them


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one stage on one tensor rank."""

    weights: float
    adapters: float
    per_token_in_flight: float
    per_token_workspace: float
    loss: float

    def total(self, tokens_in_flight: float, largest_slot: float) -> float:
        """Return the bytes with so many tokens in flight and a largest microbatch of so many tokens."""
        return (
            self.weights + self.adapters + self.loss + self.per_token_in_flight * tokens_in_flight + self.per_token_workspace * largest_slot
        )


def stage_memory(
    shape: ModelShape,
    layers: Sequence[int],
    stage: int,
    total_rank: int,
    tensor: int = 1,
    recompute: str | Sequence[str] = "none",
    weight_bytes: int = 2,
    sequence: bool = False,
) -> StageMemory:
    """Model one stage; `total_rank` is the sum of the ranks of all resident adapters.

    Kept per token and layer, in `weight_bytes` each: the inputs of its two norms and of its four GEMMs, which LoRA needs for dA, the
    attention's q, k, v and output, and the two halves of the gate; recomputed cheaply, without the norms' and the gate's outputs; fully,
    the layer's input alone. Sequence parallelism shards the rows of what tensor parallelism leaves whole.
    """
    first, last, num_layers = stage == 0, stage == len(layers) - 1, layers[stage]
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden = shape.hidden_size * weight_bytes / (tensor if sequence else 1)
    ffn, attention = shape.ffn_size * weight_bytes / tensor, (2 * query + 2 * key_value) * weight_bytes / tensor
    whole = 4 * hidden + attention + 3 * ffn
    kept = {"none": whole, "cheap": whole - 2 * hidden - ffn, "full": hidden}
    vocabulary = shape.head_params * weight_bytes / tensor * (first + last)
    return StageMemory(
        weights=shape.layer_params * num_layers * weight_bytes / tensor + vocabulary,
        adapters=shape.lora_width * total_rank * num_layers * _BYTES_PER_ADAPTER_WEIGHT / tensor,
        per_token_in_flight=sum(kept[policy] for policy in stage_policies(layers, recompute)[stage]),
        per_token_workspace=2 * whole,
        loss=3 * 4 * LOSS_CHUNK_LOGITS if last else 0.0,
    )


def tokens_in_flight(stream: Stream, stage: int, num_stages: int) -> int:
    """Return the most tokens that a stage holds at once: the fullest num_stages - stage consecutive slots."""
    width, tokens = num_stages - stage, [microbatch.num_tokens for microbatch in stream]
    return max((sum(tokens[k : k + width]) for k in range(len(tokens))), default=0)


def fitting_tokens(stages: Sequence[StageMemory], device: Device) -> int:
    """Return the largest token budget at which every stage fits with full slots (0 when not even the weights do)."""
    usable = device.memory_bytes * (1 - RESERVED)
    budgets = []
    for stage, memory in enumerate(stages):
        per_token = memory.per_token_in_flight * (len(stages) - stage) + memory.per_token_workspace
        budgets.append((usable - memory.total(0, 0)) / per_token)
    return max(0, int(min(budgets)))


def choose_capacity(lengths: Lengths, num_stages: int, fitting: int, cost: SlotCost | None = None, multiple: int = 256) -> int:
    """Choose microbatch_tokens: as large as memory allows, no larger than pays, a multiple of `multiple` where that fits.

    Larger budgets stop paying where the even-slot estimate is flat. Raises ValueError when the longest sample does not fit.
    """
    longest = max((tokens for steps in lengths for batch in steps for tokens in batch), default=1)
    if longest > fitting:
        raise ValueError(f"the longest sample has {longest} tokens, memory allows {fitting} per microbatch")
    sizes = sorted({longest, *range(-(-longest // multiple) * multiple, min(fitting, 32 * longest) + 1, multiple)})
    if len(sizes) > 1 and longest % multiple:
        sizes = sizes[1:]
    cost = cost or SlotCost()
    work, tokens = work_time(lengths, cost), sum(tokens for steps in lengths for batch in steps for tokens in batch)
    gains = [(estimate_of(work, tokens, num_stages, size, cost), size) for size in sizes]
    best = max(gain for gain, _ in gains)
    return next(size for gain, size in gains if gain >= best - _WORTH)
