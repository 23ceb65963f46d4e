"""The documents: every link, anchor, file and command in them is there, their configs load, and README is one page."""

import re
from pathlib import Path

import pytest

from megatron_lora.__main__ import EXAMPLES
from megatron_lora.config.schema import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(file.relative_to(ROOT)) for file in DOCUMENTS]
MAX_README_LINES = 130
MAX_COLUMNS = 100
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
REPOSITORY_FILE = re.compile(r"(?<![\w./-])((?:scripts|configs|docs|tests|megatron_lora|fused_ops|scheduling)/[\w./-]*\w)")
COMMAND = re.compile(r"^megatron-lora ([\w-]+)", re.MULTILINE)

each_document = pytest.mark.parametrize("file", DOCUMENTS, ids=NAMES)


def read(file: Path) -> str:
    """Return a document's text."""
    return file.read_text(encoding="utf-8")


def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", read(file)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(file):
    for link in LINK.findall(read(file)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), f"{file.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{file.name}: {link}: {target.name} has no such heading"


@each_document
def test_files_that_are_named_are_there(file):
    for name in REPOSITORY_FILE.findall(read(file)):
        assert (ROOT / name).exists(), f"{file.name}: {name}"


@each_document
def test_commands_are_those_of_the_command_line(file):
    for _, block in BLOCK.findall(read(file)):
        assert set(COMMAND.findall(block)) <= EXAMPLES.keys(), block


@each_document
def test_prose_lines_fit_a_screen(file):
    text = BLOCK.sub("", read(file))
    for line in text.splitlines():
        if not line.startswith(("|", "<!--", "![", "[")):
            assert len(line) <= MAX_COLUMNS, f"{file.name}: {line}"


@each_document
def test_configs_load(file, tmp_path):
    for language, block in BLOCK.findall(read(file)):
        if language == "yaml" and "base_model:" in block:
            (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
            assert load_config(tmp_path / "config.yaml").jobs


def test_messages_that_troubleshooting_quotes_are_those_of_the_code():
    sources = [*(ROOT / "megatron_lora").rglob("*.py"), *(ROOT / "scripts").glob("*.sh")]
    code = "".join(map(read, sources))
    quoted = re.findall(r"^\| `([^`]+)` \|", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert len(quoted) > 5
    for message in quoted:
        for part in re.split(r"\.\.\.|NAME", message):
            assert part.strip(" .:") in code, f"no message has {part!r}: {message}"


def test_readme_is_one_page_that_leads_to_every_document():
    text = read(ROOT / "README.md")
    assert text.count("\n") <= MAX_README_LINES
    assert {link for link in LINK.findall(text) if link.startswith("docs/")} == {
        str(file.relative_to(ROOT)) for file in DOCUMENTS if file.parent == ROOT / "docs"
    }


def test_figures_of_readme_are_measured_ones():
    """The tables of docs/measured.md are made from result files; README repeats some of their figures by hand."""
    text, measured = read(ROOT / "README.md"), read(ROOT / "docs" / "measured.md")
    headline = text[text.index("**Measured**") : text.index("```")]
    (commit,) = re.findall(r"commit (\w{7})", headline.replace("\n", " "))
    figures = re.findall(r"\d+,\d{3}(?= tokens/s| in the)", headline.replace("\n", " "))
    assert len(figures) == 2
    for figure in figures:
        assert re.search(rf"\| {figure} \|.*\| {commit} \|", measured), f"no measured row has {figure} at commit {commit}"
