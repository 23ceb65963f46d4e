"""Wrong command lines of scripts: one line that says what is wrong, status 2, and nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

WRONG = [
    ("bench/compare_losses.py", ["nothing"], "nothing cannot be read"),
    ("bench/compare_losses.py", ["README.md"], "README.md cannot be read"),
    ("bench/compare_timeline.py", ["nothing", "--hardware", "x"], "no such file"),
    ("bench/compare_timeline.py", ["nothing", "--hardware", "x", "--cost", "README.md"], "README.md exists"),
    ("bench/tables.py", ["nothing"], "nothing cannot be read"),
    ("bench/record_quickstart.py", ["nothing", "--case", "x", "--total-s", "5"], "is not the directory of a finished run"),
    ("bench/record_quickstart.py", ["nothing", "--case", "x", "--total-s", "-5"], "-5 is not a number above 0"),
    ("bench/plot_kernels.py", ["word"], "unrecognized arguments"),
    ("bench/predict_several_gpus.py", ["--measured", "nothing"], "nothing cannot be read"),
    ("bench/predict_several_gpus.py", ["--tables", "nothing"], "nothing cannot be read"),
    ("bench/profile_layers.py", ["--tensor", "3"], "3 ranks cannot share"),
    ("bench/profile_layers.py", ["--stages", "9,9", "--recompute", "3*full", "--cost", "cost.json"], "is of 3 layers, --stages of 18"),
    ("bench/loss_curves.py", ["--figure", "figure.txt"], "ends in none of"),
    ("bench/end_to_end.py", ["--dropouts", "0,1.5"], "1.5 is not a number of at least 0 and below 1"),
    ("bench/end_to_end.py", ["--timeline", "README.md"], "is a file; name a folder"),
    ("bench/end_to_end.py", ["--output", "."], "is a directory; name a file"),
    ("bench/end_to_end.py", ["--save-cost", "cost.json"], "give both"),
    ("plot_timeline.py", ["nothing"], "is not the directory of a finished run"),
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
    ran = subprocess.run([sys.executable, str(SCRIPTS / script), *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    told = [line for line in ran.stderr.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert ran.returncode == 2 and says in told[-1] and len(told) == 1, ran.stderr
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "README.md").read_text() == "# A document\n"
