"""Fills the measured tables of docs/measured.md and docs/serving.md from the benchmark results.

A result is one JSON line in scripts/bench/results/<name>.jsonl, appended by the benchmark that measured it, with at least
`commit`, `hardware` and `date`. A table in a document stands between two markers; the first says where its rows come from and
which fields it shows, under which headings and in which format:

    <!-- table: quickstart.jsonl | Where: hardware | Tokens/s: tokens_per_s:.0f | Commit: commit -->
    <!-- end of table -->

`runs.jsonl with profile.GEMM and commit | ...` takes only the lines that have these fields; `peaks.0` is the first of a list. A field that
is null was not measured, and its cell is empty.

Only the newest line of each distinct `case` is shown (lines without `case` are one case), in the order in which cases first appear.

    python scripts/bench/tables.py [docs/measured.md ...]
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "scripts" / "bench" / "results"
DOCUMENTS = ("measured.md", "serving.md")
MARKED = re.compile(r"(?P<open><!-- table: (?P<spec>.*?) -->\n)(?P<body>.*?)(?P<close><!-- end of table -->)", re.DOTALL)


def newest(lines: list[dict]) -> list[dict]:
    """Keep the last line of each case, in the order in which the cases first appear."""
    cases: dict[str, dict] = {}
    for line in lines:
        cases[str(line.get("case"))] = line
    return list(cases.values())


def cell(line: dict, field: str) -> str:
    """Format one field, null as nothing: `name` or `name:format`; dots reach into objects, unless a key has the dot itself.

    Raises KeyError when it is absent.
    """
    name, _, form = field.partition(":")
    value = _value(line, name)
    return "" if value is None else format(value, form)


def _value(line, name: str):
    """Look a dotted name up in objects and lists; KeyError where it is not there."""
    if isinstance(line, dict) and name in line:
        return line[name]
    head, dot, rest = name.partition(".")
    if isinstance(line, list) and head.isdigit() and int(head) < len(line):
        found = line[int(head)]
    elif isinstance(line, dict) and head in line and dot:
        found = line[head]
    else:
        raise KeyError(name)
    return _value(found, rest) if dot else found


def _has(line: dict, name: str) -> bool:
    try:
        _value(line, name)
    except KeyError:
        return False
    return True


def table(spec: str, results: Path) -> str:
    """Return the Markdown table that a marker's specification asks for."""
    source, *columns = [part.strip() for part in spec.split("|")]
    headings, fields = zip(*(column.split(": ", 1) for column in columns), strict=True)
    file, _, wanted = source.partition(" with ")
    lines = [json.loads(line) for line in (results / file).read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if not wanted or all(_has(line, name) for name in wanted.split(" and "))]
    rows = [headings, ["---"] * len(headings), *([cell(line, field) for field in fields] for line in newest(lines))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def fill(text: str, results: Path = RESULTS) -> str:
    """Return the document with every marked table made anew."""
    return MARKED.sub(lambda found: found["open"] + table(found["spec"], results) + found["close"], text)


def main() -> None:
    """Rewrite the documents named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="*", type=Path, default=[ROOT / "docs" / name for name in DOCUMENTS])
    for document in parser.parse_args().documents:
        try:
            old = document.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            parser.exit(2, f"{parser.prog}: {document} cannot be read ({error}); name a Markdown file\n")
        new = fill(old)
        if new != old:
            document.write_text(new, encoding="utf-8")
            print(f"{document} updated")


if __name__ == "__main__":
    main()
