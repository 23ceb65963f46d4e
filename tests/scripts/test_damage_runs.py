"""A seeded sample of damaged runs: refused in one line with nothing touched, or read as if whole. The script makes thousands."""

import pytest

from scripts import damage_runs


@pytest.fixture(scope="module")
def scene(tmp_path_factory, pool):
    root = tmp_path_factory.mktemp("damage")
    with damage_runs.quick(root):
        damage_runs.make_runs(root, pool)
        yield damage_runs.Scene(root)


def test_damage_is_refused_or_makes_no_difference(scene):
    reports = [scene.run_case(20, case) for case in range(40)]
    assert not [report for report in reports if report["outcome"] == "failed"]
    assert {report["outcome"] for report in reports} == {"refused", "same"}


def test_what_is_read_wrongly_is_seen(scene, monkeypatch):
    monkeypatch.setattr(damage_runs, "damage", lambda random, run: (run / "jobs" / "plain" / "x").write_text("") and "nothing")
    assert scene.run_case(0, 3)["outcome"] == "same"
    monkeypatch.setattr(damage_runs, "told", lambda job_dir, point: "another")
    monkeypatch.setattr(damage_runs, "KINDS", {"stopped": ("resume",)})
    assert scene.run_case(0, 3)["outcome"] == "failed"
