"""A config after planning.resolve has chosen its open values: what the ranks train by.

    resolved = planning.resolve.resolve(config, ...)       # from a RunConfig that may say `auto` or null
    resolved.microbatch_tokens + 1                         # an int; `precision` is bf16 or fp32; every stage has its layers

Precision, layers_per_stage, microbatch_tokens, recompute, activation_offloading and adapter_memory are chosen. `backend: auto`
stays: each rank resolves it on its device (model/backends.py). A resolved config equals a RunConfig with the
same values, and the run's config.yaml has them.
"""

from __future__ import annotations

import dataclasses

from megatron_lora.config.schema import RunConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResolvedConfig(RunConfig):
    """A RunConfig whose planned keys have values: `recompute` is one policy, or one for each layer, and `layers_per_stage` is given."""

    microbatch_tokens: int  # pyright: ignore[reportGeneralTypeIssues]  narrower than RunConfig's, which may be "auto"
    activation_offloading: bool  # pyright: ignore[reportGeneralTypeIssues]  likewise
    adapter_memory: float  # pyright: ignore[reportGeneralTypeIssues]  likewise

    def __post_init__(self):
        keys = ("precision", "microbatch_tokens", "recompute", "activation_offloading", "adapter_memory")
        open_keys = [name for name in keys if getattr(self, name) == "auto"]
        assert not open_keys and self.parallel.layers_per_stage is not None, f"{open_keys or 'layers_per_stage'} is not resolved"

    @classmethod
    def of(cls, config: RunConfig) -> ResolvedConfig:
        """Return a config whose choices are all made as a resolved one."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)})

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of each pipeline stage."""
        assert self.parallel.layers_per_stage is not None
        return self.parallel.layers_per_stage

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RunConfig):
            return NotImplemented
        return all(getattr(self, field.name) == getattr(other, field.name) for field in dataclasses.fields(RunConfig))

    __hash__ = RunConfig.__hash__
