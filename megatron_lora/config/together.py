"""Keys of a run that contradict each other although each value alone is right."""

from __future__ import annotations

from typing import Protocol, TypeVar

from megatron_lora.errors import UserError


class Keys(Protocol):
    """The keys of schema.RunConfig that are compared."""

    @property
    def activation_offloading(self) -> bool | str: ...

    @property
    def deterministic(self) -> bool: ...

    @property
    def backend(self) -> str: ...

    @property
    def may_run_again(self) -> bool: ...


Config = TypeVar("Config", bound=Keys)


def check_together(config: Config) -> Config:
    """Return a config whose keys agree with each other; UserError in one line where two contradict."""
    if config.activation_offloading is True and not config.may_run_again:
        raise UserError("activation_offloading: true moves inputs of `full` layers, and recompute names none; use recompute: full, or auto")
    if config.deterministic and config.backend == "te":
        raise UserError("deterministic: true takes torch's attention, and backend is 'te'; use auto or torch")
    return config
