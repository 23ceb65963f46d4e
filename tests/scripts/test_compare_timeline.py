"""The comparison of prediction and timeline: exact for a run that behaves as simulated, and short by what it does not know of."""

import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import runs

from megatron_lora.commands.plan import read_cost
from scheduling.plan_json import stream_from_json
from scheduling.simulate import simulate
from scheduling.types import Op

ROOT = Path(__file__).resolve().parents[2]
SLOTS = [[[0, 0, 0, 10], [1, 0, 0, 20]], [[1, 0, 1, 30]], [], [[0, 1, 0, 12]]]
TIMES = [3.0, 1.0, 0.0, 2.0]


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a run of two stages and two windows that went as simulated, but for a stall before its last action."""
    job = {"datasets": [{"path": "rows.jsonl", "type": "text"}]}
    model = oracle.make_model(tmp_path / "model")
    folder = tmp_path / "run"
    (folder / "plan").mkdir(parents=True)
    runs.write_config(folder / "config.yaml", model, folder, [{"name": "a", **job}, {"name": "b", **job}], {"pp": 2}, 64)
    (folder / "env.json").write_text(json.dumps({"commit": "c0", "devices": []}))
    for number, part in enumerate((SLOTS[:2], SLOTS[2:])):
        (folder / "plan" / f"window-{number:04d}.json").write_text(json.dumps({"microbatches": part}))
    timeline = simulate(stream_from_json(SLOTS), 2, TIMES, [2 * time for time in TIMES], step_s=0.5)
    names = {Op.FORWARD: "F", Op.BACKWARD: "B", Op.STEP: "STEP"}
    events = [{"ph": "M", "name": "process_name", "pid": 0}]
    for event in timeline.events:
        if event.end_s > event.start_s:
            for rank in (0, 1):  # two ranks of each stage, one a little slower, one a little faster
                stall = 4.0 if event.end_s == timeline.makespan_s else 0.0
                change = (rank - 0.5) * 0.2 if event.op is not Op.STEP and event.end_s < timeline.makespan_s and event.start_s else 0.0
                start, seconds = (event.start_s + stall) * 1e6, (event.end_s - event.start_s + change) * 1e6
                kind = names[event.op]
                events.append(
                    {"ph": "X", "name": f"{kind} {event.index}", "cat": kind, "pid": event.stage, "tid": rank, "ts": start, "dur": seconds}
                )
    events += [
        {"ph": "X", "name": f"wait plan {at}", "cat": "wait plan", "pid": 0, "tid": 0, "ts": 0, "dur": s * 1e6}
        for at, s in ((0, 2), (2, 1))
    ]
    (folder / "timeline.json").write_text(json.dumps({"traceEvents": events}))
    return folder


def test_predicted_and_real_differ_by_the_stall_alone(run, tmp_path):
    output, cost = tmp_path / "timeline.jsonl", tmp_path / "cost.json"
    command = [sys.executable, ROOT / "scripts/bench/compare_timeline.py", run, "--hardware", "paper", "--output", output, "--cost", cost]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    (line,) = map(json.loads, output.read_text().splitlines())
    whole = simulate(stream_from_json(SLOTS), 2, TIMES, [2 * time for time in TIMES], step_s=0.5)
    assert line["predicted_s"] == pytest.approx(whole.makespan_s) and line["real_s"] == pytest.approx(whole.makespan_s + 4)
    assert f"{whole.makespan_s:.2f} s {whole.makespan_s + 4:>8.2f} s" in told
    assert line["predicted_bubble"] == pytest.approx([whole.bubble(0), whole.bubble(1)])
    assert all(real > predicted for real, predicted in zip(line["real_bubble"], line["predicted_bubble"], strict=True))
    assert (line["slots"], line["windows"], line["first_plan_wait_s"], line["later_plan_wait_s"]) == (4, 2, 2.0, 0.5)
    model = read_cost(str(cost), 2)
    for (tokens, squares), seconds in {(30, 500): 3.0, (30, 900): 1.0, (12, 144): 2.0}.items():
        assert 0.3 * seconds < model.stages[1].forward.seconds(tokens, squares, 16 * tokens) < 3 * seconds
