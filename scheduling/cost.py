"""What a microbatch costs in seconds on each stage: analytic from model shape and device, refined by measurements, kept as JSON.

A stage with L layers runs a pass over T tokens with squared lengths Q = sum(length^2) and rank-tokens R = sum(tokens * rank) in

    seconds = per_token * T + per_square * Q + per_rank_token * R + fixed

The base is frozen, so a backward computes dX but no dW: as much linear work as a forward (plus what it recomputes) and 2.5
times its attention work. LoRA costs 2 r (K + N) per token and linear forward and 4 r (K + N) backward (dX, dA, dB). The head costs 4 H V
per row in the last stage's forward, which computes logits and at once their gradient; its backward only scales that gradient. Its rows are
the targets alone, in chunks of one height: `head_share` of the tokens, 1 where every token is a target.

`recompute` is the policy of all layers ("none", "cheap" or "full"), or of each. "cheap" writes norm and SwiGLU outputs once more, about
_CHEAP of a forward; "full" does so too, and is one more forward in the backward but for the layer's last product.

Where a device carries MeasuredCosts, a stage is the sum of its measured layers and head instead of the formulas.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import accumulate

import numpy as np

from scheduling.model_shape import ModelShape
from scheduling.slot_cost import TILE_ROWS, SlotCost

OFFLOADED = "offloaded"  # a `full` layer whose input waits in host memory (`offloaded`)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as the cost model sees it: dense throughput that GEMMs reach, memory, and the overhead of a layer's launches."""

    name: str
    flops_per_s: float
    memory_bytes: float
    layer_launch_s: float = 1.5e-4
    segment_s: float = 1.3e-4  # added to a layer's pass by every further job in its microbatch: layers of 32B on an H100
    processors: int = 132  # tiles of a GEMM that it computes at a time; 0: no tiles
    measured: MeasuredCosts | None = None  # used in place of the formulas


# Reached, not peak, figures: about 65% of dense bf16 peak; a CPU core runs float32.
DEVICES = {
    device.name: device
    for device in (
        Device(name="h200", flops_per_s=6.4e14, memory_bytes=141e9),
        Device(name="h100", flops_per_s=6.4e14, memory_bytes=80e9),
        Device(name="a100", flops_per_s=2.0e14, memory_bytes=80e9, processors=108),
        Device(name="cpu", flops_per_s=5.0e10, memory_bytes=8e9, layer_launch_s=1e-3, segment_s=0.0, processors=0),
    )
}


