"""The same records in every kind of file, compressed or not; what is damaged is one line whatever reads it; patterns and the hub."""

import gzip
import io
import json
import sys
import types

import pytest
from records import read_records

from megatron_lora.config.schema import DatasetConfig
from megatron_lora.data.dataset_sources import HubSource, sources_of
from megatron_lora.data.row_files import BLOCK_BYTES, read_blocks
from megatron_lora.errors import UserError

RECORDS = [{"prompt": f"p {i}", "completion": "né 🙂\nline two"} for i in range(5)]
KINDS = ["jsonl", "json", "list.json", "csv", "parquet", "file.arrow", "stream.arrow"]


def content_of(kind: str, records=RECORDS) -> bytes:
    """Write records as a file of a kind holds them."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if kind in ("jsonl", "json"):
        return lines.encode()
    if kind == "list.json":
        return json.dumps(records, indent=1).encode()
    if kind == "csv":
        import csv

        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()
    pyarrow, out = pytest.importorskip("pyarrow"), io.BytesIO()
    table = pyarrow.Table.from_pylist(records)
    if kind == "parquet":
        import pyarrow.parquet as parquet

        parquet.write_table(table, out, row_group_size=2)
    else:
        new = pyarrow.ipc.new_file if kind == "file.arrow" else pyarrow.ipc.new_stream
        with new(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def compressed(content: bytes, how: str) -> bytes:
    if how == "zst":
        return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)
    return gzip.compress(content) if how else content


def written(folder, kind: str, how: str = "", content: bytes | None = None):
    path = folder / f"a.{kind}{'.' + how if how else ''}"
    path.write_bytes(compressed(content_of(kind) if content is None else content, how))
    return path


@pytest.mark.parametrize("how", ["", "gz", "zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_holds_the_same_records(tmp_path, kind, how):
    if how and kind not in ("jsonl", "json", "list.json", "csv"):
        return
    path = written(tmp_path, kind, how)
    places, found = zip(*read_records(path), strict=True)
    assert list(found) == RECORDS
    first = {"csv": 2, "list.json": 2}.get(kind, 1)
    apart = {"csv": 2, "list.json": 4}.get(kind, 1)
    assert list(places) == [f"{path}:{first + apart * i}" for i in range(5)]


def test_objects_of_a_column_lack_the_fields_that_others_have(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    calls = [
        {"calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"calls": [{"name": "g", "arguments": {"y": ["z", None]}}]},
        {"calls": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(calls), tmp_path / "a.parquet")
    assert [record for _, record in read_records(tmp_path / "a.parquet")] == calls


def test_the_index_column_of_pandas_is_no_field(tmp_path):
    (tmp_path / "a.csv").write_text(",a,b\n0,1,2\n1,3,4\n")
    assert [record for _, record in read_records(tmp_path / "a.csv")] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_follow_each_other_and_say_how_far_they_are(tmp_path, kind):
    many = [{"prompt": str(i), "completion": "x" * 700} for i in range(4500)]
    blocks = list(read_blocks(written(tmp_path, kind, content=content_of(kind, many))))
    assert len(blocks) > 2 and [block.done for block in blocks] == sorted(block.done for block in blocks)
    assert 0 < blocks[0].done < 1 and blocks[-1].done == pytest.approx(1, abs=0.02)
    assert [int(record["prompt"]) for block in blocks for _, record in block.rows()] == list(range(4500))


def test_a_line_longer_than_a_block_is_one_line(tmp_path):
    long = {"text": "x" * (2 * BLOCK_BYTES)}
    path = written(tmp_path, "jsonl", content=content_of("jsonl", [long, {"text": "b"}, long]))
    assert [(where.rpartition(":")[2], len(record["text"])) for where, record in read_records(path)] == [
        ("1", 2 * BLOCK_BYTES),
        ("2", 1),
        ("3", 2 * BLOCK_BYTES),
    ]


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("csv", b"a,b\n1,2\n1,2,3\n", r":3: has 3 cells and the first line names 2; correct the row"),
        ("csv", b"a,b\n1\n", r":2: has 1 cells and the first line names 2"),
        ("csv", b"a,a\n1,2\n", r":1: names a column twice"),
        ("csv", b"a,\n1,2\n", r":1: names a column twice, or leaves its name empty"),
        ("csv", b'a,b\n"1"2,3\n', r": is not a readable CSV file"),
        ("csv", b'a,b\n"1,2\n', r": is not a readable CSV file"),
        ("csv", b"a,b\n\xff,2\n", r": is not a readable CSV file \('utf-8' codec"),
        ("json", b'{"a": 1}\n{"a": \n', r":2: is not valid JSON"),
        ("json", b'"text"', r':1: holds "text" where a record is an object'),
        ("json", b"[" + b"9" * 5000 + b"]", r":1: is not valid JSON"),
        ("jsonl", b"9" * 5000 + b"\n", r":1: is not valid JSON"),
        ("jsonl", b'{"a": NaN}\n\xef\xbb\xbf{"a": 1}\n5\n', r":3: holds 5 where"),
    ],
)
def test_what_is_no_record_names_its_place(tmp_path, kind, content, said):
    path = written(tmp_path, kind, content=content)
    with pytest.raises(UserError, match=f"^{path}{said}") as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "how"), [(kind, "") for kind in KINDS[3:]] + [("jsonl", "gz"), ("csv", "gz"), ("jsonl", "zst"), ("list.json", "zst")]
)
def test_a_damaged_file_is_read_or_is_one_line(tmp_path, kind, how):
    whole = written(tmp_path, kind, how).read_bytes()
    path = tmp_path / f"b.{kind}{'.' + how if how else ''}"
    refused = 0
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        for damaged in (whole[:position], whole[:position] + bytes([whole[position] ^ 0x81]) + whole[position + 1 :]):
            path.write_bytes(damaged)
            try:
                for block in read_blocks(path):
                    list(block.rows())
            except UserError as error:
                refused += 1
                assert str(error).startswith(f"{path}") and "\n" not in str(error) and len(str(error)) < 500
    assert refused > 20


def test_a_damaged_column_name_is_one_line(tmp_path):
    path = written(tmp_path, "parquet")
    path.write_bytes(path.read_bytes().replace(b"completion", b"comple\xff\xfe\xfdn"))
    with pytest.raises(UserError, match=f"^{path}: is not a readable Parquet file"):
        list(read_records(path))


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    paths = [written(tmp_path, "parquet"), written(tmp_path, "file.arrow"), written(tmp_path, "jsonl", "zst")]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for path in paths:
        with pytest.raises(UserError, match="needs the package pyarrow; pip install pyarrow"):
            list(read_records(path))
    assert list(read_records(written(tmp_path, "jsonl", "gz")))


# ---- patterns and the hub ----


def config(path, **keys) -> DatasetConfig:
    return DatasetConfig(path=str(path), type="text", **keys)


def test_a_pattern_names_its_files_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "[x].jsonl", "d.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert [str(source) for source in sources_of(config("[ab].jsonl"), "k")] == ["a.jsonl", "b.jsonl"]
    assert [str(source) for source in sources_of(config("**/*.jsonl"), "k")] == ["[x].jsonl", "a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert [str(source) for source in sources_of(config("**/**/c.jsonl"), "k")] == ["deep/c.jsonl"], "once, however often it matches"
    assert [str(source) for source in sources_of(config("[x].jsonl"), "k")] == ["[x].jsonl"], "a file of that very name"
    for path, said in (
        ("*.csv", "matches no file"),
        ("deep*.jsonl", "matches no file"),
        ("nope.jsonl", "no such file"),
        ("*.txt", "no kind of file"),
    ):
        with pytest.raises(UserError, match=f"^jobs.a.datasets.0.path: .*{said}"):
            sources_of(config(path), "jobs.a.datasets.0.path")


class StandIn:
    """What the `datasets` library returns, in the parts that are used."""

    def __init__(self, table, file):
        self.table, self.cache_files = table, [{"filename": str(file)}]

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def __len__(self):
        return self.table.num_rows

    def __getitem__(self, rows):
        return self.table.slice(rows.start, rows.stop - rows.start)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the `datasets` library; gives the calls that reach it."""
    pyarrow = pytest.importorskip("pyarrow")
    table, calls = pyarrow.Table.from_pylist([{"text": f"t {i}"} for i in range(5000)]), []
    file = tmp_path / "cached.arrow"
    file.write_bytes(b"rows")

    def load_dataset(path, name=None, *, split):
        calls.append((path, name, split))
        if path != "team/tales":
            raise FileNotFoundError(f"Couldn't find\n{path} on the hub")
        return StandIn(table, file)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_split_of_the_hub(hub, tmp_path):
    (source,) = sources_of(config("team/tales", name="short", split="train[:50%]"), "k")
    rows = [row for block in source.blocks() for row in block.rows()]
    assert rows[0] == ("team/tales[train[:50%]]:1", {"text": "t 0"}) and rows[-1] == ("team/tales[train[:50%]]:5000", {"text": "t 4999"})
    assert hub == [("team/tales", "short", "train[:50%]")]
    assert sources_of(config("team/tales"), "k")[0] == HubSource("team/tales", None, "train")
    before = source.digest()
    (tmp_path / "cached.arrow").write_bytes(b"other rows")
    assert source.digest() != before != HubSource("team/tales", "short", "test").digest()


def test_the_hub_is_one_line_too(hub, monkeypatch):
    with pytest.raises(
        UserError, match="^team/nothing: split 'train' cannot be loaded .Couldn't find team/nothing on the hub.; correct the id"
    ):
        list(sources_of(config("team/nothing"), "k")[0].blocks())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="^team/tales: needs the package datasets; pip install datasets"):
        list(sources_of(config("team/tales"), "k")[0].blocks())
