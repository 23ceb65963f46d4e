"""Plans are correct for any workload: the replay accepts them, and rejects each way of breaking them."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.follow import Window
from scheduling.pipeline import endings, final_backwards, stage_actions, window_actions, with_drain
from scheduling.plan_json import stream_from_json, stream_to_json
from scheduling.planner import plan_stream
from scheduling.rolling import RollingStream
from scheduling.types import NOOP, Action, Ending, Microbatch, Op, PlanError, Segment
from scheduling.validate import replay

CAPACITY = 64
WORKLOADS = st.lists(
    st.lists(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=6), max_size=4),
    min_size=1,
    max_size=5,
)
STAGES, DELAY = st.integers(1, 5), st.integers(0, 1)


@given(WORKLOADS, STAGES, DELAY, st.integers(0, 1))
def test_plans_replay(lengths, num_stages, delay, effort):
    replay(plan_stream(lengths, num_stages, CAPACITY, delay, effort), lengths, num_stages, CAPACITY, delay)


@given(WORKLOADS, STAGES)
def test_json_round_trip(lengths, num_stages):
    stream = plan_stream(lengths, num_stages, CAPACITY, effort=0)
    assert stream_from_json(json.loads(json.dumps(stream_to_json(stream, lengths)))) == stream


@given(WORKLOADS, STAGES, DELAY, st.integers(1, 7))
def test_window_actions_concatenate_to_the_whole(lengths, num_stages, delay, size):
    stream = with_drain(plan_stream(lengths, num_stages, CAPACITY, delay, effort=0), num_stages, delay)
    for stage in range(num_stages):
        assert in_windows(stream, stage, num_stages, delay, size) == stage_actions(stream, stage, num_stages, delay)


def in_windows(stream, stage, num_stages, delay, size):
    """Return one stage's actions as an executor gets them, window by window."""
    rolling, actions = RollingStream(), ()
    for window in Window(stream, endings(stream)).chunks(size):
        slots = rolling.append(window)
        actions += window_actions(rolling, stage, num_stages, delay, slots.start, slots.stop)
        rolling.forget(num_stages + delay)
    return actions + final_backwards(rolling, stage, num_stages)


def two_job_plan():
    """Two jobs of two one-sample steps on two stages; job 1 fills the gap of job 0."""
    lengths = [[[5], [6]], [[7], [8]]]
    slots = [(0, 0, 5), (1, 0, 7), (0, 1, 6), (1, 1, 8)]
    return lengths, tuple(Microbatch((Segment(job, step, (0,), tokens),)) for job, step, tokens in slots)


def test_actions_by_hand():
    _, stream = two_job_plan()
    stream = with_drain(stream, 2)
    assert " ".join(map(str, stage_actions(stream, 0, 2))) == "F0 F1 B0 S0 F2 B1 S1 F3 B2 S0 F4 B3 S1 F5 B4 B5"
    assert " ".join(map(str, stage_actions(stream, 1, 2))) == "F0 B0 F1 B1 S0 F2 B2 S1 F3 B3 S0 F4 B4 S1 F5 B5"
    assert endings(stream)[:4] == tuple((Ending(job, step),) for job, step in ((0, 0), (1, 0), (0, 1), (1, 1)))


def test_drain_is_idempotent_and_needed():
    _, stream = two_job_plan()
    drained = with_drain(stream, 2, 1)
    assert len(drained) == 7 and with_drain(drained, 2, 1) == drained
    with pytest.raises(PlanError, match="append 3 no-op"):
        stage_actions(stream, 0, 2, 1)


def test_a_gap_of_exactly_p_suffices_and_less_does_not():
    lengths, stream = two_job_plan()
    replay(stream, lengths, 2, 8)
    with pytest.raises(PlanError, match="version 0, planned for 1"):
        replay(stream, lengths, 3, 8)
    with pytest.raises(PlanError, match="version 0, planned for 1"):
        replay(stream, lengths, 2, 8, delay=1)


