"""Files that are always complete, and that show whether they are still what was written.

A reader, also after a crash, sees the old content or the new. A JSON object or a config is sealed: its
last key, or its last line, is a digest of all that stands before it, so that any change of the text is
found. A text without a seal, of an earlier version or of a user, is read as it is.

    write_atomically(path, sealed(json.dumps(state)));   state = unsealed(path.read_text())
"""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from megatron_lora.errors import UserError

JSON_SEAL = re.compile(r', "digest": "([0-9a-f]{32})"}\n?\Z')
YAML_SEAL = re.compile(r"# digest: ([0-9a-f]{32})\n\Z")
MOST_TEXT_BYTES = 1 << 28  # a tokenizer.json has 40 MB at most
CHANGED = "was damaged or edited since it was written: its digest is of another text"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write or replace a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with open_new(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pack(files: Sequence[Path], packed: Path) -> None:
    """Put texts of one line each into one gzip file, in its lines, and remove them; the line of a file that is not there is empty."""
    lines = [file.read_bytes().rstrip(b"\n") if file.exists() else b"" for file in files]
    write_atomically(packed, gzip.compress(b"\n".join(lines) + b"\n", mtime=0))
    for file in files:
        file.unlink(missing_ok=True)


def unpack(packed: Path) -> list[bytes]:
    """Return the lines of a gzip file; ValueError where it is damaged."""
    try:
        return gzip.decompress(packed.read_bytes()).split(b"\n")[:-1]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{packed.name}: {error}") from None


def open_new(path: Path) -> IO[bytes]:
    """Open a file that must not exist yet, a link neither, to write and read it; its mode follows the umask."""
    return open(path, "x+b")


def sync(path: Path) -> None:
    """Write a file, or the entries of a directory, from the system's cache to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """Read a file that others have written; OSError for one that is a pipe or a device, or larger than a text can be."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        if status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
        return file.read()


def check_regular(directory: Path) -> None:
    """Raise UserError where a directory holds something that would hang who reads it as a file, or a text that is far too large."""
    for path in sorted(directory.iterdir()):
        if path.exists() and not path.is_dir():
            is_text = path.suffix in (".json", ".jinja", ".txt", ".model")
            if not path.is_file() or (is_text and path.stat().st_size > MOST_TEXT_BYTES):
                raise UserError(
                    f"{path}: is a pipe or a device, or a text of more than {MOST_TEXT_BYTES:,} bytes; take it out of the directory"
                )


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(directory: Path, *patterns: str) -> None:
    """Remove what processes that ended while they wrote have left in a directory."""
    for pattern in patterns:
        for leftover in directory.glob(pattern):
            remove(leftover)


def sealed(text: str) -> str:
    """Return the text of a JSON object with its seal."""
    body = text.rstrip().removesuffix("}").rstrip()
    return f'{body}, "digest": "{_digest(body)}"}}\n'


def unsealed(text: str) -> Any:
    """Parse JSON and take its seal away; ValueError where it is of another text."""
    value = json.loads(text)
    if isinstance(value, dict) and "digest" in value:
        seal = JSON_SEAL.search(text)
        if seal is None or seal[1] != _digest(text[: seal.start()]):
            raise ValueError(CHANGED)
        del value["digest"]
    return value


def sealed_yaml(text: str) -> str:
    """Return the text of a config, which may have a seal, with its seal."""
    body = YAML_SEAL.sub("", text)
    return f"{body}# digest: {_digest(body)}\n"


def check_yaml(text: str) -> str:
    """Return the text of a config; ValueError where its seal is of another text."""
    seal = YAML_SEAL.search(text)
    if "# digest: " in text and (seal is None or seal[1] != _digest(text[: seal.start()])):
        raise ValueError(CHANGED)
    return text


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256, as sha256sum prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
