"""From `base_model` in a config to a directory on this machine: that directory, or a snapshot of a Hugging Face hub repository.

Only configs, tokenizer files and safetensors are fetched; without a network the hub's cache is
used.
"""

import os
import re
from pathlib import Path
from typing import cast

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import check_regular

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


def resolve_base_model(base_model: str) -> Path:
    """Return the model's directory, fetched if `base_model` is a hub id; UserError when it is neither a directory nor found on the hub."""
    path = Path(base_model)
    if path.is_dir():
        check_regular(path)
        return path
    if path.exists():
        raise UserError(f"base_model: {base_model!r} is a file; give the directory that holds config.json and the safetensors files")
    if not HUB_ID.fullmatch(base_model) or base_model.endswith((".safetensors", ".bin", ".gguf")):
        raise UserError(
            f"base_model: {base_model!r}: no such directory in {os.getcwd()}; correct the path, or give a hub id like org/model"
        )
    return _fetch(base_model)


def _fetch(hub_id: str) -> Path:
    """Return the snapshot of a hub repository, from the network or else from the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    http_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)  # of the HTTP library that the hub's client uses
    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError, *http_errors) as error:
        raise UserError(
            f"base_model: {hub_id!r} is no directory here and could not be fetched from the hub ({one_line(error, 120)}); "
            "correct the path or id, or fetch the model where there is a network"
        ) from None
