"""The model card of an adapter, its README.md: front matter for hubs, what the adapter is, how it is loaded and served.

It also names the base model's weights by their digest (base_files.py), so that a merge knows them again.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lora.files import read_regular

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be in vLLM 0.32
OF_TEXT = "model.language_model."
DIRECTORY = "path/of/this/directory"
BASE_DIGEST = re.compile(r"SHA-256 `([0-9a-f]{64})`")
SETTINGS = re.compile(r"parameters, rank (\d+), lora_alpha ([\d.e+-]+\d)(, rank-stabilised scale)?")


def serve_command(base_model: str, r: int, name: str, directory: str, revision: str | None = None) -> str:
    """Return the command that serves an adapter with vLLM; a rank beyond its buckets gets the largest."""
    bucket = next((each for each in VLLM_RANKS if each >= r), VLLM_RANKS[-1])
    pinned = f" --revision {shlex.quote(revision)}" if revision else ""
    lora = f"--enable-lora --max-lora-rank {bucket} --lora-modules {shlex.quote(f'{name}={directory}')}"
    return f"vllm serve {shlex.quote(base_model)}{pinned} {lora}"


def model_card(config: Mapping[str, Any], num_parameters: int, base_digest: str, name: str, notes: Sequence[str]) -> str:
    """Return the card's text, for an adapter_config.json; each of the `notes` is a paragraph at its end."""
    base_model, revision = config["base_model_name_or_path"], config["revision"]
    base, pinned = json.dumps(base_model), f", revision={json.dumps(revision)}" if revision else ""
    known = [f"revision `{revision}`"] if revision else []
    known += [f"weights of SHA-256 `{base_digest}`"] if base_digest else []
    of_base = f"\nOf the base model: {', '.join(known)}.\n" if known else ""
    largest = max([config["r"], *config.get("rank_pattern", {}).values()])
    modules, loader = config["target_modules"], "AutoModelForCausalLM"
    if OF_TEXT in re.sub(r"\\", "", str(modules)):  # the text part of a model of text and images
        loader = "AutoModelForImageTextToText"
    modules = f"`{modules}`" if isinstance(modules, str) else ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    served = f"With vLLM:\n\n```\n{serve_command(base_model, largest, name, DIRECTORY, revision)}\n```\n"
    if config.get("use_dora"):
        served = "vLLM loads no DoRA adapter: `megatron-lora merge` makes a model of it that every server loads.\n"
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- {json.dumps(f"base_model:adapter:{base_model}")}
- lora
- transformers
---

# {"DoRA" if config.get("use_dora") else "LoRA"} adapter for {base_model}

Trained with megatron-lora. {num_parameters:,} parameters, rank {config["r"]}, lora_alpha {config["lora_alpha"]:g}\
{", rank-stabilised scale" if config["use_rslora"] else ""}, on {modules}.
{of_base}
```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained({base}{pinned})
model = PeftModel.from_pretrained(base, "{DIRECTORY}")
```

{served}""" + "".join(f"\n{note}\n" for note in notes)


def base_digest_of(card: Path) -> str:
    """Return the digest of the base model's weights that a card names, or nothing."""
    found = BASE_DIGEST.search(_text(card))
    return found[1] if found else ""


def settings_of(card: Path) -> dict[str, Any]:
    """Return r, lora_alpha and use_rslora of the adapter that a card describes; nothing where it is none of ours."""
    found = SETTINGS.search(_text(card))
    return {"r": int(found[1]), "lora_alpha": json.loads(found[2]), "use_rslora": bool(found[3])} if found else {}


def _text(card: Path) -> str:
    try:
        return read_regular(card).decode("utf-8", "replace")
    except OSError:
        return ""
