"""How a run is spread over ranks: the keys of `parallel`, and who is where.

Rank = t + tensor * (d + data * p) for tensor rank t, replica d and pipeline stage p.

    ParallelConfig(pipeline=2, tensor=4).rank_at(stage=1, replica=0, tensor_rank=3)      # 7
"""

import dataclasses

from megatron_lora.config.keys import build, key
from megatron_lora.config.rules import accepts, list_of, null_or, truth, whole_number
from megatron_lora.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over ranks."""

    pipeline: int = key(1, whole_number("a number of pipeline stages", 1), "stages that the layers are cut into", "stages")
    tensor: int = key(
        1,
        whole_number("a number of tensor-parallel ranks", 1),
        "ranks that share each layer; it must divide the model's query heads, key/value heads and feed-forward features",
        "ranks",
    )
    expert: int = key(
        1,
        whole_number("a number of ranks", 1),
        "ranks that a layer's experts are divided among, complete: 1, or as many as `tensor`, whose ranks they are. With 1 each "
        "tensor rank has a part of every expert",
        "ranks",
    )
    data: int = key(1, whole_number("a number of replicas", 1), "replicas of the whole pipeline, which share each batch", "replicas")
    sequence: bool = key(False, truth(), "true: the tensor ranks also share the activations between layers; needs `tensor` above 1")
    layers_per_stage: tuple[int, ...] | None = key(
        None,
        null_or(list_of("layer counts", whole_number("a number of layers", 1))),
        "layers of each stage, one number a stage; null: chosen so that all stages take equally long. The head counts there as "
        "the layers that it costs for the tokens that are targets",
        "layers",
    )

    @property
    def world_size(self) -> int:
        """Ranks that the run needs."""
        return self.pipeline * self.ranks_per_stage

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that hold parts or copies of one stage."""
        return self.tensor * self.data

    @property
    def norm_delay(self) -> int:
        """Slots that a stage's gradient norm takes: 1 where it is first summed over other ranks of the stage, else 0."""
        return int(self.ranks_per_stage > 1)

    @property
    def row_multiple(self) -> int:
        """What the rows of a microbatch are padded to a multiple of: the tensor ranks under sequence parallelism, else 1."""
        return self.tensor if self.sequence else 1

    def stage_of(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return rank // self.ranks_per_stage

    def replica_of(self, rank: int) -> int:
        """Return the replica that a rank belongs to."""
        return rank // self.tensor % self.data

    def rank_at(self, stage: int, replica: int, tensor_rank: int) -> int:
        """Return the rank of a place in the layout."""
        return tensor_rank + self.tensor * (replica + self.data * stage)


@accepts("a mapping of the keys below")
def parallel(path: str, value: object) -> ParallelConfig:
    """Accept a mapping of ParallelConfig's keys that agree with each other."""
    config = build(ParallelConfig, path, {} if value is None else value)
    if config.sequence and config.tensor == 1:
        raise UserError(f"{path}.sequence: true needs {path}.tensor above 1, which is 1; set one of the two")
    if config.expert not in (1, config.tensor):
        raise UserError(
            f"{path}.expert: {config.expert} is neither 1 nor {path}.tensor, which is {config.tensor}: experts are divided among ranks "
            "that share a microbatch, never among replicas; set both to the same number, or remove expert"
        )
    layers = config.layers_per_stage
    if layers is not None and len(layers) != config.pipeline:
        raise UserError(
            f"{path}.layers_per_stage: {list(layers)} is for {len(layers)} stages and {path}.pipeline is {config.pipeline}; "
            f"give {config.pipeline} layer counts, or null for stages that take equally long"
        )
    return config
