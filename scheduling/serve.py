"""Plan windows for another process, so that planning takes no time from its threads: one JSON line in, one out.

    python -m scheduling.serve
    in    {"num_stages", "capacity", "delay", "num_slots", "max_endings", "window_time", "cost": {SlotCost's fields}}     once
          {"join": {job: {"steps": [step][sample], "validation": [sample], "evaluate_after": [steps taken], "priority", "mismatched"}},
           "leave": {job: evaluate}, "priorities": {job: priority}}
                                           one per window: first those that join it are added, then those that leave are cut after the
                                           step that they have begun, with the evaluations that are due by then if `evaluate`
    out   {"last", "left", "microbatches", "evaluate", "departed"}
                                           the window in the contract's format, and which of its slots are evaluation slots; `left`: who
                                           has left of those asked to, and after how many steps each ends; `departed`: of whom nothing
                                           remains to be planned after it; `last`: whether that is so of all

A job's number may be used again as scheduling.numbers says. The answers depend on the lines read and on nothing else. Without jobs a
window is empty. A request may have "noops": how many no-op slots have drained the pipeline after the last window.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator

from scheduling.plan_json import evaluation_slots, stream_to_json
from scheduling.slot_cost import SlotCost
from scheduling.windows import WindowPlanner


def serve(requests: Iterable[str]) -> Iterator[str]:
    """Answer each request for a window; raises PlanError where no plan exists."""
    lines = iter(requests)
    settings = json.loads(next(lines))
    weights = settings.pop("cost")
    planner = WindowPlanner(cost=SlotCost(**weights | {"tiles": tuple(weights.get("tiles", ()))}), **settings)
    for line in lines:
        request = json.loads(line)
        planner.idle(request.get("noops", 0))
        for job, plan in request["join"].items():
            planner.join(int(job), **plan)
        for job, priority in request.get("priorities", {}).items():
            if int(job) in planner.jobs:
                planner.set_priority(int(job), priority)
        before = planner.resident.union(map(int, request["join"]))
        leaving = ((int(job), evaluate) for job, evaluate in request["leave"].items())
        left = {job: planner.leave(job, evaluate) for job, evaluate in leaving if job in planner.resident}
        lengths, validation = planner.lengths, planner.evaluations.validation
        stream = planner.plan()
        window = {"microbatches": stream_to_json(stream, lengths, validation), "evaluate": evaluation_slots(stream)}
        yield json.dumps({"last": not planner.resident, "left": left, **window, "departed": sorted(before - planner.resident)})


def main() -> None:
    """Serve the process at the other end of stdin and stdout, until it closes them or is gone."""
    try:
        for answer in serve(sys.stdin):
            print(answer, flush=True)
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report the broken pipe again at exit


if __name__ == "__main__":
    main()
