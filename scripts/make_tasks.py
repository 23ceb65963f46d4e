"""Builds the quickstart's datasets, and pairs of answers, from the Python standard library's own source.

Every machine with Python has some hundred documented modules and some thousand documented functions. They are read as text
(nothing is imported), sorted by a hash of their content, and turned into tasks of different lengths:

    names       one line of documentation -> the function's name       prompt_completion    ~20 tokens a sample
    signatures  a description -> the `def` line                        alpaca               ~80
    docstrings  a function's source -> its documentation's first line  messages            ~160
    summaries   a module's outline -> the module's first line          messages            ~330
    terse       a function's source -> its documentation's first line, rather than with words around it    preference    ~2 x 120

One further row of each task goes to held_out.json, {task: row}: no job trains on it, and show_answers.py uses it as a question.

    python scripts/make_tasks.py data/quickstart
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from one_line import OneLineParser, folder

NUM_ROWS = {"names": 320, "signatures": 128, "docstrings": 64, "summaries": 32, "terse": 72}
MAX_OUTLINE = 1400
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "site-packages", "ensurepip", "encodings", "pydoc_data"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A documented function: its name, its `def` line, its source without the docstring, and the docstring's first line."""

    name: str
    signature: str
    body: str
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A documented module: dotted name, docstring's first line, and one line for each public class and function."""

    name: str
    outline: tuple[str, ...]
    summary: str


def first_line(node: ast.AST) -> str | None:
    """Return the first line of a docstring if it is a plain sentence of its own, else None."""
    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
    plain = paragraph.isascii() and not any(mark in paragraph for mark in ("\n", ">>>", "->", "Internal"))
    return paragraph if plain and 20 <= len(paragraph) <= 90 and paragraph[0].isupper() and paragraph.endswith(".") else None


def signature_of(node: ast.FunctionDef) -> str:
    """Return the function's `def` line."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}:"


def functions_of(tree: ast.Module) -> Iterator[Function]:
    """Yield the public, plainly documented functions and methods of a module that have a body beside their docstring."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or len(node.body) < 2:
            continue
        if summary := first_line(node):
            body = "\n".join("    " + line for statement in node.body[1:] for line in ast.unparse(statement).splitlines())
            yield Function(name=node.name, signature=signature_of(node), body=body, summary=summary)


def outline_of(tree: ast.Module) -> tuple[str, ...]:
    """Return a line for each public class and function at a module's top level, up to MAX_OUTLINE characters."""
    lines: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            about = first_line(node)
            head = f"class {node.name}" if isinstance(node, ast.ClassDef) else f"def {node.name}({ast.unparse(node.args)})"
            lines.append(f"{head}: {about}" if about else head)
            if sum(map(len, lines)) > MAX_OUTLINE:
                return tuple(lines[:-1])
    return tuple(lines)


def read_library(directory: Path) -> tuple[list[Function], list[Module]]:
    """Parse every module below `directory`; return its functions and modules, each sorted by a hash of their content."""
    functions: dict[str, Function] = {}
    modules: dict[str, Module] = {}
    for file in sorted(directory.rglob("*.py")):
        parts = file.relative_to(directory).with_suffix("").parts
        if SKIPPED.intersection(parts) or parts[0].startswith(("config-", "_")):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # some libraries have sample files that do not parse on purpose
        for function in functions_of(tree):
            functions.setdefault(function.summary, function)
        name = ".".join(parts).removesuffix(".__init__")
        if summary := first_line(tree):
            modules[name] = Module(name=name, outline=outline_of(tree), summary=summary)
    return sorted(functions.values(), key=digest), sorted(modules.values(), key=digest)


def digest(item: Function | Module) -> bytes:
    """Return a sort key that mixes items well and depends on their content alone."""
    return hashlib.sha256(repr(item).encode()).digest()


def chat(system: str, question: str, answer: str) -> dict:
    """Return a row of type `messages`."""
    turns = (("system", system), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def pair(function: Function) -> dict:
    """Return a row of type `preference`: a bare docstring, and one as assistants tend to wrap it."""
    question = chat("Write the function's docstring in one line.", f"{function.signature}\n{function.body}", "")["messages"][:2]
    wordy = f"Here is a docstring for the function `{function.name}`:\n\n```python\n{function.signature}\n    {function.summary}\n```"
    answers = {"chosen": f'"""{function.summary}"""', "rejected": wordy}
    return {"prompt": question, **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()}}


def rows_of(functions: list[Function], modules: list[Module]) -> dict[str, list[dict]]:
    """Return every row each task could have; no function is used by two tasks, but for those at the end of a small library."""
    rows: dict[str, list[dict]] = {task: [] for task in NUM_ROWS}
    for function in functions:
        size = len(function.signature) + len(function.body)
        if 300 <= size <= 700 and len(rows["docstrings"]) <= NUM_ROWS["docstrings"]:
            source = f"{function.signature}\n{function.body}"
            rows["docstrings"].append(chat("Write the function's docstring in one line.", source, f'"""{function.summary}"""'))
        elif 30 <= len(function.signature) <= 90 and len(rows["signatures"]) <= NUM_ROWS["signatures"]:
            instruction = f"Write the signature of the Python function `{function.name}`."
            rows["signatures"].append({"instruction": instruction, "input": function.summary, "output": function.signature})
        elif len(function.name) >= 4:
            rows["names"].append({"prompt": f"# {function.summary}\ndef", "completion": f" {function.name}"})
    short = [function for function in reversed(functions) if len(function.signature) + len(function.body) < 300]
    rows["terse"] = [pair(function) for function in short[: NUM_ROWS["terse"] + 1]]
    for module in modules:
        outline = "\n".join(module.outline)
        if len(outline) >= MAX_OUTLINE // 2:
            rows["summaries"].append(chat("Say in one comment what the module is for.", outline, f"# {module.summary}"))
    return rows


def main() -> None:
    """Write the JSONL files and held_out.json into the directory named on the command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=folder)
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="another folder of Python source")
    arguments = parser.parse_args()
    rows = rows_of(*read_library(arguments.library))
    counts = {task: min(most, len(rows[task]) - 1) for task, most in NUM_ROWS.items()}
    if wanting := [task for task, num_rows in counts.items() if num_rows < 1]:
        parser.error(f"--library {arguments.library}: has no documented source for the task {wanting[0]}; name a larger one")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    held_out = {}
    for task, num_rows in counts.items():
        text = "".join(json.dumps(row) + "\n" for row in rows[task][:num_rows])
        (arguments.directory / f"{task}.jsonl").write_text(text, encoding="utf-8")
        held_out[task] = rows[task][num_rows]
        print(f"{arguments.directory / task}.jsonl: {num_rows} rows, {len(text)} characters")
    (arguments.directory / "held_out.json").write_text(json.dumps(held_out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
