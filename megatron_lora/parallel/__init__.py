"""The ranks: who is where, which layers each holds, what they share and what they send."""

from megatron_lora.parallel.without_triton import stand_in_for_experts

stand_in_for_experts()
