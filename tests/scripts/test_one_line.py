"""Wrong command lines of scripts: one line that says what is wrong, status 2, and nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

WRONG = [
    ("bench/tables.py", ["nothing"], "nothing cannot be read"),
    ("scripts.record_quickstart", ["nothing", "--case", "x", "--total-s", "5"], "is not the directory of a run that has ended"),
    ("scripts.record_quickstart", ["nothing", "--case", "x", "--total-s", "-5"], "-5 is not a number above 0"),
    ("scripts.plot_kernels", ["word"], "unrecognized arguments"),
    ("scripts.bench.kernels", [], "needs a GPU, and none is visible"),
    ("scripts.bench.elementwise", ["--rounds", "0"], "0 is not a whole number of at least 1"),
    ("scripts.bench.fp8", ["--output", "."], "is a directory; name a file"),
    ("scripts.bench.compare_commits", ["empty", "empty"], "is no checkout of this repository"),
    ("scripts.bench.loss_curves", ["--figure", "figure.txt"], "ends in none of"),
    ("scripts.bench.end_to_end", ["--dropouts", "0,1.5"], "1.5 is not a number of at least 0 and below 1"),
    ("scripts.bench.end_to_end", ["--runs", "README.md"], "is a file; name a folder"),
    ("scripts.bench.end_to_end", ["--output", "."], "is a directory; name a file"),
    ("scripts.precompile", ["word"], "there is no 'word'"),
    ("plot_losses.py", ["nothing"], "name the output directory of a run"),
    ("show_answers.py", ["nothing", "nothing"], "no such file"),
    ("make_tasks.py", ["README.md"], "is a file; name a folder"),
    ("make_tasks.py", ["tasks", "--library", "empty"], "has no documented source"),
]


@pytest.mark.parametrize(("script", "words", "says"), WRONG, ids=[f"{script} {' '.join(words)}" for script, words, _ in WRONG])
def test_a_wrong_command_line_gets_one_line(script, words, says, tmp_path):
    (tmp_path / "README.md").write_text("# A document\n")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    start = [str(SCRIPTS / script)] if script.endswith(".py") else ["-m", script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, *start, *words]
    ran = subprocess.run(command, cwd=tmp_path, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120)
    told = [line for line in ran.stderr.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert ran.returncode == 2 and says in told[-1] and len(told) == 1, ran.stderr
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "README.md").read_text() == "# A document\n"
