"""Dataset files read one record at a time: .jsonl (an object per line), .json (a list of objects) and .parquet.

Every record comes with where it stands, `data/a.jsonl:12`, so that an error about it can name file
and line. In a JSON file the number is the line on which the record begins; in a Parquet file it is
the record's number, counted from 1.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_lora.errors import UserError

Record = tuple[str, dict]


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield (where, record) for every record of a file; UserError that says where the file holds something else."""
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: is no kind of file that is read; use one that ends in .json, .jsonl or .parquet")
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}; give the path of a file of records")
    for where, record in readers[path.suffix](path):
        if not isinstance(record, dict):
            raise UserError(f"{where}: holds {json.dumps(record, default=str)[:40]} where a record is an object with named fields")
        yield where, record


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    """Read a line at a time; blank lines are not records."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError as error:  # also UnicodeDecodeError
                    raise UserError(f"{path}:{number}: is not valid JSON ({error}); write one object per line, in UTF-8") from None
                except RecursionError:
                    raise UserError(f"{path}:{number}: nests too deeply to be read; write an object of texts") from None


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    """Read a list element by element, to know the line of each."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from None
    decoder, line, counted = json.JSONDecoder(), 1, 0  # newlines before `counted` are in `line`
    position = _skip_blanks(text, 0)
    if text[position : position + 1] != "[":
        raise UserError(f"{path}: does not hold a list of records; write [{{...}}, {{...}}], or one object per line in a .jsonl file")
    position, closed = _skip_blanks(text, position + 1), False
    if text[position : position + 1] == "]":
        position, closed = position + 1, True
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: is not valid JSON ({error.msg}); correct the record") from None
        except RecursionError:
            raise UserError(f"{path}:{line}: nests too deeply to be read; write an object of texts") from None
        yield f"{path}:{line}", record
        position = _skip_blanks(text, end)
        if text[position : position + 1] not in (",", "]") or not text[position:]:
            raise UserError(f"{path}:{line}: the record is not followed by ',' or ']'; close the list of records")
        closed = text[position] == "]"
        position = _skip_blanks(text, position + 1)
    if text[_skip_blanks(text, position) :]:
        raise UserError(f"{path}: holds more than its list of records; keep one list per file, or use a .jsonl file")


def _skip_blanks(text: str, position: int) -> int:
    """Return the position of the next character that is not JSON's white space."""
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    """Read a batch of records at a time."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: needs the package pyarrow; pip install pyarrow, or convert the file to .jsonl") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable Parquet file ({str(error).splitlines()[0]}); restore it") from None
