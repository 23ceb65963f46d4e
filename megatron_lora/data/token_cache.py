"""Tokenised datasets on disk: each distinct one is made once, and every job, rank and later run maps it into memory.

A dataset's file is named by the hash of all that decides its tokens: the bytes of the dataset file, the format, the tokenizer, the chat
template and its settings, `train_on_inputs`, `sequence_len`, the versions of the packages that tokenise, and the sources of this room. It
is a safetensors file, written under a temporary name and renamed, so several ranks may write it at once. It holds a checksum; a file that
does not match it is not used. What grows with the data is spooled to disk while it is made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from megatron_lora.files import open_new

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IN_MEMORY_BYTES = 1 << 26  # of tokens, before they are spooled to disk
MOST_HEADER_BYTES = 1 << 24
COUNTS = ("num_targets", "borders", "num_chosen", "num_prompt")
SMALL: dict[str, tuple[str, type]] = {
    **dict.fromkeys(("offsets", "records"), ("I64", np.int64)),
    **dict.fromkeys(COUNTS, ("I32", np.int32)),
    "weights": ("F32", np.float32),
}
LAYOUT = SMALL | {"tokens": ("I32", np.int32), "targets": ("BOOL", np.bool_)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A tokenised file: sample i is tokens[offsets[i]:offsets[i + 1]], made of record records[i] of the file's `num_records`."""

    tokens: np.ndarray  # [sum of lengths] int32
    targets: np.ndarray  # [sum of lengths] bool
    offsets: np.ndarray  # [samples + 1] int64
    records: np.ndarray  # [samples] int64
    num_targets: np.ndarray  # [samples] int32
    borders: np.ndarray  # [samples] int32: of a pair, where its second sequence begins; else 0
    num_chosen: np.ndarray  # [samples] int32: of a pair, targets of its first sequence; else 0
    num_prompt: np.ndarray  # [samples] int32: of a pair or a labelled answer, tokens of its prompt; else 0
    weights: np.ndarray  # [samples] fp32: of their losses; below 0 where a label is false
    num_records: int
    num_truncated: int = 0
    num_dropped: int = 0  # without a target before the cut
    num_bad: int = 0
    largest_token: int = -1
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bad: tuple[str, ...] = ()  # of the bad records, the first of each kind: what follows the file's name in their errors


