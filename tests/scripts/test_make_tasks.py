"""The quickstart's datasets: made from any Python source, the same every time, in rows that the trainer reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from records import read_records

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "scripts" / "make_tasks.py"
TASKS = ("names", "signatures", "docstrings", "summaries", "terse")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small folder of documented modules."""
    folder = tmp_path_factory.mktemp("library")
    for m in range(4):
        lines = [f'"""Handles the widgets of workshop number {m}."""']
        for f in range(40):
            body = f"    total = {f}\n" + f"    for item in items:\n        total += item.weight * {f}\n" * (1 + f % 4 * 3)
            limits = ", ".join(f"limit_{n}={n}" for n in range(12 if f % 4 == 0 and f > 20 else 1))  # a long signature becomes a name
            lines.append(f'def measure_{m}_{f}(items, {limits}):\n    """Measure widget {f} of workshop {m}."""\n{body}    return total\n')
        (folder / f"workshop_{m}.py").write_text("\n".join(lines))
    (folder / "broken.py").write_text("def (:\n")
    return folder


def make(library, target):
    done = subprocess.run([sys.executable, str(SCRIPT), str(target), "--library", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {file.name: file.read_text() for file in target.iterdir()}


def test_the_same_source_gives_the_same_bytes(library, tmp_path):
    first, second = make(library, tmp_path / "a"), make(library, tmp_path / "b")
    assert first == second
    assert set(first) == {"held_out.json", *(f"{task}.jsonl" for task in TASKS)}


def test_no_job_trains_on_its_held_out_row_and_no_two_rows_are_the_same(library, tmp_path):
    files = make(library, tmp_path / "a")
    held_out = json.loads(files["held_out.json"])
    for task in TASKS:
        rows = files[f"{task}.jsonl"].splitlines()
        assert rows and len(set(rows)) == len(rows)
        assert json.dumps(held_out[task]) not in rows


def test_rows_are_of_the_types_that_the_config_names(tmp_path):
    from megatron_lora.config.schema import load_config

    make(Path(json.__file__).parent.parent, tmp_path)  # the standard library, as in the quickstart
    fields = {
        "prompt_completion": {"prompt", "completion"},
        "alpaca": {"instruction", "input", "output"},
        "messages": {"messages"},
    }
    for job in load_config(ROOT / "configs" / "quickstart.yaml").jobs:
        (dataset,) = job.datasets
        rows = [row for _, row in read_records(tmp_path / Path(dataset.path).name)]
        assert len(rows) >= 2 * job.global_batch_size
        assert all(row.keys() == fields[dataset.type] for row in rows)


def test_a_folder_without_source_is_refused_in_a_line(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--library", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--library" in done.stderr and "Traceback" not in done.stderr
