"""The first rank's control over a whole run without a model (tests/living_plan.py): queue, requests, parking, moves, repetition."""

from __future__ import annotations

import json
import random
import time

import pytest
from living_plan import World, job_config

from megatron_lora.output.changes import job_mapping
from megatron_lora.output.events import REPLAYED, read_events
from megatron_lora.output.queue_file import read_queue
from megatron_lora.output.requests import RequestFolder, new_request, write_request


def lengths_of(num_steps: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(1, 12) for _ in range(rng.randint(1, 5))] for _ in range(num_steps)]


def some_jobs(number: int, seed: int = 0, **keys):
    rng = random.Random(seed)
    jobs = [job_config(f"job-{k}", r=rng.choice([4, 8, 24, 40]), **keys) for k in range(number)]
    return jobs, {job.name: lengths_of(rng.randint(2, 9), seed + k) for k, job in enumerate(jobs)}


def ask(path, verb: str, *names: str, **values) -> None:
    write_request(path, new_request(verb, names=names, values=values))


@pytest.mark.parametrize(("num_stages", "delay"), [(1, 0), (2, 0), (4, 1)])
def test_more_jobs_than_fit_wait_and_all_are_trained_once(one_process, tmp_path, num_stages, delay):
    jobs, lengths = some_jobs(14)
    world = World(tmp_path, jobs, lengths, num_stages=num_stages, delay=delay, room=jobs[:4])
    world.run()
    for job in jobs:
        world.check(job.name)
    assert set(world.states.values()) == {"done"}
    assert 1 < world.most_resident < 14
    events = read_events(tmp_path)
    assert [event.job for event in events if event.event == "started"][:2] == ["job-0", "job-1"]
    assert {event.job for event in events if event.event == "done"} == set(lengths)
    assert read_queue(tmp_path) == {"resident": [], "queue": []}


def test_a_job_whose_data_are_ready_trains_before_two_windows_have_passed(one_process, tmp_path):
    jobs, lengths = some_jobs(4)
    lengths = {name: lengths_of(40, seed) for seed, name in enumerate(lengths)} | {"late": lengths_of(2, 9)}
    world = World(tmp_path, [*jobs, job_config("late", r=8)], lengths, num_stages=2)
    ready, planned, ask_next, answers = [], [], world.control.ask, world.control.reader.answers
    world.control.ask = lambda window, slot: planned.append(window) or ask_next(window, slot)
    world.control.reader.answers = lambda: {k: v for k, v in answers().items() if k != "late"} | dict.fromkeys(["late"] * len(ready))

    def between(window: int) -> None:
        while window == 4 and 5 not in planned:  # a window is planned ahead of the one that runs
            time.sleep(0.001)
        ready.extend(["late"] * (window == 4))

    world.run(between)
    slots = [len(window.stream) for window in world.windows]
    late = [bool({segment.job for segment in microbatch.segments} & {4}) for window in world.windows for microbatch in window.stream]
    assert sum(slots[:6]) <= late.index(True) < sum(slots[:7])


def test_a_job_that_cannot_be_read_fails_alone(one_process, tmp_path):
    jobs, lengths = some_jobs(3)
    world = World(tmp_path, jobs, lengths, bad={"job-1": "jobs.job-1.datasets: nothing there"})
    world.run()
    assert world.states == {"job-0": "done", "job-1": "failed", "job-2": "done"}
    failed = next(event for event in read_events(tmp_path) if event.event == "failed")
    assert failed.details["reason"] == "jobs.job-1.datasets: nothing there"


def test_requests_take_effect_at_the_next_window(one_process, tmp_path):
    jobs, lengths = some_jobs(3, seed=5)
    lengths = {name: lengths_of(30, 7) for name in lengths} | {"late": lengths_of(4, 9)}
    late = job_config("late", r=8)
    world = World(tmp_path, jobs, lengths, num_stages=2, room=[*jobs, late])

    def between(window: int) -> None:
        if window == 1:
            ask(tmp_path, "pause", "job-0")
            ask(tmp_path, "cancel", "job-1")
            write_request(tmp_path, new_request("add", jobs=[job_mapping(late)]))
        if window == 6:
            assert world.states["job-0"] == "paused"
            ask(tmp_path, "resume", "job-0")

    world.run(between)
    assert world.states == {"job-0": "done", "job-1": "cancelled", "job-2": "done", "late": "done"}
    for name in ("job-0", "job-2", "late"):
        world.check(name)
    assert len(world.trained["job-1"]) < 30
    by_name = {event.event: event for event in read_events(tmp_path) if event.id is not None}
    assert by_name["paused"].window == by_name["cancelled"].window == by_name["added"].window == 3  # one window was planned already
    assert not list((tmp_path / "requests").glob("*.json"))


def test_a_set_priority_is_handed_to_the_ranks(one_process, tmp_path):
    jobs, lengths = some_jobs(2, seed=3)
    lengths = {name: lengths_of(20, 7) for name in lengths}
    world = World(tmp_path, jobs, lengths)
    world.run(lambda window: ask(tmp_path, "set", "job-1", priority=3.0) if window == 0 else None)
    configs = [window.changes.configs for window in world.windows if window.changes.configs]
    assert [config[1].priority for config in configs] == [3.0]


def test_a_job_that_has_waited_long_has_another_parked(one_process, tmp_path):
    jobs, _ = some_jobs(2)
    jobs = [job_config("long", r=16), job_config("short", r=16)]
    lengths = {"long": lengths_of(24, 1), "short": lengths_of(3, 2)}
    world = World(tmp_path, jobs, lengths, room=jobs[:1], max_wait_s=0.01)
    world.run()
    assert set(world.states.values()) == {"done"}
    world.check("long")
    world.check("short")
    assert [event.job for event in read_events(tmp_path) if event.event == "parked"][0] == "long"


