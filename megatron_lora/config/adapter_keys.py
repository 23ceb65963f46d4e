"""The keys of a job that say what its adapter is: which linears it adapts, with which rank and scale, and how it starts.

PEFT's names. schema.py's JobConfig has them beside the others.
"""

import dataclasses
import math

from megatron_lora.config.keys import key
from megatron_lora.config.rules import MODULES, null_or, number, path_of, subset_of, truth, whole_number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterKeys:
    """What a job adds to the frozen model."""

    r: int = key(16, whole_number("a LoRA rank", 1, 256), "rank of A and B")
    lora_alpha: float = key(32.0, number("a LoRA alpha", 0, above=True), "the adapter's output is multiplied by `lora_alpha / r`")
    lora_dropout: float = key(
        0.0, number("a dropout probability", 0, 1, below=True), "share of the adapter's input features that are dropped"
    )
    use_rslora: bool = key(False, truth(), "true: the adapter's output is multiplied by `lora_alpha / sqrt(r)`")
    target_modules: tuple[str, ...] = key(  # given once the base model is known (consistent_job.with_targets)
        None,
        null_or(subset_of("module names", MODULES)),
        "linears of each layer that get an adapter; a Phi-3 has `qkv_proj`, `o_proj`, `gate_up_proj` and `down_proj`. null: all of "
        "the base model's, those of its experts where `experts` is true",
    )
    experts: bool = key(
        False,
        truth(),
        "of a mixture of experts, true: `gate_proj`, `up_proj` and `down_proj` of each expert get an adapter too, or those of them that "
        "`target_modules` names; the PEFT directory says `lora_dropout: 0`, which is all that PEFT takes there",
    )
    expert_r: int | None = key(
        None,
        null_or(whole_number("a LoRA rank", 1, 256)),
        "rank of A and B of each expert, with the scale `lora_alpha / expert_r`; null: `r`",
    )
    init_adapter: str | None = key(
        None,
        null_or(path_of("a PEFT directory")),
        "adapter that the job starts from, of the same `r`, `lora_alpha`, `use_rslora` and `target_modules`; null: PEFT's start, "
        "A random and B zero",
    )

    @property
    def expert_rank(self) -> int:
        """The rank of experts' adapters; 0 where they are frozen."""
        return (self.expert_r or self.r) * self.experts

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
