"""The records of a data file one by one, for tests that look at what the reader finds."""

from collections.abc import Iterator
from pathlib import Path

from megatron_lora.data.row_files import read_blocks
from megatron_lora.errors import UserError


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield (where, record) for every record of a file; UserError that says where the file holds something else."""
    for block in read_blocks(path):
        for where, record in block.rows():
            if isinstance(record, UserError):
                raise record
            yield where, record
