"""Dataset files read in blocks of records: JSON lines, JSON lists, CSV, Parquet and Arrow.

    .jsonl .json    an object per line; .json may hold one list of objects too      .csv    named columns, all of them texts
    .parquet .arrow    a record per row                                             .gz .zst    after the first three: compressed

Every record comes with where it stands, `data/a.jsonl:12`, so that an error about it can name file and line. In text files the number is
the line on which the record begins; in Parquet and Arrow files it is the record's number, counted from 1. A place that holds no record
(a line that is not JSON, a row with too many cells) gives a UserError in the record's stead, and the reader continues; where nothing
further can be read, UserError is raised. Blocks are cheap to make and to send to another process, which parses them.
"""

import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_lora.config.dataset_paths import DATASET_FILES, DATASET_FILES_IN_WORDS
from megatron_lora.errors import UserError, one_line

Row = tuple[str, "dict | UserError"]
NAMES = {"jsonl": "JSON", "json": "JSON", "csv": "CSV", "parquet": "Parquet", "arrow": "Arrow", "gz": "gzip", "zst": "Zstandard"}
BLOCK_BYTES = 1 << 20
BLOCK_RECORDS = 2000


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Complete lines of a file of JSON lines, not parsed yet; `done` is the share of the file that has been read with them."""

    path: str
    first_line: int
    lines: bytes
    done: float

    def rows(self) -> Iterator[Row]:
        """Parse the lines; blank ones are not records."""
        for number, line in enumerate(self.lines.split(b"\n"), self.first_line):
            if line.strip():
                yield f"{self.path}:{number}", _parse(f"{self.path}:{number}", line)


@dataclass(frozen=True, slots=True)
class RecordBlock:
    """Values that stand where records should, with their numbers; `done` as above."""

    path: str
    values: Sequence[tuple[int, object]]
    done: float

    def rows(self) -> Iterator[Row]:
        """Check that the values are records."""
        for number, value in self.values:
            where = f"{self.path}:{number}"
            yield where, value if isinstance(value, UserError) else _record(where, value)


Block = LineBlock | RecordBlock


def read_blocks(path: str | Path) -> Iterator[Block]:
    """Yield the rows of a file in blocks; UserError for a file that cannot be read (on)."""
    path = Path(path)
    if not path.name.endswith(DATASET_FILES):
        raise UserError(f"{path}: is no kind of file that is read; use one that ends in {DATASET_FILES_IN_WORDS}")
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}; give the path of a file of records")
    kind, compression = kind_of(path)
    reader = {"jsonl": _read_json, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "arrow": _read_arrow}[kind]
    if (kind in ("parquet", "arrow") or compression == "zst") and find_spec("pyarrow") is None:
        raise UserError(f"{path}: needs the package pyarrow; pip install pyarrow, or convert the file to .jsonl")
    yield from one_line_of(path, f"a readable {NAMES[compression or kind]} file", reader(path))


def kind_of(path: Path) -> tuple[str, str]:
    """Return what a file holds, by its name's ending, and how it is compressed ("" if it is not)."""
    compression = path.suffix[1:] if path.suffix in (".gz", ".zst") else ""
    return Path(path.stem if compression else path.name).suffix[1:], compression


def one_line_of(subject: object, what: str, blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield what a library reads; whatever it raises about a damaged file is one UserError."""
    try:
        yield from blocks
    except UserError:
        raise
    except Exception as error:  # pyarrow, csv, gzip and zstd raise a dozen kinds, UnicodeDecodeError and OverflowError among them
        reason = one_line(str(error) or type(error).__name__, 120)
        raise UserError(f"{subject}: is not {what} ({reason}); restore it") from None


def record_blocks(path: object, tables: Iterable[Any], done: Callable[[int], float]) -> Iterator[Block]:
    """Make blocks of the rows of pyarrow tables or record batches; `done` tells the share that has been read with a number of records."""
    number = 1
    for table in tables:
        table.validate(full=True)  # else a damaged file can end the process
        for start in range(0, table.num_rows, BLOCK_RECORDS):
            records = table.slice(start, BLOCK_RECORDS).to_pylist()
            values = [{name: _without_nulls(value) for name, value in record.items()} for record in records]
            last = number + len(values)
            yield RecordBlock(str(path), list(zip(range(number, last), values, strict=True)), done(last - 1))
            number = last


def _without_nulls(value: Any) -> Any:
    """Return a value whose objects have no fields that are null: an object of these formats has the fields of all others of its column."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _line_blocks(path: Path, raw: BinaryIO, file: BinaryIO, start: bytes) -> Iterator[Block]:
    """Read lines; `start` has been read already, and `raw` is the file on disk, by whose position the progress is known."""
    size, first_line = max(path.stat().st_size, 1), 1
    while True:
        lines = start + file.read(BLOCK_BYTES)
        lines += file.readline()
        if not lines:
            return
        yield LineBlock(str(path), first_line, lines, raw.tell() / size)
        first_line, start = first_line + lines.count(b"\n"), b""


def _read_json(path: Path) -> Iterator[Block]:
    with path.open("rb") as raw:
        file = _uncompressed(path, raw)
        start = file.read(BLOCK_BYTES) if kind_of(path)[0] == "json" else b""  # only .json may hold a list
        if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _list_blocks(path, start + file.read())
        else:
            yield from _line_blocks(path, raw, file, start)


def _list_blocks(path: Path, content: bytes) -> Iterator[Block]:
    values = _list_elements(path, content)
    while block := list(itertools.islice(values, BLOCK_RECORDS)):
        yield RecordBlock(str(path), [(line, value) for line, value, _ in block], block[-1][2])


def _list_elements(path: Path, content: bytes) -> Iterator[tuple[int, object, float]]:
    """Read a list element by element, to know the line of each: line, value, share of the text that is read."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from None
    line, counted = 1, 0  # newlines before `counted` are in `line`
    position = _skip_blanks(text, _skip_blanks(text, 0) + 1)
    closed = text[position : position + 1] == "]"
    position += closed
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: is not valid JSON ({error.msg}); correct the record") from None
        except ValueError as error:  # a number with thousands of digits
            raise UserError(f"{path}:{line}: is not valid JSON ({one_line(error, 80)}); correct the record") from None
        except RecursionError:
            raise UserError(f"{path}:{line}: nests too deeply to be read; write an object of texts") from None
        yield line, record, end / len(text)
        position = _skip_blanks(text, end)
        if text[position : position + 1] not in (",", "]") or not text[position:]:
            raise UserError(f"{path}:{line}: the record is not followed by ',' or ']'; close the list of records")
        closed = text[position] == "]"
        position = _skip_blanks(text, position + 1)
    if text[_skip_blanks(text, position) :]:
        raise UserError(f"{path}: holds more than its list of records; keep one list per file, or use a .jsonl file")


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, which has each field once; else the last of the same name would count."""
    value = dict(fields)
    if len(value) < len(fields):
        name = next(name for index, (name, _) in enumerate(fields) if name in dict(fields[:index]))
        raise ValueError(f"an object has {name!r} twice")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object)
