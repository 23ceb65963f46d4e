"""Fills the tables of docs/config.md from the config's schema: each key, what it may be, its unit, default and meaning.

A table stands between two markers, the first of which names the dataclass whose keys it shows; the text around them is written by hand:

    <!-- keys: JobConfig -->
    <!-- end of keys -->

    python scripts/make_config_doc.py [--check]        # --check: write nothing, end with 1 if a table is out of date
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from megatron_lora.config import schema  # noqa: E402
from megatron_lora.config.objective_keys import OBJECTIVES  # noqa: E402

DOCUMENT = ROOT / "docs" / "config.md"
MARKED = re.compile(r"(?P<open><!-- keys: (?P<kind>\w+) -->\n)(?P<body>.*?)(?P<close><!-- end of keys -->)", re.DOTALL)
HEADINGS = ("Key", "Value", "Unit", "Default", "Meaning")


def default_of(field: dataclasses.Field) -> str:
    """Return a key's default as it would stand in YAML."""
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else format(value, 'g') if isinstance(value, float) else value}`"


def table(kind: type) -> str:
    """Return the Markdown table of a dataclass's keys; a field without a rule is a section of its own and left out."""
    rows = [HEADINGS, ["---"] * len(HEADINGS)]
    for field in dataclasses.fields(kind):
        if "rule" in field.metadata:
            rule, meaning, unit = (field.metadata[name] for name in ("rule", "meaning", "unit"))
            rows.append([f"`{field.name}`", rule.accepts, unit, default_of(field), meaning])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def fill(text: str) -> str:
    """Return the document with every table made anew."""
    kinds = vars(schema) | {kind.__name__: kind for kind in OBJECTIVES.values()}
    return MARKED.sub(lambda found: found["open"] + table(kinds[found["kind"]]) + found["close"], text)


def main() -> int:
    """Bring docs/config.md up to date, or say that it is not."""
    parser = argparse.ArgumentParser(description="Fill the tables of docs/config.md from the schema.")
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a table is out of date")
    check = parser.parse_args().check
    old = DOCUMENT.read_text(encoding="utf-8")
    new = fill(old)
    if new != old and check:
        print(f"{DOCUMENT}: a table is out of date; run: python scripts/make_config_doc.py", file=sys.stderr)
        return 1
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
