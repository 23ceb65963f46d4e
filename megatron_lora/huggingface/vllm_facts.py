"""What vLLM makes of the fields of an adapter_config.json.

The facts are those of its release FACTS_OF, of vllm/lora/peft_helper.py there: a field that its reader does not know is ignored.
"""

from collections.abc import Mapping
from typing import Any

from megatron_lora.huggingface.model_card import VLLM_RANKS

FACTS_OF = "0.32"
HONOURED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
REFUSED = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # of init_lora_weights; another word changes the base weights
DESCRIPTIVE = ("peft_type", "task_type", "peft_version", "inference_mode", "megatron_core", "qalora_group_size", "bias", "revision")
DESCRIPTIVE += ("init_lora_weights", "base_model_name_or_path", "auto_mapping", "modules_to_save", *REFUSED)


def readings(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what vLLM honours, ignores and refuses of the fields that a config sets."""
    is_set = {key: value for key, value in config.items() if value not in (None, False, [], {}, "")}
    refuses = [f"{key}: {is_set[key]}" for key in REFUSED if key in is_set]
    init, saved = config.get("init_lora_weights", True), set(map(str, config.get("modules_to_save") or ())) - {"classifier", "score"}
    refuses += [f"init_lora_weights: {init}"] if isinstance(init, str) and init.lower() not in STARTS else []
    refuses += [f"modules_to_save: {sorted(saved)}"] if saved else []
    refuses += [f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else []
    largest = largest_rank(config)
    refuses += [f"rank {largest}, of which {VLLM_RANKS[-1]} is the largest"] if largest > VLLM_RANKS[-1] else []
    return {
        "honours": [f"{key}: {is_set[key]}" for key in HONOURED if key in is_set],
        "ignores": [key for key in is_set if key not in HONOURED and key not in DESCRIPTIVE],
        "refuses": refuses,
    }


def largest_rank(config: Mapping[str, Any]) -> int:
    """Return the largest rank that a config, which may be wrong, gives a linear."""
    patterns = config.get("rank_pattern")
    found = (config.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ()))
    return max((r for r in found if isinstance(r, int)), default=8)