def _without(stream, slot):
    return stream[:slot] + (NOOP,) + stream[slot + 1 :]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda s: _without(s, 3), "never scheduled"),
        (lambda s: (*s, s[3]), "scheduled 2 times"),
        (lambda s: s[:3] + (Microbatch((replace(s[3].segments[0], num_tokens=7),)),), "does not hold"),
        (lambda s: s[:3] + (Microbatch((replace(s[3].segments[0], samples=(4,)),)),), "no such sample"),
        (lambda s: (s[2], s[1], s[0], s[3]), "planned for"),
        (lambda s: (Microbatch(s[0].segments + s[1].segments), *s[2:]), "over the budget"),
    ],
)
def test_replay_rejects_broken_streams(broken, message):
    lengths, stream = two_job_plan()
    with pytest.raises(PlanError, match=message):
        replay(broken(stream), lengths, 2, 8)


def _swap(actions, first, second):
    changed = list(actions)
    i, j = changed.index(first), changed.index(second)
    changed[i], changed[j] = changed[j], changed[i]
    return changed


F, B, S = Op.FORWARD, Op.BACKWARD, Op.STEP


@pytest.mark.parametrize(
    ("stage", "first", "second", "message"),
    [
        (0, Action(B, 0), Action(B, 1), "not the oldest live"),
        (0, Action(B, 0), Action(F, 2), "version 0, planned for 1"),
        (0, Action(S, 0), Action(B, 0), "before its verdict"),
        (1, Action(S, 0), Action(F, 2), "version 0, planned for 1"),
        (1, Action(F, 0), Action(F, 1), "where slot 0 is next"),
    ],
)
def test_replay_rejects_broken_actions(stage, first, second, message):
    lengths, stream = two_job_plan()
    actions = [stage_actions(with_drain(stream, 2), s, 2) for s in range(2)]
    replay(stream, lengths, 2, 8, actions=actions)
    actions[stage] = _swap(actions[stage], first, second)
    with pytest.raises(PlanError, match=message):
        replay(stream, lengths, 2, 8, actions=actions)


def test_a_step_before_its_delayed_verdict_is_refused():
    """With a delay of one slot the verdict comes one forward later: steps placed as without delay are too early."""
    lengths, stream = [[[5]]], (Microbatch((Segment(0, 0, (0,), 5),)),)
    drained = with_drain(stream, 2, 1)
    replay(stream, lengths, 2, 8, delay=1)
    early = [stage_actions(drained, stage, 2, 0) for stage in range(2)]
    with pytest.raises(PlanError, match="STEP of job 0 step 0 before its verdict"):
        replay(stream, lengths, 2, 8, delay=1, actions=early)


def test_replay_finds_a_deadlock_and_too_many_live():
    lengths, stream = two_job_plan()
    first, second = (list(stage_actions(with_drain(stream, 2), s, 2)) for s in range(2))
    with pytest.raises(PlanError, match="deadlock: stage 0"):
        replay(stream, lengths, 2, 8, actions=[[first[0], first[2], first[1], *first[3:]], _swap(second, Action(B, 0), Action(F, 1))])
    early = [Action(F, 0), Action(F, 1), Action(B, 0)]
    with pytest.raises(PlanError, match="2 microbatches live"):
        replay(stream, lengths, 2, 8, actions=[first, [*early, *second[3:]]])


@pytest.mark.parametrize("lengths", [[[[5, 65]]], [[[]]], [[[0]]]])
def test_impossible_workloads_are_refused(lengths):
    with pytest.raises(PlanError, match="job 0 step 0"):
        plan_stream(lengths, 2, CAPACITY)


def test_command_line_is_deterministic(tmp_path):
    workload = {"w": {"stages": 3, "capacity": 64, "data": [[[9, 40, 3, 31], [8, 64]], [[30, 30, 30]], [[5], [6], [7]]]}}
    (tmp_path / "w.json").write_text(json.dumps(workload))
    plans = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "scheduling", "plan", str(tmp_path / "w.json"), "-o", str(tmp_path / "p.json"), "--only", "w"]
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed})
        plans.append(json.loads((tmp_path / "p.json").read_text())["w"]["microbatches"])
    assert plans[0] == plans[1]
    replay(stream_from_json(plans[0]), workload["w"]["data"], 3, 64)


def test_command_line_names_an_unknown_workload(tmp_path, capsys):
    from scheduling.__main__ import main

    (tmp_path / "w.json").write_text('{"a": {}}')
    assert main(["plan", str(tmp_path / "w.json"), "-o", str(tmp_path / "p.json"), "--only", "b"]) == 2
    assert "--only b: no such workload" in capsys.readouterr().err
