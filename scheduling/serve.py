"""Plan windows for another process, so that planning takes no time from its threads: one JSON line in, one out.

    python -m scheduling.serve
    in    {"lengths": [job][step][sample], "num_stages", "capacity", "delay", "num_slots", "cost": {SlotCost's fields}}
          {"leave": [job, ...]}            one per window: jobs to cut after the step that they have begun
    out   {"last", "left", "microbatches"}  the window in the contract's format; `left`: [job, first window without it]

The answers depend on the lines read and on nothing else. Ends after the last window.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator

from scheduling.plan_json import stream_to_json
from scheduling.slot_cost import SlotCost
from scheduling.windows import Carry, plan_window


def serve(requests: Iterable[str]) -> Iterator[str]:
    """Answer each request for a window; raises PlanError where no plan exists."""
    lines = iter(requests)
    settings = json.loads(next(lines))
    lengths, weights = settings.pop("lengths"), settings.pop("cost")
    cost = SlotCost(**weights | {"tiles": tuple(weights.get("tiles", ()))})
    carry, departed = Carry(), {}
    for number, line in enumerate(lines):
        for job in json.loads(line)["leave"]:
            progress = carry.progress[job]
            del lengths[job][progress.step + bool(progress.taken) :]
            departed[job] = number
        stream, carry = plan_window(lengths, carry=carry, cost=cost, **settings)
        last = carry.is_done(lengths)
        yield json.dumps({"last": last, "left": sorted(departed.items()), "microbatches": stream_to_json(stream, lengths)})
        if last:
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
