"""The generator of measured tables: what it shows of a results file, and that docs/measured.md is up to date."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "bench" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path):
    lines = [
        {"case": "two", "speed": 1.26, "at": {"gpu": "old"}},
        {"case": "one", "speed": 3.0, "at": {"gpu": "x"}},
        {"case": "two", "speed": 2.26, "at": {"gpu": "new"}},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_newest_line_of_each_case_is_shown(tables, results):
    text = "before\n<!-- table: r.jsonl | GPU: at.gpu | Speed: speed:.1f -->\nstale\n<!-- end of table -->\nafter\n"
    filled = tables.fill(text, results)
    rows = "| GPU | Speed |\n| --- | --- |\n| new | 2.3 |\n| x | 3.0 |\n"
    assert filled == text.replace("stale\n", rows)
    assert tables.fill(filled, results) == filled


def test_lines_are_chosen_by_a_field_and_lists_are_looked_into(tables, tmp_path):
    lines = [{"case": "a", "peaks": [1.5, 2.0]}, {"case": "b"}, {"case": "c", "peaks": [{"at.once": 7}]}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    filled = tables.fill("<!-- table: r.jsonl with peaks.1 | Case: case | Second: peaks.1:.1f -->\n<!-- end of table -->", tmp_path)
    assert filled.splitlines()[1:-1] == ["| Case | Second |", "| --- | --- |", "| a | 2.0 |"]
    filled = tables.fill("<!-- table: r.jsonl with peaks.0.at.once | At: peaks.0.at.once -->\n<!-- end of table -->", tmp_path)
    assert filled.splitlines()[3:-1] == ["| 7 |"]


def test_what_was_not_measured_is_an_empty_cell(tables, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"case": "a", "speed": {"ours": 2.0, "theirs": None}}) + "\n")
    filled = tables.fill("<!-- table: r.jsonl | Ours: speed.ours:.1f | Theirs: speed.theirs:.1f -->\n<!-- end of table -->", tmp_path)
    assert filled.splitlines()[3:-1] == ["| 2.0 |  |"]


def test_a_field_that_no_result_has_is_an_error(tables, results):
    with pytest.raises(KeyError, match="sped"):
        tables.fill("<!-- table: r.jsonl | Speed: sped -->\n<!-- end of table -->", results)


def test_the_documents_show_what_was_measured(tables):
    for name in tables.DOCUMENTS:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert 0 < text.count("<!-- table: ") == len(tables.MARKED.findall(text)), f"{name}: a table's marker is not closed"
        assert tables.fill(text) == text, "run: python scripts/bench/tables.py"


def test_every_result_says_where_it_comes_from():
    for file in (ROOT / "scripts" / "bench" / "results").glob("*.jsonl"):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            missing = {"commit", "hardware", "date"} - json.loads(line).keys()
            assert not missing, f"{file.name}:{number} lacks {missing}"
