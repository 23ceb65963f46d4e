"""Live runs: jobs that are added, paused, resumed, cancelled and set end as they would alone, and events repeat a run bit for bit.

A seeded sample; scripts/play_live_runs.py plays any number of scripts.
"""

from __future__ import annotations

import live_scripts
import pytest


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A model, and jobs whose solo runs are made when they are needed."""
    return live_scripts.make_scene(tmp_path_factory.mktemp("live"))


@pytest.mark.parametrize(("seed", "parallel"), [(0, {"pp": 2}), (1, {"pp": 2}), (2, {"tp": 2}), (3, {"dp": 2})])
def test_jobs_under_requests_end_as_alone_and_events_repeat_the_run(seed, parallel, scene, pool, tmp_path):
    outcome = live_scripts.play(pool, scene, seed, parallel, tmp_path)
    live_scripts.check(pool, scene, outcome)
    if outcome.num_starts == 1:
        live_scripts.repeat(pool, scene, outcome, tmp_path)


@pytest.mark.parametrize(("seed", "parallel"), [(10, {"pp": 2}), (11, {"dp": 2})])
def test_a_stop_between_requests_changes_no_result(seed, parallel, scene, pool, tmp_path):
    outcome = live_scripts.play(pool, scene, seed, parallel, tmp_path, stop=True)
    assert outcome.num_starts > 1
    live_scripts.check(pool, scene, outcome)
