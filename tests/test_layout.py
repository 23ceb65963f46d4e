"""The repository's shape: what lies at the top level, and which package may import which.

scheduling and fused_ops know nothing of megatron_lora or of each other, and no module imports itself through others. Imports are
read from the source, so those inside functions count too.
"""

import ast
import graphlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("megatron_lora", "fused_ops", "scheduling")
TOP_LEVEL = {
    *PACKAGES,
    "configs",
    "docs",
    "scripts",
    "tests",
    "setup.py",
    "SECURITY.md",
    "pyproject.toml",
    "README.md",
    "LOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    ".ci",
    ".gitignore",
}
ROOT_MODULES = {"errors", "files", "environment"}  # of megatron_lora; every room may import them
ROOMS = {  # room of megatron_lora -> what else it may import: rooms, other packages, or single modules
    "config": set(),
    "huggingface": {"fused_ops"},
    "parallel": {"config", "huggingface", "fused_ops"},
    "data": {"config", "scheduling.types", "scheduling.job_lengths", "fused_ops"},
    "output": {"config", "huggingface"},
    "model": {"config", "huggingface", "parallel", "data.microbatch", "scheduling.cost", "scheduling.memory", "fused_ops"},
    "planning": {"config", "huggingface", "parallel", "scheduling"},
    "training": {"config", "huggingface", "parallel", "data", "output", "model", "planning", "scheduling", "fused_ops"},
    "commands": {"config", "huggingface", "parallel", "data", "output", "model", "planning", "training", "scheduling", "fused_ops"},
}
OPERATORS = {
    "launch": {"launch"},
    "lora": {"launch", "lora"},
    "elementwise": {"launch", "lora", "elementwise"},
    "experts": {"launch", "lora", "experts"},
}  # the same of fused_ops
MAX_LINES, MAX_PRODUCT_LINES, MAX_FUNCTION_LINES = 500, 400, 80


def modules() -> dict[str, Path]:
    """Return dotted name -> file for every module of the three packages."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(file: Path, top_only: bool = False) -> set[str]:
    """Return the dotted names that a file imports; with `top_only` those that stand outside of functions, for type checkers too."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top = [*tree.body, *(node for block in tree.body if isinstance(block, ast.If | ast.Try) for node in block.body)]
    nodes = top if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write the full name"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("package", "others"), [("scheduling", {"megatron_lora", "fused_ops"}), ("fused_ops", {"megatron_lora", "scheduling"})]
)
def test_lower_packages_import_neither_the_trainer_nor_each_other(package, others):
    assert (ROOT / package / "__init__.py").exists()
    for name, file in modules().items():
        if name.split(".")[0] == package:
            assert not {target.split(".")[0] for target in imported(file)} & others, f"{file} imports above its station"


def test_scheduling_plans_without_torch():
    for name, file in modules().items():
        if name.startswith("scheduling"):
            assert not {target.split(".")[0] for target in imported(file)} & {"torch", "triton", "megatron", "transformers"}, file


def test_no_module_imports_itself_through_others():
    known = modules()
    graph = {name: (imported(file, top_only=True) & known.keys()) - {name} for name, file in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def room_of(name: str) -> str:
    """Return the room of a module of megatron_lora, or its own name where it lies at the root."""
    return name.split(".")[1] if "." in name else ""


def test_rooms_import_what_their_table_allows():
    folders = {path.name for path in (ROOT / "megatron_lora").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == ROOMS.keys()
    known = modules()
    for name, file in known.items():
        if not name.startswith("megatron_lora.") or room_of(name) == "__main__":
            continue
        room = room_of(name)
        allowed = {room, *ROOMS[room]} if room in ROOMS else set()
        for target in imported(file) & known.keys() - {"megatron_lora"}:
            inside = target.removeprefix("megatron_lora.")
            rooms = {".".join(inside.split(".")[:end]) for end in (1, 2)}  # the whole room, or that one module
            assert rooms & (allowed | ROOT_MODULES), f"{name} imports {target}, above its room"


def test_rooms_of_operators_import_what_their_table_allows():
    known = modules()
    for name, file in known.items():
        if name.startswith("fused_ops."):
            for target in imported(file) & known.keys() - {"fused_ops"}:
                assert target.split(".")[1] in OPERATORS[name.split(".")[1]], f"{name} imports {target}, above its room"


def test_functions_fit_a_screen():
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{file}: {node.name} has {lines} lines"


def test_top_level_is_exactly_the_layout():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == TOP_LEVEL


def test_files_open_with_a_header_and_stay_readable():
    for folder in (*PACKAGES, "scripts", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert ast.get_docstring(ast.parse(text)), f"{file}: says nothing about itself"
            limit = MAX_PRODUCT_LINES if folder in PACKAGES else MAX_LINES
            assert text.count("\n") <= limit, f"{file}: {text.count(chr(10))} lines; split it"
