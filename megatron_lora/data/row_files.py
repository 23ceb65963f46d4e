"""Files of rows: .jsonl (an object per line), .json (a list of objects) and .parquet, read one row at a time.

Every row comes with its place, `data/a.jsonl:12`, so that whatever is wrong with it can be said in one line. A JSON file's place is
the line on which the row begins; a Parquet file's is the row's number from 1.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_lora.errors import UserError

Row = tuple[str, dict]


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield (place, row) for every row of a file; UserError with the place of the first thing that is no row."""
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: is no kind of file that is read; use one that ends in .json, .jsonl or .parquet")
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}; give the path of a file of rows")
    for place, row in readers[path.suffix](path):
        if not isinstance(row, dict):
            raise UserError(f"{place}: holds {json.dumps(row, default=str)[:40]} where a row is an object with named fields")
        yield place, row


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    """Read a line at a time; blank lines are not rows."""
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
    """Walk a list element by element, to know the line of each."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from None
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place = _skip_blanks(text, 0)
    if text[place : place + 1] != "[":
        raise UserError(f"{path}: does not hold a list of rows; write [{{...}}, {{...}}], or one object per line in a .jsonl file")
    place, closed = _skip_blanks(text, place + 1), False
    if text[place : place + 1] == "]":
        place, closed = place + 1, True
    while not closed:
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: is not valid JSON ({error.msg}); repair the row") from None
        except RecursionError:
            raise UserError(f"{path}:{line}: nests too deeply to be read; write an object of texts") from None
        yield f"{path}:{line}", row
        place = _skip_blanks(text, end)
        if text[place : place + 1] not in (",", "]") or not text[place:]:
            raise UserError(f"{path}:{line}: the row is not followed by ',' or ']'; close the list of rows")
        closed = text[place] == "]"
        place = _skip_blanks(text, place + 1)
    if text[_skip_blanks(text, place) :]:
        raise UserError(f"{path}: goes on after its list of rows; keep one list per file, or use a .jsonl file")


def _skip_blanks(text: str, place: int) -> int:
    """Find the next character that is not JSON's white space."""
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    """Read a batch of rows at a time."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: needs the package pyarrow; pip install pyarrow, or convert the file to .jsonl") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable Parquet file ({str(error).splitlines()[0]}); restore it") from None
