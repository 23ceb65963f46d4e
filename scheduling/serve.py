"""Plan windows for another process, so that planning takes no time from its threads: one JSON line in, one out.

    python -m scheduling.serve
    in    {"num_stages", "capacity", "delay", "num_slots", "max_endings", "cost": {SlotCost's fields}}     once
          {"join": {job: [step][sample]}, "leave": [job, ...]}     one per window: first those that join it are added, then those that
                                           leave are cut after the step that they have begun
    out   {"last", "left", "microbatches"}  the window in the contract's format; `left`: who has left of those asked to, and were not over

A job's number may be used again as scheduling.numbers says. The answers depend on the lines read and on nothing else. Ends after the
window that nothing remains to be planned after.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator

from scheduling.plan_json import stream_to_json
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
        for job, steps in request["join"].items():
            planner.join(int(job), steps)
        left = [job for job in request["leave"] if job in planner.jobs]  # the last steps of the others are planned already
        for job in left:
            planner.leave(job)
        lengths = planner.lengths
        microbatches = stream_to_json(planner.plan(), lengths)
        yield json.dumps({"last": not planner.jobs, "left": left, "microbatches": microbatches})
        if not planner.jobs:
            return


def main() -> None:
    """Serve the process at the other end of stdin and stdout, until it closes them or is gone."""
    try:
        for answer in serve(sys.stdin):
            print(answer, flush=True)
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report the broken pipe again at exit


if __name__ == "__main__":
    main()
