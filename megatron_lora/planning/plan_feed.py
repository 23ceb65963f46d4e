"""Feeds plan windows to the executor: the first rank plans them while earlier ones run, and every rank checks them.

A window is the next few slots of the pipeline's stream, and what changes at its border: jobs join and
leave, rows of the arena are freed and move. The first rank asks its director for the changes and a
planner for the slots; the planner is a process of its own (scheduling.serve), so that it does not slow
the training thread. A thread sends the windows to all ranks over a gloo group that only these threads
use. One window is planned beyond the one that runs, never two, so that changes take effect soon. Every
rank checks each window against the rules of a plan (scheduling.follow) and against a SHA-256 of all
windows so far that comes with it, so that all ranks run the same plan.

With several replicas the planner works on rounds, each of one sample per replica
(scheduling.data_parallel); a rank takes its replica's samples of every round.

The plan depends on the config, the seed, and the windows in which jobs joined and left.
`plan/window-NNNN.json` has every window with its slots; earlier ones are packed, PACKED_WINDOWS in a
file, `plan/windows-NNNN-NNNN.jsonl.gz`.

    feed = PlanFeed(settings, replica=0, plan_dir=plan_dir, group=group, director=director, crew=crew)
    executor.run(feed)
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

import scheduling
from megatron_lora.files import pack, sealed, write_atomically
from scheduling.accounting import usage
from scheduling.data_parallel import Dealt, DealtJob
from scheduling.follow import Follower, Window
from scheduling.job_lengths import JobLengths
from scheduling.mismatched import with_needed
from scheduling.plan_json import stream_from_json
from scheduling.references import Wanted
from scheduling.slot_cost import SlotCost
from scheduling.types import MAX_ENDINGS, NOOP, Ending, Stream
from scheduling.windows import WINDOW_SLOTS

PACKED_WINDOWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What a plan depends on besides the lengths of the jobs' samples."""

    num_stages: int
    num_replicas: int
    capacity: int  # tokens of a microbatch at most
    delay: int  # slots that a gradient norm takes to be summed within a stage (Position.delay)
    cost: SlotCost
    num_slots: int = WINDOW_SLOTS  # of a window
    max_endings: int = MAX_ENDINGS  # steps and evaluations that may end in one slot
    window_time: float | None = None  # of a window at most, in planned time; None: no bound

    @property
    def gap(self) -> int:
        """Slots that have a backward, from the end of a step to the job's next one."""
        return self.num_stages + self.delay


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """What plans know of a job that joins. Steps are counted from its very first."""

    number: int
    dealt: DealtJob
    first_step: int = 0
    evaluate_after: Sequence[int] = ()
    priority: float = 1.0
    until: int | None = None  # steps: a rung of its sweep, where it leaves; None: it is planned to its end
    wanted: Wanted = field(default_factory=dict)  # rounds that need a reference slot (scheduling.references)
    known: Any = None  # references that are known when it joins: the first rank's, which it hands to the others

    @property
    def rounds(self) -> JobLengths:
        """What is planned of it, from its very first step on."""
        return self.dealt.rounds if self.until is None else self.dealt.rounds.cut(self.until)

    @property
    def evaluations(self) -> list[int]:
        """After which numbers of steps it is evaluated, as far as it is planned."""
        return [step for step in self.evaluate_after if self.until is None or step <= self.until]

    def request(self) -> dict[str, Any]:
        """Return what the planner gets, which counts steps from `first_step`."""
        return {
            "steps": list(self.rounds.from_step(self.first_step)),
            "validation": list(self.dealt.validation_rounds),
            "evaluate_after": [step - self.first_step for step in self.evaluations],
            "priority": self.priority,
            "mismatched": self.dealt.mismatched is not None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What changes with the next window: for the ranks (`changes`, which the feed hands on), and for the planner.

    `leave`: number of a job that leaves after the step it has begun -> whether evaluations that are due
    are made first.
    """

    changes: Any
    leave: Mapping[int, bool] = field(default_factory=dict)
    priorities: Mapping[int, float] = field(default_factory=dict)


class Used(NamedTuple):
    """What a job uses of a window: its tokens, slots and predicted time; `padding`: rows that are planned beyond its tokens."""

    tokens: int
    slots: int
    time: float
    padding: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A window as it was planned: its slots of rounds, what ends in each, and who leaves.

    Who was asked to leave and is not in `left`, number -> steps taken then, has all its steps planned.
    Of those who have `departed` nothing remains to be planned. Who is `at_rung` has left there.
    """

    stream: Stream
    ended: Sequence[Sequence[Ending]]
    left: Mapping[int, int]
    departed: frozenset[int]
    at_rung: frozenset[int] = frozenset()
    used: Mapping[int, Used]


class Director(Protocol):
    """Decides, on the first rank and in the feed's thread, what changes."""

    def ask(self, window: int, slot: int) -> Asked | None:
        """Return what changes with a window that begins at `slot`; None where the run ends. May wait a little for something to do."""
        ...

    def planned(self, planned: Planned) -> tuple[Any, frozenset[tuple[int, int]], dict[str, Any]]:
        """Return the window's completed changes, the (job, step) pairs after which the job's rows move, and what its file says of them."""
        ...


class Crew(Protocol):
    """Prepares, on every rank and in the feed's thread, what the changes of a window need."""

    def read(self, changes: Any, known: Mapping[int, Any] | None = None) -> Sequence[PlannedJob]:
        """Return the jobs that join, with their data; the first rank calls it before it plans the window.

        The others get what the first rank found `known` of jobs, by number.
        """
        ...

    def prepare(self, changes: Any) -> None:
        """Make ready what the training thread will take at the window's border."""
        ...


class PlanFeed:
    """The windows of a run, in order. Every rank iterates over them."""

    def __init__(
        self, settings: PlanSettings, replica: int, plan_dir: Path, group: dist.ProcessGroup, director: Director | None, crew: Crew
    ):
        """Start to plan.

        `replica` is this rank's replica, `group` a gloo group of all ranks that nothing else uses. The
        first rank has the `director`, and writes windows into `plan_dir`.
        """
        s = settings
        self.settings = settings
        self.replica = replica
        self.plan_dir = plan_dir
        self.group = group
        self.director = director
        self.crew = crew
        self.follower = Follower([], s.num_stages, s.capacity, s.delay, max_endings=s.max_endings)
        self.dealt: dict[int, DealtJob] = {}  # of the jobs that are followed
        self.until: dict[int, int] = {}  # of those that leave at a rung: after which step
        self.stopping = threading.Event()
        self.wanted = threading.Semaphore(1)  # windows that may be planned
        self.all_read = False
        self.ready: queue.SimpleQueue[Window | None | BaseException] = queue.SimpleQueue()  # None: the end
        work = self._plan_all if director is not None else self._receive_all
        self.thread = threading.Thread(target=self._guarded, args=(work,), name="plan-feed", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows, waiting for each. Where nothing remains to be planned, no-ops drain the pipeline."""
        while (window := self._read()) is not None:
            yield window

    def close(self) -> None:
        """End the feed; windows that were not read are dropped. All ranks must have read the same windows."""
        self.stopping.set()
        while not self.all_read:
            self._read()
        self.thread.join()

    def _read(self) -> Window | None:
        """Return the next window, and have another planned; raises what the thread has raised."""
        window = self.ready.get()
        if isinstance(window, BaseException):
            raise window
        self.all_read = window is None
        self.wanted.release()
        return window

    def _guarded(self, work) -> None:
        try:
            work()
        except BaseException as failure:  # carried to the main thread, which raises it
            self.ready.put(failure)

    def _plan_all(self) -> None:
        """Plan window after window; write each to its file and send it."""
        assert self.director is not None
        chain, number, slot = hashlib.sha256(), 0, 0
        with _Planner(self.settings) as planner:
            while True:
                self.wanted.acquire()
                asked = None if self.stopping.is_set() else self.director.ask(number, slot)
                if asked is None or self.stopping.is_set():
                    break
                joined = self.crew.read(asked.changes)
                window = planner.plan(asked, joined)
                wanted = {number: progress.wanted for number, progress in self.follower.jobs.items()}
                wanted |= {job.number: job.wanted for job in joined}
                compared = {number: dealt.mismatched for number, dealt in self.dealt.items()}
                compared |= {job.number: job.dealt.mismatched for job in joined}
                window |= with_needed(window, wanted, compared, self.follower.opened(), self.settings.capacity)
                before = self.follower.jobs.keys() | {job.number for job in joined}
                followed = self._follow(window, joined)
                departed = frozenset(before - self.follower.jobs.keys())
                rungs = {number: self.until.pop(number) for number in departed & self.until.keys()}
                left = rungs | dict(window["left"])
                at_rung = frozenset(number for number, step in rungs.items() if left[number] == step)
                changes, moves, told = self.director.planned(
                    Planned(stream=followed.rounds, ended=followed.ended, left=left, departed=departed, at_rung=at_rung, used=followed.used)
                )
                chain.update(_planned(window))
                window |= {"moves": sorted(moves), "sha256": chain.hexdigest()}
                self._write(number, window | told | {"slot": slot})
                known = {job.number: job.known for job in joined}
                dist.broadcast_object_list([json.dumps(window), changes, known], 0, group=self.group)
                self._put(followed, window, changes)
                number, slot = number + 1, slot + len(followed.rounds)
        if not self.stopping.is_set():
            self.follower.finish()
        dist.broadcast_object_list(["", None, None], 0, group=self.group)
        self.ready.put(None)

    def _write(self, number: int, window: dict[str, Any]) -> None:
        """Write a window to its file; pack earlier ones, so that at most twice PACKED_WINDOWS files lie open."""
        if window["microbatches"]:
            write_atomically(self.plan_dir / f"window-{number:04d}.json", sealed(json.dumps(window)))
        first, rest = divmod(number + 1 - 2 * PACKED_WINDOWS, PACKED_WINDOWS)
        if first >= 0 and not rest:
            numbers = range(first * PACKED_WINDOWS, (first + 1) * PACKED_WINDOWS)
            packed = self.plan_dir / f"windows-{numbers[0]:04d}-{numbers[-1]:04d}.jsonl.gz"
            pack([self.plan_dir / f"window-{number:04d}.json" for number in numbers], packed)

    def _receive_all(self) -> None:
        chain = hashlib.sha256()
        while True:
            received: list[Any] = ["", None, None]
            dist.broadcast_object_list(received, 0, group=self.group)
            text, changes, known = received
            if not text:
                break
            window = json.loads(text)
            chain.update(_planned(window))
            assert window["sha256"] == chain.hexdigest(), "this rank follows another plan than the first rank"
            self._put(self._follow(window, self.crew.read(changes, known)), window, changes)
        self.ready.put(None)

    def _follow(self, window: dict[str, Any], joined: Sequence[PlannedJob]) -> _Followed:
        """Check a window, and find what ends in its slots."""
        for job in joined:
            held = job.dealt.validation_rounds, job.evaluations, job.wanted, job.dealt.mismatched
            self.follower.join(job.number, job.rounds, job.first_step, *held)
            self.dealt[job.number] = job.dealt
            if job.until is not None:
                self.until[job.number] = job.until
        for number, evaluate in window["leave"]:
            self.follower.leave(number, evaluate)
        kinds = (window[kind] for kind in ("evaluate", "reference", "mismatched"))
        rounds = stream_from_json(window["microbatches"], *kinds) + (NOOP,) * window["drain"]
        ended = self.follower.follow(rounds)
        own = tuple(Dealt(self.dealt).part(microbatch, self.replica) for microbatch in rounds)
        used = self._used(rounds) if self.director is not None else {}
        self.dealt = {number: dealt for number, dealt in self.dealt.items() if number in self.follower.jobs}
        return _Followed(rounds, own, ended, used)

    def _used(self, rounds: Stream) -> dict[int, Used]:
        """Return what each job uses of a window, over all replicas."""
        replicas = self.settings.num_replicas
        lengths = {number: dealt.rounds for number, dealt in self.dealt.items()}
        validation = {number: dealt.validation_rounds for number, dealt in self.dealt.items()}
        tokens: Counter[int] = Counter()
        for slot in (Dealt(self.dealt).part(microbatch, replica) for replica in range(replicas) for microbatch in rounds):
            tokens.update({segment.job: segment.num_tokens for segment in slot.segments})
        mismatched = {number: dealt.mismatched for number, dealt in self.dealt.items() if dealt.mismatched is not None}
        found = usage(rounds, lengths, self.settings.cost, validation, mismatched)
        return {n: Used(tokens[n], each.slots, each.time, replicas * each.tokens - tokens[n]) for n, each in found.items()}

    def _put(self, followed: _Followed, window: dict[str, Any], changes: Any) -> None:
        self.ready.put(Window(followed.own, followed.ended, frozenset(map(tuple, window["moves"])), changes))
        self.crew.prepare(changes)  # what of it is not there yet is waited for where it is needed


def _planned(window: dict[str, Any]) -> bytes:
    """Return what a window's SHA-256 is of."""
    return json.dumps([window[name] for name in ("microbatches", "evaluate", "reference", "mismatched")]).encode()


class _Followed(NamedTuple):
    """A window's slots of rounds, this replica's part of them, what ends in each, and on the first rank what jobs use of it."""

    rounds: Stream
    own: Stream
    ended: tuple[tuple[Ending, ...], ...]
    used: dict[int, Used]


class _Planner:
    """The planning process, and how many steps each of its jobs had taken when it joined."""

    def __init__(self, settings: PlanSettings):
        """Start it; it imports the same packages as this process."""
        self.settings = settings
        self.first_steps: dict[int, int] = {}
        self.is_empty = True
        self.drain = 0  # no-ops behind the last window's slots
        root = str(Path(scheduling.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "scheduling.serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        told = asdict(settings)
        del told["num_replicas"]
        self.request = json.dumps(told) + "\n"  # before the first window's

    def __enter__(self) -> _Planner:
        return self

    def __exit__(self, *exception) -> None:
        self.process.kill()
        self.process.wait()

    def plan(self, asked: Asked, joined: Sequence[PlannedJob]) -> dict[str, Any]:
        """Return the next window."""
        self.first_steps |= {job.number: job.first_step for job in joined}
        was_empty = self.is_empty and not joined
        if was_empty:
            return {"microbatches": [], "evaluate": [], "drain": 0, "left": [], "leave": []}
        joining = {job.number: job.request() for job in joined}
        answer = self._ask({"join": joining, "leave": asked.leave, "priorities": asked.priorities, "noops": self.drain})
        self.is_empty = answer["last"]
        # Sums of an evaluation are sent with the next slot that has a backward: one more, where that is a no-op.
        ends_evaluating = bool(answer["evaluate"]) and answer["evaluate"][-1] == len(answer["microbatches"]) - 1
        self.drain = self.settings.gap + ends_evaluating if self.is_empty else 0
        left = {int(job): self.first_steps[int(job)] + steps for job, steps in answer["left"].items()}
        return {
            "microbatches": [[[job, self.first_steps[job] + step, *rest] for job, step, *rest in slot] for slot in answer["microbatches"]],
            "evaluate": answer["evaluate"],
            "drain": self.drain,
            "left": sorted(left.items()),
            "leave": [[job, asked.leave[job]] for job in left],
        }

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer. Raises RuntimeError if the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(self.request + json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the planning process ended with status {self.process.wait()}")
        self.request = ""
        return json.loads(answer)