BLANKS = re.compile(r"[ \t\n\r]+")


def _skip_blanks(text: str, position: int) -> int:
    """Return the position of the next character that is not JSON's white space."""
    match = BLANKS.match(text, position)
    return match.end() if match else position


def _read_csv(path: Path) -> Iterator[Block]:
    csv.field_size_limit(2**31 - 1)  # of the process; the default, 128 kB, is less than a long text
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw, io.TextIOWrapper(_uncompressed(path, raw), encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, strict=True)
        names = next(lines, [])
        if len(set(names)) < len(names) or not all(
            name.strip() for name in names[1:]
        ):  # pandas gives its index no name, and writes it first
            raise UserError(f"{path}:1: names a column twice, or leaves its name empty; write a line of distinct column names first")
        values = _csv_rows(path, lines, names)
        while block := list(itertools.islice(values, BLOCK_RECORDS)):
            yield RecordBlock(str(path), block, raw.tell() / size)


def _csv_rows(path: Path, lines: Any, names: Sequence[str]) -> Iterator[tuple[int, object]]:
    """Yield the line on which a row begins, and the row; blank lines are not records."""
    start = lines.line_num + 1
    for cells in lines:
        if len(cells) == len(names):
            yield start, {name: cell for name, cell in zip(names, cells, strict=True) if name.strip()}
        elif cells:
            yield start, UserError(f"{path}:{start}: has {len(cells)} cells and the first line names {len(names)}; correct the row")
        start = lines.line_num + 1


def _read_parquet(path: Path) -> Iterator[Block]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        yield from record_blocks(path, file.iter_batches(batch_size=BLOCK_RECORDS), lambda number: number / file.metadata.num_rows)


def _read_arrow(path: Path) -> Iterator[Block]:
    """Read an Arrow file in either of its formats; the `datasets` library keeps streams."""
    from pyarrow import ipc, memory_map

    with memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = ipc.open_file(source)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]  # views of the mapped file
            total = sum(batch.num_rows for batch in batches)
            yield from record_blocks(path, batches, lambda number: number / total)
        else:
            yield from record_blocks(path, ipc.open_stream(source), lambda _: source.tell() / source.size())


def _uncompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """Open the bytes that a file holds before compression."""
    compression = kind_of(path)[1]
    if compression == "zst":
        from pyarrow import CompressedInputStream

        return io.BufferedReader(CompressedInputStream(raw, "zstd"), BLOCK_BYTES)  # type: ignore[arg-type]  # it has readinto
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compression == "gz" else raw


def _parse(where: str, line: bytes) -> dict | UserError:
    """Return the record of a line of JSON, or what is wrong with it."""
    try:
        return _record(where, DECODER.decode(line.decode(json.detect_encoding(line), "surrogatepass")))
    except ValueError as error:  # also UnicodeDecodeError
        return UserError(f"{where}: is not valid JSON ({one_line(error, 120)}); write one object per line, in UTF-8")
    except RecursionError:
        return UserError(f"{where}: nests too deeply to be read; write an object of texts")


def _record(where: str, value: object) -> dict | UserError:
    """Return a value that is a record, or what is wrong with it."""
    if isinstance(value, dict):
        return value
    shown = json.dumps(value, default=str)[:40]
    return UserError(f"{where}: holds {shown} where a record is an object with named fields; write one, or remove it")
