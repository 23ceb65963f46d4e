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


PP2, TP2, DP2 = {"pp": 2}, {"tp": 2}, {"dp": 2}
SCRIPTS = [(0, PP2, "none"), (2, TP2, "none"), (3, DP2, "stop"), (5, PP2, "kill")]


@pytest.mark.parametrize(("seed", "parallel", "end"), SCRIPTS)
def test_jobs_under_requests_end_as_alone_and_events_repeat_the_run(seed, parallel, end, scene, pool, tmp_path):
    outcome = live_scripts.play(pool, scene, seed, parallel, tmp_path, end)
    assert end == "none" or outcome.counts["starts"] > 1  # one more where a job is paused when the others end
    live_scripts.check(pool, scene, outcome)
    live_scripts.repeat(pool, outcome, tmp_path)
