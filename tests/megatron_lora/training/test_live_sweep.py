"""A live sweep of a tiny model, unbroken and killed: the same decisions, and points that continue are as if they were never in a sweep."""

from __future__ import annotations

import random

import pytest
import sweep_scripts


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> sweep_scripts.Scene:
    return sweep_scripts.make_scene(tmp_path_factory.mktemp("sweep"))


def test_a_sweep_that_is_killed_decides_the_same_and_its_points_are_as_alone(pool, scene, tmp_path):
    whole = sweep_scripts.play(pool, scene, tmp_path / "whole", {"pp": 2})
    assert len(whole.survivors) == 1 and len(whole.decisions) == 12
    killed = sweep_scripts.play(pool, scene, tmp_path / "killed", {"pp": 2}, random.Random(1), num_kills=3)
    sweep_scripts.check(whole, killed)
    for outcome in (whole, killed):
        sweep_scripts.check_stopped(outcome)
        sweep_scripts.check_survivors(pool, scene, outcome)
