"""Plans are ready before they are needed: the feed is ahead of the executor, and a run waits for its first window only."""

from __future__ import annotations

import json
import subprocess
import sys

import oracle
import pytest
import runs
from waiting import wait_for

from megatron_lora.planning import plan_feed
from megatron_lora.planning.plan_feed import PlanFeed, PlanSettings
from scheduling.slot_cost import SlotCost

LENGTHS = [[[5, 7, 6, 9]] * 12, [[4, 4, 8]] * 16]


def test_windows_are_planned_ahead_of_the_one_that_runs_and_not_further(one_process, tmp_path):
    import torch.distributed as dist

    settings = PlanSettings(num_stages=2, num_replicas=1, capacity=24, delay=0, cost=SlotCost(), num_slots=4)
    feed = PlanFeed(LENGTHS, settings, 0, tmp_path, dist.group.WORLD)
    windows = iter(feed)

    def num_written() -> int:
        return len(list(tmp_path.glob("window-*.json")))

    taken = 0
    for _ in windows:
        taken += 1
        last = json.loads((tmp_path / f"window-{taken - 1:04d}.json").read_text())["last"]
        if last:
            break
        wait_for(lambda: feed.ready.full())  # the next window is there before it is asked for
        ahead = json.loads((tmp_path / f"window-{taken:04d}.json").read_text())
        if not ahead["last"]:
            wait_for(lambda expected=taken + 2: num_written() == expected)  # and the one after is planned, waiting to be queued
            assert feed.thread.is_alive()
    assert next(windows, None) is None
    feed.close()
    assert taken == num_written() > 5


def test_a_feed_keeps_what_its_resident_jobs_need_alone(one_process, tmp_path):
    """Three jobs over two replicas; one is resumed, one is removed. At most one step ends in a slot."""
    import torch.distributed as dist

    settings = PlanSettings(num_stages=2, num_replicas=2, capacity=24, delay=1, cost=SlotCost(), num_slots=4, max_endings=1)
    feed = PlanFeed([*LENGTHS, [[3, 3]] * 5], settings, 1, tmp_path, dist.group.WORLD, first_steps=[0, 0, 4])
    ended, resident = [], []
    for window in feed:
        ended += window.ended
        resident.append(set(feed.dealt.jobs))
        if len(resident) == 1:
            feed.remove(0)
    feed.close()
    steps = [each for slot in ended for each in slot]
    assert max(map(len, ended)) == 1
    assert [step for job, step in steps if job == 1] == list(range(16)) and [step for job, step in steps if job == 2] == [4]
    assert 0 < sum(job == 0 for job, _ in steps) < 12
    assert resident[-1] == set() and all(later <= earlier for earlier, later in zip(resident, resident[1:], strict=False))


@pytest.mark.parametrize("command", ["import sys; sys.exit(7)", "import sys; sys.stdin.readline(); sys.exit(7)"])
def test_a_planner_that_dies_is_reported(command, one_process, tmp_path, monkeypatch):
    import torch.distributed as dist

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    monkeypatch.setattr(plan_feed, "_planner", lambda: subprocess.Popen([sys.executable, "-c", command], **pipes))
    settings = PlanSettings(num_stages=2, num_replicas=1, capacity=24, delay=0, cost=SlotCost(), num_slots=4)
    with pytest.raises(RuntimeError, match="the planning process ended with status 7"):
        list(PlanFeed(LENGTHS, settings, 0, tmp_path, dist.group.WORLD))


def test_a_run_of_many_windows_waits_for_plans_only_at_its_start(pool, tmp_path):
    model = oracle.make_model(tmp_path / "model")
    rows = oracle.make_rows(tmp_path / "rows.jsonl", num_rows=48, seed=0)
    data = {"datasets": [{"path": str(rows), "type": "prompt_completion"}], "global_batch_size": 4, "max_steps": 60, "r": 4}
    jobs = [{"name": name, **data} for name in ("one", "two", "three")]
    config = runs.write_config(tmp_path / "config.yaml", model, tmp_path / "run", jobs, {"pp": 2}, 64)
    assert runs.start(pool, config, {"pp": 2}) == 0
    events = json.loads((tmp_path / "run" / "timeline.json").read_text())["traceEvents"]
    num_windows = len(list((tmp_path / "run" / "plan").glob("window-*.json")))
    for stage in (0, 1):
        spans = [(event["cat"], event["ts"], event["dur"]) for event in events if event["ph"] == "X" and event["pid"] == stage]
        waits = [span for span in spans if span[0] == "wait plan"]
        assert len(waits) > num_windows > 5  # a window is cut into chunks
        first_work = min(start for kind, start, _ in spans if kind == "F")
        total = max(start + seconds for _, start, seconds in spans) - first_work
        later = sum(seconds for _, start, seconds in waits if start > first_work)
        assert later < 0.2 * total, f"{later / 1e6:.3f} s of {total / 1e6:.3f} s"
        print(f"stage {stage}: {num_windows} windows, waited {later / 1e6:.4f} s of {total / 1e6:.3f} s")
