"""The report of a run: exact for one that behaves as predicted, short by what the prediction does not know of; from its directory alone."""

import dataclasses
import json
from pathlib import Path

import pytest
import runs

from megatron_lora.__main__ import main
from megatron_lora.commands.finished_run import FinishedRun
from scheduling.cost import PassCost, StageCost
from scheduling.plan_json import stream_from_json
from scheduling.simulate import simulate
from scheduling.types import Op

SLOTS = [[[0, 0, 0, 10], [1, 0, 0, 20]], [[1, 0, 1, 30]], [], [[0, 1, 0, 12]]]
PER_TOKEN, STEP_S, STALL_S = 0.1, 0.5, 4.0


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a run of two stages and two windows that went as predicted, but for a stall before its last action."""
    job = {"datasets": [{"path": "rows.jsonl", "type": "text"}]}
    folder = tmp_path / "run"
    (folder / "plan").mkdir(parents=True)
    runs.write_config(folder / "config.yaml", tmp_path / "gone", folder, [{"name": "a", **job}, {"name": "b", **job}], {"pp": 2}, 64)
    (folder / "env.json").write_text(json.dumps({"commit": "c0", "devices": []}))
    for number, part in enumerate((SLOTS[:2], SLOTS[2:])):
        (folder / "plan" / f"window-{number:04d}.json").write_text(json.dumps({"microbatches": part}))
    one = PassCost(per_token=PER_TOKEN, per_square=0.0, per_rank_token=0.0, fixed=0.0)
    stage = StageCost(one, PassCost(per_token=2 * PER_TOKEN, per_square=0.0, per_rank_token=0.0, fixed=0.0))
    cost = {
        "jobs": ["a", "b"],
        "basis": "paper",
        "stages": [dataclasses.asdict(stage)] * 2,
        "hop_s": 0.0,
        "step_s": STEP_S,
        "peaks": [],
    }
    (folder / "cost.json").write_text(json.dumps(cost))
    for name, tokens in (("a", (10, 12)), ("b", (50,))):
        (folder / "jobs" / name).mkdir(parents=True)
        rows = [{"step": step, "tokens": count} for step, count in enumerate(tokens, 1)]
        (folder / "jobs" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    timeline, names = predicted(), {Op.FORWARD: "F", Op.BACKWARD: "B", Op.STEP: "STEP"}
    events = [{"ph": "M", "name": "process_name", "pid": 0}]

    def add(kind: str, index: int, stage: int, start: float, seconds: float) -> None:
        place = {"pid": stage, "tid": stage, "ts": (1 + start) * 1e6, "dur": seconds * 1e6}
        events.append({"ph": "X", "name": f"{kind} {index}", "cat": kind} | place)

    for event in timeline.events:
        if event.end_s > event.start_s:
            stall = STALL_S if event.end_s == timeline.makespan_s else 0.0
            add(names[event.op], event.index, event.stage, event.start_s + stall, event.end_s - event.start_s)
    add("wait plan", 0, 0, -1.0, 1.0)
    add("wait F", 0, 1, 0.0, 3.25)  # stage 0's forward of 30 tokens takes 3 s of it
    (folder / "timeline.json").write_text(json.dumps({"traceEvents": events}))
    return folder


def predicted():
    forward = [PER_TOKEN * sum(entry[3] for entry in slot) for slot in SLOTS]
    return simulate(stream_from_json(SLOTS), [forward] * 2, [[2 * time for time in forward]] * 2, step_s=STEP_S)


def test_real_and_predicted_differ_by_the_stall_alone(run, tmp_path, capsys):
    whole = predicted()
    found = FinishedRun.read(run)
    assert found.makespan_s == pytest.approx(whole.makespan_s + STALL_S)
    assert found.predicted().makespan_s == pytest.approx(whole.makespan_s) == found.replayed().makespan_s
    assert found.seconds(0, "wait plan") == 0.0, "what lies before the first work is no part of the run"
    busy = sum(3 * PER_TOKEN * sum(entry[3] for entry in slot) for slot in SLOTS)
    assert found.bubble(1) == pytest.approx(1 - (busy + 3 * STEP_S) / found.makespan_s)
    assert found.exposed_hops() == pytest.approx({"0>1": 0.25 / found.makespan_s, "1>0": 0.0})
    assert main(["report", str(run), "--plot", str(tmp_path / "run.png")]) == 0
    told = capsys.readouterr().out
    assert f"2 jobs, 3 steps, 72 tokens in {found.makespan_s:.2f} s" in told and "4 slots, 1 of them no-ops" in told
    assert f"predicted {whole.makespan_s:.2f} s, {whole.makespan_s / found.makespan_s:.3f} of the real time, by paper" in told
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_slots_that_were_planned_and_not_run_are_left_out(run, capsys):
    """As in a run that was stopped: its last windows are on disk, and no stage has executed them."""
    before = FinishedRun.read(run)
    for number in (1, 0):  # a name of five digits stands behind all of four
        (run / "plan" / f"window-{number:04d}.json").rename(run / "plan" / f"window-{9999 + number}.json")
    (run / "plan" / "window-10001.json").write_text(json.dumps({"microbatches": [[[1, 1, 0, 60]], [[1, 2, 0, 60]]]}))
    found = FinishedRun.read(run)
    assert found.slots == before.slots == SLOTS and found.predicted() == before.predicted()
    assert main(["report", str(run)]) == 0 and "4 slots, 1 of them no-ops" in capsys.readouterr().out


def test_a_timeline_that_has_lost_its_beginning_is_compared_with_nothing(run, capsys):
    tree = json.loads((run / "timeline.json").read_text())
    tree["traceEvents"] = [event for event in tree["traceEvents"] if event["name"] not in ("F 0", "wait F 0")]
    (run / "timeline.json").write_text(json.dumps(tree))
    assert main(["report", str(run)]) == 0
    told = capsys.readouterr().out
    assert "last part of this long run alone" in told and "predicted 1" not in told


@pytest.mark.parametrize(("lost", "begin"), [(1, 1), (2, 3)])  # slot 2 is a no-op
def test_of_a_long_run_the_part_that_its_timeline_has_is_reported(run, lost, begin, capsys):
    """Slots that have left the timeline count for neither the tokens nor the time; windows in front of them are not read."""
    whole = FinishedRun.read(run)
    for number, slot in enumerate((0, 2)):
        file = run / "plan" / f"window-{number:04d}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"slot": slot}))
    tree = json.loads((run / "timeline.json").read_text())
    gone = {f"{kind} {slot}" for kind in ("F", "B", "wait F") for slot in range(lost)}
    tree["traceEvents"] = [event for event in tree["traceEvents"] if event["name"] not in gone]
    (run / "timeline.json").write_text(json.dumps(tree))
    if lost == 2:
        (run / "plan" / "window-0000.json").write_text("{")
    part = FinishedRun.read(run)
    assert part.slots == SLOTS[begin:] and not part.is_complete and whole.is_complete
    assert part.tokens == {1: 62, 2: 12}[lost] < whole.tokens
    assert part.passes("F") == [stage[begin:] for stage in whole.passes("F")]
    assert part.makespan_s < whole.makespan_s and part.replayed().makespan_s < whole.replayed().makespan_s
    assert main(["report", str(run)]) == 0 and f"{4 - begin} slots" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("broken", "content"),
    [
        ("config.yaml", None),
        ("config.yaml", "[]"),
        ("timeline.json", None),
        ("timeline.json", "[]"),
        ("cost.json", None),
        ("cost.json", "{}"),
        ("cost.json", "[]"),
        ("cost.json", '{"jobs": ["a", "z"], "stages": [], "basis": "", "hop_s": 0, "step_s": 0, "peaks": []}'),
        ("cost.json", '{"jobs": ["a"], "stages": [], "basis": "", "hop_s": 0, "step_s": 0, "peaks": []}'),
        ("cost.json", '{"jobs": 3, "stages": {}, "basis": "", "hop_s": 0, "step_s": 0, "peaks": []}'),
    ],
)
def test_what_is_no_finished_run_is_one_line(run, broken, content, capsys):
    (run / broken).unlink()
    if content is not None:
        (run / broken).write_text(content)
    assert main(["report", str(run)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "is not the directory of a run that has ended" in told
    assert main(["report", str(run), "--plot", "picture.txt"]) == 2 and "--plot: 'picture.txt'" in capsys.readouterr().err


def test_a_plan_that_lacks_executed_slots_is_one_line(run, capsys):
    (run / "plan" / "window-0001.json").unlink()
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err.endswith("plan/ has 2 slots, and 4 were executed; restore its windows\n")