@dataclasses.dataclass(slots=True, kw_only=True)
class Chunk:
    """What consecutive records of a file become; the fields are Dataset's, `records` counted from the chunk's first.

    `counts` has num_records, num_truncated, num_dropped and num_bad.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray  # [samples] int64
    records: np.ndarray
    borders: np.ndarray
    num_prompt: np.ndarray
    weights: np.ndarray
    counts: Counter[str]
    notes: Counter[str]
    bad: list[str]


class DatasetBuilder:
    """Puts chunks together to a file, of which only what is kept per sample is in memory meanwhile."""

    def __init__(self, directory: Path | None):
        """Spool to a directory, which need not exist yet; None: the system's for temporary files."""
        self._directory = directory
        spool = functools.partial(tempfile.SpooledTemporaryFile, IN_MEMORY_BYTES, dir=None if directory is None else str(directory))
        self._spools = {"tokens": spool(), "targets": spool()}
        self._small: dict[str, list[np.ndarray]] = {name: [] for name in ("lengths", "records", *COUNTS, "weights")}
        self._counts: Counter[str] = Counter()
        self._largest = -1
        self.notes: Counter[str] = Counter()
        self.bad: list[str] = []

    def add(self, chunk: Chunk) -> None:
        """Append a chunk."""
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
        self._spools["tokens"].write(chunk.tokens.astype(np.int32, copy=False).tobytes())
        self._spools["targets"].write(chunk.targets.tobytes())
        starts = np.cumsum(chunk.lengths) - chunk.lengths
        edges = np.stack([starts, starts + chunk.borders], axis=1).ravel()  # of samples that are no pairs the same twice: no target there
        parts = np.add.reduceat(chunk.targets, edges, dtype=np.int32).reshape(-1, 2) if len(starts) else np.empty((0, 2), np.int32)
        self._small["lengths"].append(chunk.lengths)
        self._small["records"].append(chunk.records + self._counts["num_records"])
        self._small["num_targets"].append(parts.sum(axis=1))
        self._small["borders"].append(chunk.borders)
        self._small["num_chosen"].append(parts[:, 0])
        self._small["num_prompt"].append(chunk.num_prompt)
        self._small["weights"].append(chunk.weights)
        self._counts.update(chunk.counts)
        self._largest = max(self._largest, int(chunk.tokens.max(initial=-1)))
        self.notes.update(chunk.notes)
        self.bad += chunk.bad

    @property
    def num_records(self) -> int:
        """Records so far."""
        return self._counts["num_records"]

    def write(self, file: IO[bytes]) -> None:
        """Write the dataset as a safetensors file."""
        joined = {name: np.concatenate(arrays or [np.empty(0, np.int64)]) for name, arrays in self._small.items()}
        small = {
            "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(joined["lengths"], dtype=np.int64)]),
            "records": joined["records"],
            **{name: joined[name].astype(np.int32) for name in COUNTS},
            "weights": joined["weights"].astype(np.float32),
        }
        entries, end = {}, 0
        sizes = {name: array.nbytes for name, array in small.items()} | {name: spool.tell() for name, spool in self._spools.items()}
        for name, (code, kind) in LAYOUT.items():
            shape = [sizes[name] // np.dtype(kind).itemsize]
            entries[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        facts = dict(self._counts) | {"largest_token": self._largest, "notes": self.notes, "bad": self.bad}
        header = {"__metadata__": {"facts": json.dumps(facts), "sha256": "0" * 64}, **entries}
        start = len(_header_bytes(header))
        file.write(_header_bytes(header))
        for array in small.values():
            file.write(array.tobytes())
        for spool in self._spools.values():
            spool.seek(0)
            shutil.copyfileobj(spool, file, 1 << 20)
            spool.close()
        file.flush()
        header["__metadata__"]["sha256"] = _checksum(file, header, start)
        file.seek(0)
        file.write(_header_bytes(header))
        file.flush()


def read_dataset(file: IO[bytes], check: bool = True) -> Dataset | None:
    """Map a dataset's file into memory; None if it is damaged."""
    try:
        file.seek(0)
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER_BYTES:
            return None
        header = json.loads(file.read(size))
        start = 8 + size
        if check and header["__metadata__"]["sha256"] != _checksum(file, header, start):
            return None
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        spans = {name: slice(*(start + offset for offset in header[name]["data_offsets"])) for name in LAYOUT}
        arrays = {name: mapped[spans[name]].view(kind) for name, (_, kind) in LAYOUT.items()}
        facts = json.loads(header["__metadata__"]["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    small = {name: arrays[name].copy() for name in SMALL}
    return Dataset(**(arrays | small), **(facts | {"bad": tuple(facts["bad"])}))


def dataset_key(content: str, tokenizer_fingerprint: str, *settings: object) -> str:
    """Hash everything that decides a dataset's tokens; `content` is a hash of its records, and `settings` are those of the job."""
    parts = [source_digest(), content, tokenizer_fingerprint, *settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def source_digest(room: Path = Path(__file__).parent) -> str:
    """Hash the sources of the modules beside this one, which decide what a record becomes and how that is kept."""
    digest = hashlib.sha256()
    for file in sorted(room.glob("*.py")):
        digest.update(f"{file.name} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a fast tokenizer: its vocabulary and rules, its special tokens, its chat template, and the packages that run it."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    packages = [version(package) for package in ("transformers", "tokenizers", "jinja2")]
    parts = [cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.to_str(), tokenizer.chat_template, special, packages]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def store(directory: Path, key: str, builder: DatasetBuilder) -> Dataset:
    """Write a dataset, completely or not at all, and map it."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".dataset-{key[:40]}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    with open_new(temporary) as file:
        try:
            builder.write(file)
            os.replace(temporary, _file(directory, key))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return _just_written(file)


def hold(builder: DatasetBuilder) -> Dataset:
    """Map a dataset that no file keeps."""
    with tempfile.TemporaryFile() as file:
        builder.write(file)
        return _just_written(file)


def fetch(directory: Path, key: str) -> Dataset | None:
    """Map a dataset that was stored; None when it is absent or damaged."""
    try:
        with _file(directory, key).open("rb") as file:
            return read_dataset(file)
    except OSError:
        return None


def _just_written(file: IO[bytes]) -> Dataset:
    dataset = read_dataset(file, check=False)
    assert dataset is not None, "a dataset's file that was just written cannot be read"
    return dataset


def _file(directory: Path, key: str) -> Path:
    return directory / f"{key[:40]}.safetensors"


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    """Return a safetensors header with its length before it, filled up with spaces to a multiple of 8 bytes."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksum(file: IO[bytes], header: Mapping[str, Any], start: int) -> str:
    """Hash a dataset's file without its own checksum; reading leaves no pages of it in this process."""
    parts = {**header, "__metadata__": {"facts": header["__metadata__"]["facts"]}}
    digest = hashlib.sha256(json.dumps(parts).encode())
    file.seek(start)
    while content := file.read(1 << 20):
        digest.update(content)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Where tokenised datasets are kept: MEGATRON_LORA_CACHE, or the user's cache directory."""
    own = os.environ.get("MEGATRON_LORA_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(shared) / "megatron-lora"
