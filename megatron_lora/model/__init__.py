"""The frozen stage and the adapters on it."""

import megatron_lora.parallel  # noqa: F401  before megatron-core, whose import it prepares
