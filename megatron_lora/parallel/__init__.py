"""The ranks: who is where, which layers each holds, what they share and what they send."""

from megatron_lora.parallel.import_megatron import prepare

prepare()
