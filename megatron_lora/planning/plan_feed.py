"""Plan windows for the executor: made on the first rank while earlier ones run, sent to all ranks, checked by each.

The first rank's planner works in a process of its own (scheduling.serve), so that it takes nothing from the training thread. Its
windows go to all ranks over a gloo group that only the feed's threads use, ahead of what runs. Every rank follows the stream
(scheduling.follow) and refuses a window that breaks a rule; a running SHA-256 of all windows travels with each, so no rank can run
another plan.

With several replicas, rounds of samples are planned (scheduling.data_parallel), and each rank takes its replica's part of them.

A job that leaves (it failed) is left out of the next window that is planned; what was planned of it stays. The plan depends on the
config, the seed, the steps that jobs begin with and the windows at which jobs left; steps and windows stand in `plan/window-NNNN.json`.
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

import torch
import torch.distributed as dist

import scheduling
from megatron_lora.files import write_atomically
from scheduling.data_parallel import deal
from scheduling.follow import Follower, Window
from scheduling.plan_json import stream_from_json
from scheduling.slot_cost import SlotCost
from scheduling.types import NOOP, Lengths

WINDOWS_AHEAD = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What a plan depends on besides the jobs' lengths."""

    num_stages: int
    num_replicas: int
    capacity: int
    delay: int
    cost: SlotCost
    num_slots: int = 32  # of a window


class PlanFeed:
    """The windows of a run, in order; iterate over it on every rank."""

    def __init__(
        self,
        lengths: Lengths,
        settings: PlanSettings,
        replica: int,
        plan_dir: Path,
        group: dist.ProcessGroup,
        first_steps: Sequence[int] = (),
    ):
        """Start to plan; `replica` is this rank's, `group` a gloo group of all ranks that nobody else uses.

        `first_steps` are the steps that the jobs begin with, those before them being taken already; by itself all begin with step 0.
        """
        self.dealt = deal(lengths, settings.num_replicas, settings.cost)
        self.first_steps = tuple(first_steps) or (0,) * len(lengths)
        self.settings, self.replica, self.plan_dir, self.group = settings, replica, plan_dir, group
        self.leaving: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.stopping, self.all_read = threading.Event(), False
        self.ready: queue.Queue[str | BaseException] = queue.Queue(maxsize=WINDOWS_AHEAD)
        work = self._plan_all if dist.get_rank() == 0 else self._receive_all
        self.thread = threading.Thread(target=self._guarded, args=(work,), name="plan-feed", daemon=True)
        self.thread.start()

    def leave(self, job: int) -> None:
        """Leave a job out of the windows that are still to be planned; on the first rank."""
        self.leaving.put(job)

    def __iter__(self) -> Iterator[Window]:
        """Give out the windows, waiting for those that are not there yet; the last one ends with the slots that drain the pipeline."""
        s = self.settings
        follower = Follower(self.dealt.rounds, s.num_stages, s.capacity, s.delay, self.first_steps)
        chain = hashlib.sha256()
        while not self.all_read:
            message = self._read()
            chain.update(json.dumps(message["microbatches"]).encode())
            assert message["sha256"] == chain.hexdigest(), "this rank follows another plan than the first rank"
            stream = stream_from_json(message["microbatches"])
            if message["last"]:
                stream += (NOOP,) * (s.num_stages + s.delay)
            ended = follower.follow(stream)
            yield Window(tuple(self.dealt.part(microbatch, self.replica) for microbatch in stream), ended)
            if message["last"]:
                follower.finish([job for job, _ in message["left"]])

    def close(self) -> None:
        """End a feed that was read to its end, or, on all ranks alike, one that nobody reads on: what is on its way is let go."""
        self.stopping.set()
        while not self.all_read:
            self._read()
        self.thread.join()

    def _read(self) -> dict:
        """Return the next window as it was sent; raises what the thread has raised."""
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
        """Ask the planner for window after window, file each and send it."""
        planner = _planner()
        try:
            left = [steps[first:] for steps, first in zip(self.dealt.rounds, self.first_steps, strict=True)]
            settings = asdict(self.settings) | {"lengths": left}
            del settings["num_replicas"]
            request = json.dumps(settings) + "\n"
            chain, number, last = hashlib.sha256(), 0, False
            while not last:
                leave = [self.leaving.get() for _ in range(self.leaving.qsize())]
                message = {"last": True, "left": [], "microbatches": []}
                if not self.stopping.is_set():
                    message = json.loads(_ask(planner, request + json.dumps({"leave": leave})))
                request = ""
                slots = [[[job, self.first_steps[job] + step, *rest] for job, step, *rest in slot] for slot in message["microbatches"]]
                chain.update(json.dumps(slots).encode())
                text = json.dumps(message | {"microbatches": slots, "sha256": chain.hexdigest()})
                if slots:
                    write_atomically(self.plan_dir / f"window-{number:04d}.json", text + "\n")
                _broadcast(text, self.group)
                self.ready.put(text)
                number, last = number + 1, message["last"]
        finally:
            planner.kill()
            planner.wait()

    def _receive_all(self) -> None:
        last = False
        while not last:
            text = _broadcast(None, self.group)
            last = json.loads(text)["last"]
            self.ready.put(text)


def _planner() -> subprocess.Popen[str]:
    """Start the planning process with this process's packages."""
    root = str(Path(scheduling.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "scheduling.serve"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})


def _ask(planner: subprocess.Popen[str], request: str) -> str:
    """Send lines to the planner and return its answer; RuntimeError when it has ended."""
    assert planner.stdin is not None and planner.stdout is not None
    try:
        print(request, file=planner.stdin, flush=True)
        answer = planner.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise RuntimeError(f"the planning process ended with status {planner.wait()}")
    return answer


def _broadcast(text: str | None, group: dist.ProcessGroup) -> str:
    """Send a text from the first rank to all; returns it."""
    payload = bytearray(text.encode() if text is not None else b"")
    size = torch.tensor([len(payload)])
    dist.broadcast(size, 0, group=group)
    if text is None:
        payload = bytearray(int(size))
    dist.broadcast(torch.frombuffer(payload, dtype=torch.uint8), 0, group=group)
    return payload.decode()
