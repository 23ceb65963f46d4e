"""scripts/setup_env.sh: installs once, installs again when what it depends on has changed, leaves others' directories alone.

A stub stands in for the interpreter and for pip, so nothing is installed; everything around it is the real script.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STUB = f"""#!/usr/bin/env bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip install "*) echo "$*" >>"$CALLS"; [ -z "${{FAIL:-}}" ] || {{ echo "no such package"; exit 1; }} ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """Copy what the script reads into a directory of its own, beside the stub."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup.py", "scripts/setup_env.sh", "scripts/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def setup(checkout, **environment):
    keep = {key: value for key, value in os.environ.items() if key not in ("VENV", "CONSTRAINTS", "PYTHON")}
    given = keep | {"PYTHON": str(checkout / "python"), "CALLS": str(checkout / "calls")} | environment
    command = ["bash", "-c", "set -euo pipefail; source scripts/setup_env.sh; echo ready with $(command -v python)"]
    return subprocess.run(command, cwd=checkout, env=given, capture_output=True, text=True)


def num_installs(checkout):
    calls = checkout / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_it_installs_once_and_again_when_the_requirements_change(checkout):
    for _ in range(2):
        done = setup(checkout)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"ready with {checkout}/.venv/bin/python"
        assert num_installs(checkout) == 1
    (checkout / "scripts" / "constraints.txt").write_text("torch==1.0\n")
    assert setup(checkout).returncode == 0
    assert num_installs(checkout) == 2


def test_a_failed_installation_is_told_and_tried_again(checkout):
    failed = setup(checkout, FAIL="1")
    assert failed.returncode == 1 and "no such package" in failed.stderr and "ready" not in failed.stdout
    assert setup(checkout).returncode == 0
    assert num_installs(checkout) == 2


def test_a_directory_of_other_origin_is_left_alone(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "precious").write_text("x")
    refused = setup(checkout)
    assert refused.returncode == 2 and "was not made by this script" in refused.stderr
    assert (checkout / ".venv" / "precious").exists() and num_installs(checkout) == 0
    assert setup(checkout, VENV=str(checkout / "other")).returncode == 0


@pytest.mark.parametrize("python", ["/nonexistent/python", "false"])
def test_an_interpreter_that_will_not_do_is_refused_in_a_line(checkout, python):
    refused = setup(checkout, PYTHON=python)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith(f"setup_env: PYTHON={python} is not a Python 3.11")
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("script", [*sorted((ROOT / "scripts").glob("*.s*")), ROOT / ".ci" / "run"], ids=lambda file: file.name)
def test_shell_scripts_parse(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not a Python 3.11"),
        ({"CONSTRAINTS": "nothing.txt"}, "nothing.txt is no file"),
    ],
)
def test_a_wrong_setting_gets_one_line(checkout, environment, says):
    refused = setup(checkout, **environment)
    assert refused.returncode == 2 and says in refused.stderr and refused.stderr.count("\n") == 1 and num_installs(checkout) == 0