def pass_features(samples: Iterable[tuple[int, int]], multiple: int = 1) -> tuple[int, int, int]:
    """Return what a pass's time depends on, of samples as (tokens, rank of the adapter): sums of rows, squared lengths, rank-tokens.

    Rows are rounded up to a `multiple`.
    """
    tokens, squares, rank_tokens = 0, 0, 0
    for length, rank in samples:
        tokens, squares, rank_tokens = tokens + length, squares + length * length, rank_tokens + length * rank
    return -(-tokens // multiple) * multiple, squares, rank_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """Seconds of one pass over a microbatch on one stage."""

    per_token: float
    per_square: float
    per_rank_token: float
    fixed: float

    def seconds(self, tokens: float, squares: float, rank_tokens: float = 0.0) -> float:
        """Return the time of a microbatch; a no-op (no tokens) takes none."""
        if not tokens:
            return 0.0
        return self.per_token * tokens + self.per_square * squares + self.per_rank_token * rank_tokens + self.fixed

    def plus(self, other: PassCost, times: float = 1.0) -> PassCost:
        """Return the cost of this pass and `times` another."""
        return PassCost(**{name: value + times * getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True, slots=True)
class StageCost:
    """Forward and backward of one stage."""

    forward: PassCost
    backward: PassCost

    def seconds(self, tokens: float, squares: float = 0.0, rank_tokens: float = 0.0) -> float:
        """Return the time of a microbatch, forward and backward."""
        return self.forward.seconds(tokens, squares, rank_tokens) + self.backward.seconds(tokens, squares, rank_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What carries messages between two ranks, in each direction."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Return the time of a message."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """What was timed on a device: a layer under each policy, the head per row that it multiplies, a step, a message."""

    layers: tuple[tuple[str, StageCost], ...]
    head: StageCost
    step_s: float
    hop: Link | None = None  # between neighbouring stages


_USUAL_TOKENS = 4096  # of a microbatch
_CHEAP = 0.02  # 2 H + F numbers a token at memory speed
HOST_BYTES_PER_S = 25e9  # between a GPU and pinned host memory: what PCIe 4 reaches, half of PCIe 5


@dataclass(frozen=True, slots=True)
class CostModel:
    """All stages of a pipeline."""

    stages: tuple[StageCost, ...]

    def slot_cost(self, mean_rank: float = 0.0, per_segment: float = 0.0, tiles: tuple[float, ...] = ()) -> SlotCost:
        """Return the slowest stage's cost in token-equivalents, as the planner uses it, with two terms that this model does not have."""
        slowest = max(self.stages, key=lambda stage: stage.seconds(_USUAL_TOKENS, 0.0, mean_rank * _USUAL_TOKENS))
        passes = (slowest.forward, slowest.backward)
        fixed = sum(one.fixed for one in passes)
        per_token = sum(one.per_token + mean_rank * one.per_rank_token for one in passes)
        per_token = max(per_token, 1e-6 * fixed, 1e-30)  # a measured stage may take no time per token
        squares = sum(one.per_square for one in passes)
        return SlotCost(per_square=squares / per_token, fixed=fixed / per_token, per_segment=per_segment, tiles=tiles)

    def token_seconds(self, mean_rank: float = 0.0) -> float:
        """Return seconds, forward plus backward on the slowest stage, per token-equivalent of a slot."""
        return max(sum(one.per_token + mean_rank * one.per_rank_token for one in (stage.forward, stage.backward)) for stage in self.stages)

    def pass_times(self, slots: Sequence[Sequence[tuple[int, int, int]]]) -> tuple[list[list[float]], list[list[float]]]:
        """Return the seconds of forwards and backwards, [stage][slot]; a slot's are those of the slowest of its parts (pass_features)."""
        passes = [[stage.forward for stage in self.stages], [stage.backward for stage in self.stages]]
        forward, backward = ([[max(one.seconds(*part) for part in parts) for parts in slots] for one in stages] for stages in passes)
        return forward, backward

    @classmethod
    def from_json(cls, listed: Sequence[dict]) -> CostModel:
        """Rebuild a model from its stages as plain data (dataclasses.asdict)."""
        return cls(tuple(StageCost(PassCost(**stage["forward"]), PassCost(**stage["backward"])) for stage in listed))


def stage_policies(layers: Sequence[int], recompute: str | Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the recomputation policy of every layer of every stage."""
    policies = (recompute,) * sum(layers) if isinstance(recompute, str) else tuple(recompute)
    return tuple(policies[end - count : end] for end, count in zip(accumulate(layers), layers, strict=True))


def analytic_cost(
    shape: ModelShape,
    device: Device,
    layers: Sequence[int],
    tensor: int = 1,
    recompute: str | Sequence[str] = "none",
    head_share: float = 1.0,
    linear_speed: float = 1.0,
) -> CostModel:
    """Derive each stage's cost: it has `layers`, the head `head_share` of the rows, frozen linears `linear_speed` times the rate."""
    rate = device.flops_per_s * tensor
    stages = []
    for index, (num_layers, policies) in enumerate(zip(layers, stage_policies(layers, recompute), strict=True)):
        linear = 2 * shape.layer_params * num_layers / (rate * linear_speed)
        attention = 2 * shape.num_heads * shape.head_dim * num_layers / rate  # QK and PV, each half under the causal mask
        lora = 2 * shape.lora_width * num_layers / rate
        head = 4 * shape.head_params * head_share / rate if index == len(layers) - 1 else 0.0
        launches = device.layer_launch_s * num_layers
        shares = {policy: policies.count(policy) / max(1, num_layers) for policy in ("none", "cheap", "full")}
        recomputed = shares["full"] + _CHEAP * (shares["full"] + shares["cheap"])  # of a forward
        last_product = (
            shares["full"] * shape.hidden_size * shape.ffn_size * max(1, shape.top_k) / max(1, shape.layer_params) * (not shape.post_norms)
        )
        forward = PassCost(per_token=linear + head, per_square=attention, per_rank_token=lora, fixed=launches)
        backward = PassCost(
            per_token=linear * (1 + recomputed - last_product),
            per_square=attention * (2.5 + recomputed),
            per_rank_token=lora * (2 + recomputed),
            fixed=launches * (1 + shares["full"]),
        )
        stages.append(StageCost(forward, backward))
    return CostModel(tuple(stages))


def summed(costs: Sequence[StageCost]) -> StageCost:
    """Return the cost of doing all of these, one after another."""
    return StageCost(reduce(PassCost.plus, (cost.forward for cost in costs)), reduce(PassCost.plus, (cost.backward for cost in costs)))


def stage_costs(
    shape: ModelShape,
    device: Device,
    layers: Sequence[int],
    tensor: int = 1,
    recompute: str | Sequence[str] = "none",
    head_share: float = 1.0,
    to_host_bytes: float = 0.0,
    linear_speed: float = 1.0,
) -> CostModel:
    """Return the cost of each stage as it was measured on the device, by analytic_cost where it was not.

    Where inputs of `full` layers wait in host memory, each is `to_host_bytes` per token, and its layer takes at least as long as the copy.
    """
    if device.measured is None:
        model = analytic_cost(shape, device, layers, tensor, recompute, head_share, linear_speed)
        layer = analytic_cost(shape, device, (1, 0), tensor).stages[0].forward
    else:
        model = _measured_costs(device.measured, layers, recompute, head_share)
        layer = dict(device.measured.layers)["full"].forward
    late = max(0.0, to_host_bytes / HOST_BYTES_PER_S - layer.per_token)
    stages = []
    for index, (stage, policies) in enumerate(zip(model.stages, stage_policies(layers, recompute), strict=True)):
        waited = late * offloaded(policies, index == 0).count(OFFLOADED)
        stages.append(StageCost(replace(stage.forward, per_token=stage.forward.per_token + waited), stage.backward))
    return CostModel(tuple(stages))


def _measured_costs(measured: MeasuredCosts, layers: Sequence[int], recompute: str | Sequence[str], head_share: float) -> CostModel:
    of_policy, head = dict(measured.layers), measured.head
    head = StageCost(*(replace(one, per_token=one.per_token * head_share) for one in (head.forward, head.backward)))
    chosen = stage_policies(layers, recompute)
    parts = [[*(of_policy[policy] for policy in policies), *[head] * (index == len(layers) - 1)] for index, policies in enumerate(chosen)]
    return CostModel(tuple(map(summed, parts)))


def recomputing(cost: StageCost, policy: str) -> StageCost:
    """Return what a layer that recomputes nothing costs under a policy, by its own forward."""
    again = {"none": 0.0, "cheap": _CHEAP, "full": 1.0}[policy]  # the last product is a share of a shape that is not known here
    return StageCost(cost.forward, cost.backward.plus(cost.forward, again))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed pass."""

    backward: bool
    tokens: float
    squares: float
    rank_tokens: float
    seconds: float


def refine(cost: StageCost, measurements: Sequence[Measurement]) -> StageCost:
    """Refit the passes of a stage, or of a part of one, to their timings; coefficients that the timings cannot separate keep their ratio.

    Least squares over scale factors of the model's four terms, kept >= 0 and pulled weakly to their common scale. Errors are relative to
    the model's times (relative to the measured ones they would favour quick passes). A pass that took 5 times as long as others, relative
    to the model, is ignored: it compiled a kernel, or the machine was busy.
    """
    rows = {backward: [m for m in measurements if m.backward == backward and m.seconds > 0] for backward in (False, True)}
    return StageCost(*(_refit(one, rows[b]) if rows[b] else one for b, one in ((False, cost.forward), (True, cost.backward))))


_PULL = 1e-3  # weight of the pull to the common scale, relative to one measurement
_SLOW = 5.0


def _refit(cost: PassCost, rows: Sequence[Measurement]) -> PassCost:
    """Find s with minimal sum((term . s - seconds)^2 / expected^2) + pull * sum((s / common - 1)^2), s >= 0, by coordinate descent.

    `expected` is the model's time at the common scale, the median of measured / modelled.
    """
    base = asdict(cost)
    modelled = [cost.seconds(m.tokens, m.squares, m.rank_tokens) for m in rows]
    common = statistics.median(m.seconds / time for m, time in zip(rows, modelled, strict=True))
    kept = [(m, common * time) for m, time in zip(rows, modelled, strict=True) if m.seconds < _SLOW * common * time]
    times = np.array([expected for _, expected in kept])
    goals = np.array([m.seconds for m, _ in kept]) / times
    features = np.array([(m.tokens, m.squares, m.rank_tokens, 1.0) for m, _ in kept])
    shares = features * list(base.values()) / times[:, None]  # of the terms in the time of each measurement
    scale = np.full(4, common)
    for _ in range(500):
        for k in range(4):
            rest = goals - shares @ scale + shares[:, k] * scale[k]
            curvature = shares[:, k] @ shares[:, k] + _PULL / common**2
            scale[k] = max(0.0, (rest @ shares[:, k] + _PULL / common) / curvature)
    return replace(cost, **{name: float(value * s) for (name, value), s in zip(base.items(), scale, strict=True)})


def split_layers(num_layers: int, num_stages: int, head_layers: float = 0.0) -> tuple[int, ...]:
    """Split layers over stages so that the slowest stage is as fast as can be, the head counting as `head_layers` of the last stage.

    Every stage keeps at least one layer. Raises ValueError when there are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ValueError(f"{num_layers} layers cannot be split over {num_stages} stages")
    layers, extra = [1] * num_stages, [0.0] * num_stages
    extra[-1] = head_layers
    for _ in range(num_layers - num_stages):
        stage = min(range(num_stages), key=lambda stage: (layers[stage] + extra[stage], stage))
        layers[stage] += 1
    return tuple(layers)


def head_layers(
    shape: ModelShape, device: Device, tokens: int, tensor: int = 1, recompute: str | Sequence[str] = "none", head_share: float = 1.0
) -> float:
    """Return the cost of the head over a microbatch of `tokens`, forward and backward, in layers (their mean)."""
    body, head = stage_costs(shape, device, (shape.num_layers, 0), tensor, recompute, head_share).stages
    return shape.num_layers * head.seconds(tokens) / body.seconds(tokens)


def head_share(target_share: float, tokens: int, chunk_rows: int) -> float:
    """Return the rows that the head multiplies per token of a microbatch; `target_share` of the tokens are targets.

    The loss splits its rows into chunks of one height, at most `chunk_rows`, and pads the last one: by half a chunk on average, and every
    microbatch has at least one. At most all tokens are counted, so that 1 gives 1.
    """
    height = min(chunk_rows, tokens)
    return min(tokens, max(height, target_share * tokens + height / 2)) / tokens


TILE_COLUMNS = 256  # of the GEMMs
_MAX_TILES = 256  # of rows: 32,768 tokens


def linear_tiles(shape: ModelShape, device: Device, tensor: int = 1) -> tuple[float, ...]:
    """Return SlotCost.tiles: the time of a layer's linears, forward and backward, by row tiles, in tokens that fill every wave of tiles.

    The device computes `processors` tiles of a GEMM at a time, and an incomplete last wave takes as long as a full one: 4,096 rows of 5,120
    columns are 640 tiles, five waves of 132, as many as 3,329 rows need. Empty where the device has no tiles, and for experts, whose many
    tiles are partly filled at any number of rows.
    """
    if not device.processors or shape.num_experts:
        return ()
    query, key_value = shape.num_heads * shape.head_dim // tensor, shape.num_kv_heads * shape.head_dim // tensor
    ffn = shape.ffn_size // tensor
    hidden = shape.hidden_size
    forward = [(hidden, query + 2 * key_value), (query, hidden), (hidden, 2 * ffn), (ffn, hidden)]
    products = [*forward, *((columns, inner) for inner, columns in forward)]  # dX has the weight's sides the other way around
    wave = device.processors * TILE_ROWS * TILE_COLUMNS
    weights = sum(inner * columns for inner, columns in products)

    def tokens(row_tiles: int) -> float:
        waves = ((inner, -(-row_tiles * -(-columns // TILE_COLUMNS) // device.processors)) for inner, columns in products)
        return sum(inner * count for inner, count in waves) * wave / weights

    return tuple(map(tokens, range(_MAX_TILES + 1)))


def offloaded(policies: Sequence[str], is_first: bool) -> tuple[str, ...]:
    """Return a stage's policies with OFFLOADED for the `full` layers whose input waits in host memory.

    The input of the uppermost stays, since its backward comes first, and so does the stage's own unless it `is_first`: it was received,
    and the executor holds it.
    """
    full = [layer for layer, policy in enumerate(policies) if policy == "full"]
    leaving = set(full[:-1]) - (set() if is_first else {0})
    return tuple(OFFLOADED if layer in leaving else policy for layer, policy in enumerate(policies))
