"""The files of a base model by which a run knows it again when it resumes: one digest of its weights, and one of each file that is read.

A run's status.json has them as `rests_on`. Weights are read as a whole once for each identity of a file (path, device,
inode, size, time of change), whose digest is kept in the cache directory.

    found = digests_of_base(model_dir, load_weights=True, cache=cache_dir())   # {"base weights": "9f..", "config.json": "01..", ...}
    check_same_base(before, found, model_dir)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from megatron_lora.errors import UserError
from megatron_lora.files import check_regular, digest_of_file, write_atomically
from megatron_lora.huggingface.weight_files import weight_files

WEIGHTS, COMMIT = "base weights", "hub commit"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model")
FILES = ("config.json", *TOKENIZER, "vocab.json", "merges.txt", "chat_template.jinja")
NUM_THREADS = 8  # a file each; hashing lets other threads run


def digests_of_base(model_dir: Path, load_weights: bool, cache: Path) -> dict[str, str]:
    """Return the digests of a base model's files, and the commit of a snapshot of the hub; UserError for a file without an end."""
    check_regular(model_dir)
    found = {name: digest_of_file(model_dir / name) for name in FILES if (model_dir / name).is_file()}
    if load_weights:
        files = sorted(weight_files(model_dir))
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            digests = list(pool.map(lambda file: _digest_once(file, cache), files))
        lines = "".join(f"{digest}  {file.name}\n" for file, digest in zip(files, digests, strict=True))
        found[WEIGHTS] = hashlib.sha256(lines.encode()).hexdigest()
    if model_dir.parent.name == "snapshots":
        found[COMMIT] = model_dir.name
    return found


def check_same_base(before: Mapping[str, str], now: Mapping[str, str], model_dir: Path) -> None:
    """Raise UserError where a base model's files differ from those that a run began with; nothing is known of a run without any."""
    if differ := differing(before, now):
        commits = f" (hub commit {before[COMMIT]} then, {now[COMMIT]} now)" if COMMIT in before and COMMIT in now else ""
        raise UserError(
            f"base_model: {', '.join(differ)} in {str(model_dir)!r}{commits} differ from when the run began; restore them, or choose "
            "another output_dir"
        )


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return what differs of two base models' digests; nothing where there are none of one."""
    names = [WEIGHTS, *FILES] if before else []
    if WEIGHTS not in before or WEIGHTS not in now:
        names = names[1:]
    return [name for name in names if before.get(name) != now.get(name)]


def _digest_once(file: Path, cache: Path) -> str:
    """Return a file's SHA-256: from the cache, else by reading it."""
    status = file.stat()
    identity = f"{file.resolve()} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    kept = cache / "weights" / hashlib.sha256(identity.encode()).hexdigest()
    with suppress(OSError, ValueError):
        digest = kept.read_text(encoding="ascii")
        if len(digest) == 64:
            return digest
    digest = digest_of_file(file)
    with suppress(OSError):  # it is read again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, digest)
    return digest
