"""docs/config.md is made from the schema: a key, default, rule or meaning that differs from the document is seen here."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_config_doc", ROOT / "scripts" / "make_config_doc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_up_to_date(generator):
    text = generator.DOCUMENT.read_text(encoding="utf-8")
    assert text.count("<!-- keys: ") == len(generator.MARKED.findall(text)), "a table's marker is not closed"
    assert generator.fill(text) == text, "run: python scripts/make_config_doc.py"


def test_every_part_of_the_schema_has_its_table(generator):
    text = generator.DOCUMENT.read_text(encoding="utf-8")
    parts = {name for name, kind in vars(generator.schema).items() if dataclasses.is_dataclass(kind) and name.endswith("Config")}
    assert {found["kind"] for found in generator.MARKED.finditer(text)} == parts | {kind.__name__ for kind in generator.OBJECTIVES.values()}


def test_every_key_has_a_row_with_its_default_and_a_meaning(generator):
    for kind in (generator.schema.RunConfig, generator.schema.JobConfig):
        rows = {row.split(" | ")[0].strip("| `"): row for row in generator.table(kind).splitlines()[2:]}
        assert set(rows) | {"jobs"} == {field.name for field in dataclasses.fields(kind)} | {"jobs"}
        for row in rows.values():
            assert re.fullmatch(r"\| `\w+` \| [^|]+ \| [\w ]* \| [^|]* \| [^|]+ \|", row), row
    assert "| a whole number from 1 to 256 |  | `16` | rank of A and B |" in generator.table(generator.schema.JobConfig)
    assert "| a list of {path, type}, or null |  | `[]` | validation data: what" in generator.table(generator.schema.JobConfig)
    assert "or a list of some |  | `[sigmoid]` | TRL's losses" in generator.table(generator.OBJECTIVES["dpo"])


def test_a_changed_schema_changes_the_table(generator):
    @dataclasses.dataclass(kw_only=True)
    class Small:
        rate: float = generator.schema.key(1e-4, generator.schema.number("a rate", 0), "how fast", "steps")
        name: str = generator.schema.required(generator.schema.one_of("a", "b"), "who")

    assert generator.table(Small).splitlines()[2:] == [
        "| `rate` | a number of at least 0 | steps | `0.0001` | how fast |",
        "| `name` | `a` or `b` |  | required | who |",
    ]
