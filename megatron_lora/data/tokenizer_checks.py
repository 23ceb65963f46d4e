"""Whether a tokenizer that transformers loaded is the one that the model was trained with, as far as it shows.

check_spaces(tokenizer, directory)        # UserError for one that drops the spaces between words
for line in doubts_of(tokenizer): ...     # what is not certain, to be shown
"""

import json
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_lora.errors import UserError

PROBE = "Hello world, these are words"
# What the pre-tokenizers of Mistral's Tekken tokenizers split by; many published tokenizer.json have Llama 3's expression in its place.
TEKKEN_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"


def check_spaces(tokenizer: PreTrainedTokenizerBase, directory: object) -> None:
    """Raise UserError for a tokenizer whose tokens hold every letter of a text and none of its spaces.

    transformers before 5.16 makes such a one of byte-level Llama tokenizers.
    """
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    text = cast(str, tokenizer.decode(ids)).replace(str(tokenizer.unk_token), "")
    if text.strip() == PROBE.replace(" ", ""):
        raise UserError(
            f"base_model: the tokenizer in {directory} drops the spaces between words; install a transformers that reads it rightly "
            "(5.16 or newer), or copy the model's tokenizer files again"
        )


def doubts_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Say what about a tokenizer, loaded from a model's directory, is not certain: a line each."""
    try:
        config = json.loads((Path(tokenizer.name_or_path) / "config.json").read_bytes())
    except (OSError, ValueError):
        config = {}  # it is the model's to be refused for (huggingface/architecture.py)
    if not isinstance(config, dict) or not str(config.get("model_type")).startswith(("mistral", "ministral")):
        return ()
    splitting = json.loads(cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer.to_str())["pre_tokenizer"]
    text = json.dumps(splitting)
    if '"Split"' not in text or json.dumps(TEKKEN_LETTERS)[1:-1] in text:
        return ()
    return (
        "base_model: its tokenizer.json splits words by the regular expression that Mistral models were published with by mistake, and "
        'texts are tokenised by it; write "fix_mistral_regex": true into tokenizer_config.json if the model is served with the correction',
    )