def test_residents_move_so_that_a_wide_one_fits(one_process, tmp_path):
    """Room for eight narrow adapters; those with even numbers end first and leave holes, the wide one needs four of them in a row."""
    narrow = [job_config(f"narrow-{k}", r=16) for k in range(8)]
    wide = job_config("wide", r=64)
    lengths = {job.name: lengths_of(3 if k % 2 == 0 else 60, k) for k, job in enumerate(narrow)} | {"wide": lengths_of(3, 3)}
    world = World(tmp_path, [*narrow, wide], lengths, num_stages=2, room=narrow, capacity=64)
    world.run()
    for job in (*narrow, wide):
        world.check(job.name)
    assert world.moved
    ends = [event.job for event in read_events(tmp_path) if event.event == "done"]
    assert ends.index("wide") < ends.index("narrow-1")


def test_keep_alive_waits_for_jobs(one_process, tmp_path):
    jobs, lengths = some_jobs(1)
    late = job_config("late", r=4)
    lengths |= {"late": lengths_of(3, 9)}
    world = World(tmp_path, jobs, lengths, room=[*jobs, late], keep_alive=True)
    feed_end = []

    def between(window: int) -> None:
        if world.states["job-0"] == "done" and "late" not in world.states and not feed_end:
            feed_end.append(window)
            write_request(tmp_path, new_request("add", jobs=[job_mapping(late)]))
        if world.states.get("late") == "done":
            world.control.keep_alive = False

    world.run(between)
    world.check("late")


def test_a_job_that_is_done_cannot_be_paused_where_that_is_news(one_process, tmp_path):
    jobs, lengths = some_jobs(2)
    world = World(tmp_path, jobs, lengths)
    asked = []

    def between(window: int) -> None:
        if world.states["job-0"] == "done" and not asked:
            asked.append(new_request("pause", names=["job-0"]))
            write_request(tmp_path, asked[0])

    world.run(between)
    assert "job-0: is done" in str(RequestFolder(tmp_path).reason_of(asked[0]))


def test_a_run_that_was_stopped_is_repeated_as_far_as_its_events_go(one_process, tmp_path, capsys):
    """Jobs that had not joined by then do not join, and nobody waits for them; requests are refused."""
    jobs, lengths = some_jobs(4)
    World(tmp_path / "a", jobs, lengths, room=jobs[:1]).run()
    file = tmp_path / "a" / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    second = next(i for i, line in enumerate(lines) if json.loads(line)["event"] == "started" and i)
    file.write_text("".join(lines[:second]))
    again = World(tmp_path / "b", jobs, lengths, room=jobs[:1], replay=tmp_path / "a")
    again.run(lambda window: ask(tmp_path / "b", "cancel", "job-0") if window == 0 else None)
    assert again.states == {"job-0": "done", "job-1": "queued", "job-2": "queued", "job-3": "queued"}
    assert "refused: this run repeats another" in capsys.readouterr().err
    again.check("job-0")


@pytest.mark.parametrize("seed", range(12))
def test_random_requests_lose_and_repeat_nothing_and_events_repeat_the_run(one_process, tmp_path, seed):
    rng = random.Random(seed)
    num_stages, delay = rng.choice([(1, 0), (2, 0), (2, 1), (4, 0)])
    jobs, lengths = some_jobs(6, seed=seed)
    late = [job_config(f"late-{k}", r=rng.choice([4, 24])) for k in range(2)]
    lengths |= {job.name: lengths_of(rng.randint(1, 12), seed + 50) for job in late}
    validation = {name: [rng.randint(1, 9) for _ in range(3)] for name in lengths if rng.random() < 0.5}
    world = World(tmp_path / "a", jobs, lengths, num_stages=num_stages, delay=delay, room=jobs[:3] + late[:1], validation=validation)
    script = {rng.randint(0, 12): rng.choice(["pause", "resume", "cancel", "set", "add", "resume"]) for _ in range(9)}
    unadded, cancelled = list(late), set()

    def between(window: int) -> None:
        verb = script.get(window)
        if verb == "add" and unadded:
            write_request(tmp_path / "a", new_request("add", jobs=[job_mapping(unadded.pop())]))
        elif verb is not None and verb != "add":
            name = rng.choice(sorted(world.states))
            ask(tmp_path / "a", verb, name, **({"priority": rng.choice([0.5, 2.0])} if verb == "set" else {}))
        if all(state != "queued" and state != "running" for state in world.states.values()):
            for name in [name for name, state in world.states.items() if state == "paused"]:
                ask(tmp_path / "a", "resume", name)

    world.run(between)
    cancelled = {event.job for event in read_events(tmp_path / "a") if event.event == "cancelled"}
    for name, state in world.states.items():
        assert state in ("done", "cancelled", "paused"), world.states
        if state == "done":
            world.check(name)
        assert state != "cancelled" or name in cancelled
    again = World(
        tmp_path / "b",
        jobs,
        lengths,
        num_stages=num_stages,
        delay=delay,
        room=jobs[:3] + late[:1],
        validation=validation,
        replay=tmp_path / "a",
    )
    again.run()

    def slots(world):
        return [(window.stream, window.ended) for window in world.windows if window.stream]

    def events(world):
        return [(e.window, e.slot, e.id, e.event, e.job, e.details) for e in read_events(world.path) if e.event in REPLAYED]

    assert events(again) == events(world)
    first, second = slots(world), slots(again)
    assert second == first, (len(first), len(second))
    assert json.dumps(again.trained, sort_keys=True) == json.dumps(world.trained, sort_keys=True)
