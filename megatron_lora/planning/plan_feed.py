"""Feeds plan windows to the executor: the first rank plans them while earlier ones run, and every rank checks them.

A window is the next few slots of the pipeline's stream. The first rank's planner is a process of its
own (scheduling.serve), so that it does not slow the training thread. A thread sends its windows, ahead
of those that run, to all ranks over a gloo group that only these threads use. Every rank checks each
window against the rules of a plan (scheduling.follow) and against a SHA-256 of all windows so far that
comes with it, so that all ranks run the same plan.

With several replicas the planner works on rounds, each of one sample per replica
(scheduling.data_parallel); a rank takes its replica's samples of every round.

A failed job is removed: later windows are planned without it, and its part of earlier windows stays.
The plan depends on the config, the seed, the jobs' first steps and the windows from which jobs were
removed. `plan/window-NNNN.json` has every window with its steps.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

import scheduling
from megatron_lora.files import write_atomically
from scheduling.data_parallel import Dealt, deal
from scheduling.follow import Follower, Window
from scheduling.plan_json import stream_from_json
from scheduling.slot_cost import SlotCost
from scheduling.types import MAX_ENDINGS, NOOP, Lengths
from scheduling.windows import WINDOW_SLOTS

WINDOWS_AHEAD = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What a plan depends on besides the lengths of the jobs' samples."""

    num_stages: int
    num_replicas: int
    capacity: int  # tokens of a microbatch at most
    delay: int  # slots that a gradient norm takes to be summed within a stage (Position.delay)
    cost: SlotCost
    num_slots: int = WINDOW_SLOTS  # of a window
    max_endings: int = MAX_ENDINGS  # steps that may end in one slot


class PlanFeed:
    """The windows of a run, in order. Every rank iterates over them."""

    def __init__(
        self,
        lengths: Lengths,
        settings: PlanSettings,
        replica: int,
        plan_dir: Path,
        group: dist.ProcessGroup,
        first_steps: Sequence[int] = (),
    ):
        """Start to plan samples of `lengths` [job][step][sample], in tokens.

        `replica` is this rank's replica, `group` a gloo group of all ranks that nothing else uses. Jobs start
        at `first_steps`, by default at step 0; the first rank writes windows into `plan_dir`.
        """
        firsts = first_steps or [0] * len(lengths)
        self.dealt = deal(lengths, settings.num_replicas, settings.cost)
        self.first_steps = dict(enumerate(firsts))
        self.settings = settings
        self.replica = replica
        self.plan_dir = plan_dir
        self.group = group
        self.removed: queue.SimpleQueue[int] = queue.SimpleQueue()  # jobs to remove from the next window
        self.stopping = threading.Event()
        self.all_read = False
        self.ready: queue.Queue[str | BaseException] = queue.Queue(maxsize=WINDOWS_AHEAD)
        work = self._plan_all if dist.get_rank() == 0 else self._receive_all
        self.thread = threading.Thread(target=self._guarded, args=(work,), name="plan-feed", daemon=True)
        self.thread.start()

    def remove(self, job: int) -> None:
        """Remove a job from the windows that are still to be planned; on the first rank."""
        self.removed.put(job)

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows, waiting for each. The last one ends with the no-ops that drain the pipeline."""
        s = self.settings
        follower = Follower([], s.num_stages, s.capacity, s.delay, max_endings=s.max_endings)
        for job, dealt in self.dealt.jobs.items():
            follower.join(job, dealt.rounds, self.first_steps[job])
        chain = hashlib.sha256()
        while not self.all_read:
            message = self._read()
            chain.update(json.dumps(message["microbatches"]).encode())
            assert message["sha256"] == chain.hexdigest(), "this rank follows another plan than the first rank"
            stream = stream_from_json(message["microbatches"])
            if message["last"]:
                stream += (NOOP,) * (s.num_stages + s.delay)
            for job in message["left"]:
                follower.leave(job)
            ended = follower.follow(stream)
            own = tuple(self.dealt.part(microbatch, self.replica) for microbatch in stream)
            self.dealt = Dealt({job: dealt for job, dealt in self.dealt.jobs.items() if job in follower.jobs})
            yield Window(own, ended)
            if message["last"]:
                follower.finish()

    def close(self) -> None:
        """End the feed; windows that were not read are dropped. All ranks must have read the same windows."""
        self.stopping.set()
        while not self.all_read:
            self._read()
        self.thread.join()

    def _read(self) -> dict:
        """Return the next window's message; raises what the thread has raised."""
        text = self.ready.get()
        if isinstance(text, BaseException):
            raise text
        message = json.loads(text)
        self.all_read = message["last"]
        return message

    def _guarded(self, work) -> None:
        try:
            work()
        except BaseException as failure:  # carried to the main thread, which raises it
            self.ready.put(failure)

    def _plan_all(self) -> None:
        """Plan window after window; write each to its file and send it."""
        planner = _planner()
        try:
            join = {job: list(dealt.rounds.from_step(self.first_steps[job])) for job, dealt in self.dealt.jobs.items()}
            settings = asdict(self.settings)
            del settings["num_replicas"]
            request = json.dumps(settings) + "\n"  # before the first window's
            chain, number, last = hashlib.sha256(), 0, False
            while not last:
                removed = [self.removed.get() for _ in range(self.removed.qsize())]
                message = {"last": True, "left": [], "microbatches": []}
                if not self.stopping.is_set():
                    message = json.loads(_ask(planner, request + json.dumps({"join": join, "leave": removed})))
                request, join = "", {}
                slots = [[[job, self.first_steps[job] + step, *rest] for job, step, *rest in slot] for slot in message["microbatches"]]
                chain.update(json.dumps(slots).encode())
                text = json.dumps(message | {"microbatches": slots, "sha256": chain.hexdigest()})
                if slots:
                    write_atomically(self.plan_dir / f"window-{number:04d}.json", text + "\n")
                dist.broadcast_object_list([text], 0, group=self.group)
                self.ready.put(text)
                number, last = number + 1, message["last"]
        finally:
            planner.kill()
            planner.wait()

    def _receive_all(self) -> None:
        last = False
        while not last:
            received = [""]
            dist.broadcast_object_list(received, 0, group=self.group)
            last = json.loads(received[0])["last"]
            self.ready.put(received[0])


def _planner() -> subprocess.Popen[str]:
    """Start the planning process; it imports the same packages as this one."""
    root = str(Path(scheduling.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "scheduling.serve"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})


def _ask(planner: subprocess.Popen[str], request: str) -> str:
    """Send lines to the planner and return its answer. Raises RuntimeError if it has ended."""
    assert planner.stdin is not None and planner.stdout is not None
    try:
        print(request, file=planner.stdin, flush=True)
        answer = planner.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise RuntimeError(f"the planning process ended with status {planner.wait()}")
    return answer
