"""A seeded sample of spoilt inputs: each is read or refused in one line. The script runs thousands; this runs 60 of each kind."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

import fuzz_inputs  # noqa: E402


@pytest.mark.parametrize("kind", fuzz_inputs.KINDS)
def test_spoilt_inputs_are_read_or_refused(kind, tmp_path):
    outcomes = []
    for case in range(60):
        directory = tmp_path / str(case)
        directory.mkdir()
        report = fuzz_inputs.run_case(kind, 18, case, directory)
        assert report["outcome"] != "failed", report
        outcomes.append(report["outcome"])
    assert {"read", "refused"} == set(outcomes)  # both paths are walked


@pytest.mark.parametrize("kind", fuzz_inputs.KINDS)
def test_an_unspoilt_input_is_read(kind, tmp_path, monkeypatch):
    module = __import__(f"fuzz_kinds.{kind}", fromlist=["make"])
    monkeypatch.setattr(module, "MUTATIONS", (lambda random, directory: "nothing",))
    for case in range(8):
        (tmp_path / str(case)).mkdir()
        assert fuzz_inputs.run_case(kind, 0, case, tmp_path / str(case))["outcome"] == "read"


def test_a_failure_is_reported_and_made_again(tmp_path, monkeypatch):
    module = __import__("fuzz_kinds.adapter", fromlist=["make"])
    monkeypatch.setattr(module, "read", lambda directory: 1 / 0)
    reports = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        reports.append(fuzz_inputs.run_case("adapter", 5, 7, tmp_path / name))
    assert reports[0]["outcome"] == "failed" and "ZeroDivisionError" in reports[0]["message"]
    assert reports[0]["mutations"] == reports[1]["mutations"]


def test_the_script_writes_a_line_for_each_case(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz_inputs.py", "--kind", "adapter", "--num", "3", "--output", str(tmp_path / "out")])
    assert fuzz_inputs.main() == 0
    reports = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [report["case"] for report in reports] == [0, 1, 2] and {report["outcome"] for report in reports} <= {"read", "refused"}
    assert capsys.readouterr().out.startswith("adapter ")
