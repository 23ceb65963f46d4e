"""Where a dataset's records come from: one file, the files that a pattern matches, or a split of a data set of the hub.

    for source in sources_of(config, where):
        source.blocks()         # its records (row_files.py)
        source.digest()         # a hash of what they are made from

The hub is read through the `datasets` library, which keeps what it fetches, so that ranks and later runs need no network.
"""

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lora.config.dataset_paths import DATASET_FILES, DATASET_FILES_IN_WORDS, is_hub_id
from megatron_lora.config.rules import show
from megatron_lora.config.schema import DatasetConfig
from megatron_lora.data.row_files import BLOCK_RECORDS, Block, one_line_of, read_blocks, record_blocks
from megatron_lora.errors import UserError, one_line

MAX_NAME_BYTES = 255  # of a file's name, on every common file system
LIKELY_COMPRESSION = 4


@dataclass(frozen=True)
class FileSource:
    """One file of records."""

    path: str

    def __str__(self) -> str:
        return self.path

    def blocks(self) -> Iterator[Block]:
        """Yield its rows in blocks."""
        return read_blocks(self.path)

    def digest(self) -> str:
        """Hash its bytes, and the ending that says what they are."""
        endings = "".join(Path(self.path).suffixes[-2:] if self.path.endswith((".gz", ".zst")) else [Path(self.path).suffix])
        return endings + _digest([self.path])

    def num_bytes(self) -> int:
        """About how many bytes its records take."""
        return os.path.getsize(self.path) * (LIKELY_COMPRESSION if self.path.endswith((".gz", ".zst", ".parquet")) else 1)


@dataclass(frozen=True)
class HubSource:
    """A split of a data set of the hub."""

    id: str
    name: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.id}[{self.split}]"

    @cached_property
    def _table(self) -> Any:
        """The split as the `datasets` library holds it, on disk."""
        try:
            import datasets  # pyright: ignore[reportMissingImports]  an optional package
        except ImportError:
            raise UserError(f"{self.id}: needs the package datasets; pip install datasets, or use a file of records") from None
        try:
            table = datasets.load_dataset(self.id, self.name, split=self.split)
        except Exception as error:  # the hub, the network and the data set's own files can all fail, each in its way
            reason = one_line(str(error) or type(error).__name__, 160)
            raise UserError(f"{self.id}: split {self.split!r} cannot be loaded ({reason}); correct the id, its name or split") from None
        return table.with_format("arrow")

    def blocks(self) -> Iterator[Block]:
        """Yield its rows in blocks."""
        table = self._table
        parts = (table[start : start + BLOCK_RECORDS] for start in range(0, len(table), BLOCK_RECORDS))
        yield from one_line_of(self, "a readable data set", record_blocks(self, parts, lambda number: number / len(table)))

    def digest(self) -> str:
        """Hash the files that hold it, and what is taken of them; "" where it is in memory alone."""
        files = [file["filename"] for file in self._table.cache_files]
        return f"{self} {len(self._table)} {_digest(files)}" if files else ""

    def num_bytes(self) -> int:
        """About how many bytes its records take."""
        return sum(os.path.getsize(file["filename"]) for file in self._table.cache_files)


Source = FileSource | HubSource


def sources_of(config: DatasetConfig, where: str) -> tuple[Source, ...]:
    """List what a dataset is read from, files in the order of their names; UserError, beginning with the key `where`, if there is none."""
    path = Path(config.path)
    if is_hub_id(config.path) and not path.exists():
        return (HubSource(config.path, config.name, config.split or "train"),)
    if len(path.name.encode()) > MAX_NAME_BYTES:
        raise UserError(f"{where}: {show(config.path)}: is too long a name for a file; correct the path")
    matches = [config.path]
    if glob.has_magic(config.path) and not path.exists():
        matches = sorted(glob.glob(config.path, recursive=True))
        if not matches:
            raise UserError(f"{where}: {config.path!r}: matches no file in {os.getcwd()}; correct the pattern")
    return tuple(_file_source(match, where) for match in matches)


def _file_source(path: str, where: str) -> FileSource:
    """Check that a file of records is there."""
    if not Path(path).is_file():
        what = "is a directory; name one file in it" if Path(path).is_dir() else f"no such file in {os.getcwd()}; correct the path"
        raise UserError(f"{where}: {path!r}: {what}")
    if not path.endswith(DATASET_FILES):
        raise UserError(f"{where}: {path!r}: is no kind of file that is read; use one that ends in {DATASET_FILES_IN_WORDS}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{where}: {path!r}: may not be read; change its permissions")
    return FileSource(path)


def _digest(files: list[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
