"""One thing, one name: expressions that were retired do not come back (tests/retired_words.txt has them, with what to say instead)."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("megatron_lora", "fused_ops", "scheduling")


def retired() -> list[tuple[str, str, str]]:
    """Return (expression, what to say instead, where) of every line."""
    lines = (ROOT / "tests/retired_words.txt").read_text(encoding="utf-8").splitlines()
    return [(*line.split("\t"),) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def files(where: str) -> list[Path]:
    """Return the files that an expression must not stand in."""
    found = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    if where == "all":
        found += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
        found += [file for kind in ("*.py", "*.sh", "*.sbatch") for file in (ROOT / "scripts").rglob(kind)]
    return found


def pattern(expression: str) -> re.Pattern[str]:
    """Return what finds an expression as whole words; one that ends in an underscore begins identifiers."""
    tail = "" if expression.endswith("_") else r"(?![\w])"
    return re.compile(rf"(?<![\w]){re.escape(expression)}{tail}", 0 if expression != expression.lower() else re.IGNORECASE)


def test_retired_expressions_do_not_come_back():
    texts = {file: file.read_text(encoding="utf-8") for file in files("all")}
    found = []
    for expression, instead, where in retired():
        for file in files(where):
            for number, line in enumerate(texts[file].splitlines(), 1):
                if pattern(expression).search(line):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {expression!r} was retired; say {instead}")
    assert not found, "\n".join(found)


def test_the_list_can_find_something():
    assert pattern("go on").search("jobs go on here") and not pattern("go on").search("cargo once")
    assert pattern("FREE").search("FREE = 1") and not pattern("FREE").search("free memory")
    assert pattern("told_").search("self.told_steps") and all(where in ("code", "all") for *_, where in retired())
