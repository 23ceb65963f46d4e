"""Plans are ready before they are needed: the feed is ahead of the executor, and a run waits for its first window only."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import oracle
import pytest
import runs
from waiting import wait_for

from megatron_lora.files import pack, sealed, unpack, unsealed
from megatron_lora.output.run_files import read_windows, window_files
from megatron_lora.planning import plan_feed
from megatron_lora.planning.plan_feed import Asked, PlanFeed, PlannedJob, PlanSettings
from scheduling.data_parallel import DealtJob
from scheduling.job_lengths import read_lengths
from scheduling.slot_cost import SlotCost

LENGTHS = [[[5, 7, 6, 9]] * 12, [[4, 4, 8]] * 16]


class Jobs:
    """Director and crew of jobs that all join with the first window; those of `leave` leave with the second."""

    def __init__(self, lengths, settings, first_steps=(), leave=()):
        firsts = first_steps or [0] * len(lengths)
        self.jobs = [
            PlannedJob(number=n, dealt=DealtJob.of(read_lengths(n, steps), settings.num_replicas, SlotCost()), first_step=firsts[n])
            for n, steps in enumerate(lengths)
        ]
        self.leave, self.departed, self.windows = leave, set(), []

    def ask(self, window, slot):
        if len(self.departed) == len(self.jobs):
            return None
        return Asked(changes=window, leave=dict.fromkeys(self.leave, True) if window == 1 else {})

    def planned(self, planned):
        self.departed |= planned.departed
        self.windows.append(planned)
        return len(self.windows) - 1, frozenset(), {"joined": []}

    def read(self, changes, known=None):
        return self.jobs if changes == 0 else ()

    def prepare(self, changes):
        pass


def feed_of(lengths, settings, replica, path, **keys):
    import torch.distributed as dist

    jobs = Jobs(lengths, settings, **keys)
    return PlanFeed(settings, replica, path, dist.group.WORLD, jobs, jobs), jobs


def test_one_window_is_planned_ahead_of_the_one_that_runs_and_no_other(one_process, tmp_path):
    settings = PlanSettings(num_stages=2, num_replicas=1, capacity=24, delay=0, cost=SlotCost(), num_slots=4)
    feed, jobs = feed_of(LENGTHS, settings, 0, tmp_path)
    taken = 0
    for _ in feed:
        taken += 1
        wait_for(lambda: not feed.ready.empty())  # the next window, or the end, is there before it is asked for
        assert len(jobs.windows) <= taken + 1
    feed.close()
    assert taken == len(list(tmp_path.glob("window-*.json"))) > 5


def test_earlier_windows_are_packed_and_read_as_the_others(one_process, tmp_path, monkeypatch):
    """A window is packed once at least as many follow it as a packed file holds, so that few files lie open however long a run is."""
    settings = PlanSettings(num_stages=2, num_replicas=1, capacity=24, delay=0, cost=SlotCost(), num_slots=2)
    whole, packed = tmp_path / "whole", tmp_path / "packed"
    for run, size in ((whole, 10_000), (packed, 4)):
        (run / "plan").mkdir(parents=True)
        monkeypatch.setattr(plan_feed, "PACKED_WINDOWS", size)
        feed, _ = feed_of(LENGTHS, settings, 0, run / "plan")
        num_slots = sum(len(window.stream) for window in feed)
        feed.close()
    windows = read_windows(whole)
    assert len(windows) > 16 and read_windows(packed) == windows
    names = [file.name for file in window_files(packed)]
    assert names[:2] == ["windows-0000-0003.jsonl.gz", "windows-0004-0007.jsonl.gz"] and 4 <= sum("window-" in name for name in names) < 8
    assert sorted(names) == sorted(file.name for file in (packed / "plan").iterdir())
    firsts = [unsealed(text)["slot"] for _, text in windows]
    assert firsts == sorted(firsts) and firsts[-1] < num_slots
    part = read_windows(packed, since=firsts[6])
    assert part == windows[4:], "from the beginning of the packed file that has the slot"
    (packed / "plan" / windows[0][0]).write_text(windows[0][1])  # as a kill in front of its removal leaves it
    assert read_windows(packed) == windows
    damaged = packed / "plan" / names[0]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"windows-0000-0003\.jsonl\.gz"):
        read_windows(packed)
    assert read_windows(packed, since=firsts[6]) == part


def test_a_packed_window_takes_the_bytes_that_the_document_says(tmp_path):
    """Sixteen samples a slot, of any of 2,000 and of any length: 20 bytes each, packed 6, in docs/running.md."""
    draw, files = random.Random(0), []
    for number in range(64):
        slots = [[[job, number, draw.randrange(2000), draw.randrange(2048)] for job in range(4) for _ in range(4)] for _ in range(32)]
        files.append(tmp_path / f"window-{number}.json")
        files[-1].write_text(sealed(json.dumps({"microbatches": slots, "slot": 32 * number})))
    single = sum(file.stat().st_size for file in files)
    pack(files, tmp_path / "packed.gz")
    assert single / (64 * 32 * 16) < 21 and (tmp_path / "packed.gz").stat().st_size / (64 * 32 * 16) < 6
    assert [unsealed(line.decode())["slot"] for line in unpack(tmp_path / "packed.gz")] == [32 * number for number in range(64)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_feed_keeps_what_its_resident_jobs_need_alone(one_process, tmp_path):
    """Three jobs over two replicas; one is resumed, one is removed. At most one step ends in a slot."""
    settings = PlanSettings(num_stages=2, num_replicas=2, capacity=24, delay=1, cost=SlotCost(), num_slots=4, max_endings=1)
    feed, jobs = feed_of([*LENGTHS, [[3, 3]] * 5], settings, 1, tmp_path, first_steps=[0, 0, 4], leave=[0])
    ended = [each for window in feed for each in window.ended]
    feed.close()
    steps = [each for slot in ended for each in slot]
    assert max(map(len, ended)) == 1
    assert [step for job, step, _ in steps if job == 1] == list(range(16)) and [step for job, step, _ in steps if job == 2] == [4]
    left = next(window.left for window in jobs.windows if window.left)
    assert left == {0: sum(job == 0 for job, *_ in steps)} and 0 < left[0] < 12
    assert not feed.dealt and not feed.follower.jobs


@pytest.mark.parametrize("command", ["import sys; sys.exit(7)", "import sys; sys.stdin.readline(); sys.exit(7)"])
def test_a_planner_that_dies_is_reported(command, one_process, tmp_path, monkeypatch):
    started = subprocess.Popen
    monkeypatch.setattr(plan_feed.subprocess, "Popen", lambda words, **keys: started([sys.executable, "-c", command], **keys))
    settings = PlanSettings(num_stages=2, num_replicas=1, capacity=24, delay=0, cost=SlotCost(), num_slots=4)
    with pytest.raises(RuntimeError, match="the planning process ended with status 7"):
        list(feed_of(LENGTHS, settings, 0, tmp_path)[0])


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
