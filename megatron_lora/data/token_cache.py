"""Tokenised datasets on disk: each distinct one is made once, and every job, rank and later run reads it back.

A dataset's file is named by the hash of all that decides its tokens: the bytes of the dataset file,
the format, the tokenizer, the chat template and its settings, `train_on_inputs`, `sequence_len`, and
the versions of the packages that tokenise. It is written under a temporary name and renamed, so several
ranks may write it at once. It holds a checksum; a file that does not match it is not used.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_lora.data.chat_template import ChatSettings

FORMAT = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A tokenised file: sample i is tokens[offsets[i]:offsets[i + 1]], made of record records[i] of the file's `num_records`."""

    tokens: np.ndarray  # [sum of lengths] int32
    targets: np.ndarray  # [sum of lengths] bool
    offsets: np.ndarray  # [samples + 1] int64
    records: np.ndarray  # [samples] int64
    num_records: int
    num_truncated: int
    num_dropped: int
    notes: Mapping[str, int]

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (record number, tokens, targets) of every sample."""
        for index, number in enumerate(self.records.tolist()):
            span = slice(*self.offsets[index : index + 2])
            yield number, self.tokens[span], self.targets[span]


def dataset_key(
    path: str | Path, tokenizer_fingerprint: str, format: str, train_on_inputs: bool, sequence_len: int, chats: ChatSettings
) -> str:
    """Hash everything that decides a dataset's tokens."""
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    parts = [FORMAT, content, Path(path).suffix, tokenizer_fingerprint, format, train_on_inputs, sequence_len, dataclasses.astuple(chats)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a fast tokenizer: its vocabulary and rules, its special tokens, its chat template, and the packages that run it."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    packages = [version(package) for package in ("transformers", "tokenizers", "jinja2")]
    parts = [cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer.to_str(), tokenizer.chat_template, special, packages]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def store(directory: str | Path, key: str, dataset: Dataset) -> None:
    """Write a dataset, completely or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(dataset)
    handle, temporary = tempfile.mkstemp(prefix=".dataset-", dir=directory)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"sha256": _checksum(tensors)})
        os.replace(temporary, _file(directory, key))
    finally:
        Path(temporary).unlink(missing_ok=True)


def fetch(directory: str | Path, key: str) -> Dataset | None:
    """Read a dataset back; None when it is absent or damaged."""
    file = _file(directory, key)
    try:
        if not file.is_file():
            return None
        with safe_open(file, framework="np") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (the handle is no mapping)
            stored = (archive.metadata() or {}).get("sha256")
    except (SafetensorError, OSError):
        return None
    if stored != _checksum(tensors):
        return None
    num_records, num_truncated, num_dropped = tensors["counts"].tolist()
    return Dataset(
        tokens=tensors["tokens"],
        targets=tensors["targets"].astype(bool),
        offsets=tensors["offsets"],
        records=tensors["rows"],
        num_records=num_records,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        notes=json.loads(tensors["notes"].tobytes()),
    )


def _file(directory: str | Path, key: str) -> Path:
    return Path(directory) / f"{key[:40]}.safetensors"


def _tensors(dataset: Dataset) -> dict[str, np.ndarray]:
    counts = [dataset.num_records, dataset.num_truncated, dataset.num_dropped]
    return {
        "tokens": dataset.tokens,
        "targets": dataset.targets.astype(np.uint8),
        "offsets": dataset.offsets,
        "rows": dataset.records,
        "counts": np.array(counts, dtype=np.int64),
        "notes": np.frombuffer(json.dumps(dataset.notes).encode(), dtype=np.uint8),
    }


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape};".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def cache_dir() -> Path:
    """Where tokenised datasets are kept: MEGATRON_LORA_CACHE, or the user's cache directory."""
    own = os.environ.get("MEGATRON_LORA_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(shared) / "megatron-lora"
