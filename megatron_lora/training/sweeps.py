"""The sweeps of a run as the first rank knows them: who is at which rung, with what result, and what was decided.

A point rests at its rung while no job waits for its rows; else it leaves as if it were parked: with a checkpoint, and in the queue.
It continues, or joins again, once it is `promoted`; otherwise it is `stopped` there. Decisions (rungs.py) are made in front of a window
from the points that have arrived: whose evaluation is reported, and whose checkpoint is written if it has left. None is stopped before its
adapter is written. Decisions are events, written before they act. A run that is resumed reads them, so none is made twice.

    sweeps = Sweeps(output_dir, log.events, run.config.jobs)
    sweeps.tell(job, step, value, num_steps)             # any thread: an evaluation
    sweeps.hear(slot); changes = sweeps.decide(entries)  # the feed's thread
    sweeps.note(log.append(changes, ...))
"""

from __future__ import annotations

import math
import queue
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lora.config.schema import JobConfig
from megatron_lora.config.sweep_keys import SweepConfig, by_sweep, point_of
from megatron_lora.output.changes import job_mapping
from megatron_lora.output.events import Change
from megatron_lora.output.leaderboard import kept, leaderboard, write_leaderboard
from megatron_lora.output.metrics import metrics_file, read_evaluations
from megatron_lora.output.standing import resume_point_of
from megatron_lora.training.optuna_points import ask, num_to_ask
from megatron_lora.training.run_job import Entry
from megatron_lora.training.rungs import Result, decide


class Sweeps:
    """The points of a run, by name."""

    def __init__(self, output_dir: Path, events: Sequence[Change], jobs: Sequence[JobConfig]):
        """Know the points among `jobs` where earlier starts, whose `events` are known, have left them."""
        self.output_dir = output_dir
        self.points: dict[str, JobConfig] = {}
        self.rungs: dict[str, int] = {}  # passed
        self.decided: dict[str, dict[int, float]] = {}  # of a point: rung -> its value there
        self.arrived: dict[str, Result] = {}  # at a rung that is not decided
        self.evaluated: dict[str, dict[int, float]] = {}  # step -> value
        self._news: queue.SimpleQueue[tuple[JobConfig, int, float, int]] = queue.SimpleQueue()
        self._shown: object = None
        self.add(jobs)
        self.note(events)
        for job in self.points.values():
            self._read_earlier(job)

    def add(self, jobs: Sequence[JobConfig]) -> None:
        """Know the points among jobs that the run has."""
        self.points |= {job.name: job for job in jobs if job.point is not None}

    def _read_earlier(self, job: JobConfig) -> None:
        """Read what metrics and checkpoint of an earlier start say of a point."""
        file = metrics_file(self.output_dir, job.name)
        if not file.exists():
            return
        self.evaluated[job.name] = {line["step"]: _number(line[job.metric]) for line in read_evaluations(file)}
        point = resume_point_of(file.parent)
        if point.state is not None and not point.evaluation_due and point.step in self.evaluated[job.name]:
            self._arrive(job, point.step, self.evaluated[job.name][point.step], point.state.num_steps, 0)

    def tell(self, job: JobConfig, step: int, value: float, num_steps: int) -> None:
        """Take note, in any thread, of an evaluation of a job of `num_steps` steps."""
        if job.point is not None:
            self._news.put((job, step, value, num_steps))

    def is_at_rung(self, name: str) -> bool:
        """Whether a point has a result at a rung that is not decided."""
        return name in self.arrived

    def is_stopped(self, name: str) -> bool:
        """Whether a job is a point that its sweep has stopped: at a rung that it has not passed."""
        return self.rungs.get(name, 0) in self.decided.get(name, {})

    def hear(self, slot: int) -> None:
        """Take what was told, in front of a slot."""
        for job, step, value, num_steps in [self._news.get() for _ in range(self._news.qsize())]:
            self.evaluated.setdefault(job.name, {})[step] = value
            self._arrive(job, step, value, num_steps, slot)

    def decide(self, entries: Mapping[str, Entry]) -> list[Change]:
        """Return what is decided now, and the points that Optuna adds; `entries` are the jobs that are not over."""
        changes = []
        for points in by_sweep(list(self.points.values())).values():
            sweep = points[0].point.sweep
            changes += self._judge(sweep, points, entries) if sweep.rungs else []
            changes += self._ask(sweep, points, entries) if sweep.strategy == "optuna" else []
        return changes

    def _arrive(self, job: JobConfig, step: int, value: float, num_steps: int, slot: int) -> None:
        assert job.point is not None
        rung, steps = self.rungs.get(job.name, 0), job.point.sweep.rung_steps(num_steps)
        if rung < len(steps) and step == steps[rung]:
            self.arrived[job.name] = Result(rung, slot, job.point.number, value)

    def _judge(self, sweep: SweepConfig, points: Sequence[JobConfig], entries: Mapping[str, Entry]) -> list[Change]:
        """Return who continues and who is stopped, among the points that have arrived."""
        alive = {job.name: entries[job.name] for job in points if job.name in entries}
        there = [name for name, entry in alive.items() if (entry.held and entry.saved) or (entry.rests and entry.drained)]
        held = {name: self.arrived[name] for name in there if name in self.arrived}
        results = [*held.values()]
        results += [Result(rung, 0, job.point.number, value) for job in points if job.point for rung, value in self.decided_of(job).items()]
        decided = {(rung, job.point.number) for job in points if job.point for rung in self.decided_of(job)}
        on_the_way = [name for name, entry in alive.items() if name not in held and (entry.leaving or entry.state) in ("queued", "running")]
        # A point that is held at a rung may come to the later ones.
        coming = {rung for name in on_the_way for rung in range(self.rungs.get(name, 0), len(sweep.rungs))}
        coming |= {rung for result in held.values() for rung in range(result.rung + 1, len(sweep.rungs))}
        changes = []
        names = {job.point.number: job for job in points if job.point}
        for decision in decide(sweep, points[0].mode, results, decided, coming):
            result, job = decision.result, names[decision.result.point]
            entry = alive[job.name]
            if entry.rests and not (decision.continues or entry.exported):
                continue
            step = entry.left_after
            value = result.value if math.isfinite(result.value) else None
            details = {"rung": result.rung, "step": step, "value": value, "place": decision.place, "of": decision.num}
            if not decision.continues:
                why = f"{decision.place} of {decision.num} by {job.metric} at its rung after {step} steps"
                details = {"reason": why, **details}
            changes.append(Change(event="promoted" if decision.continues else "stopped", job=job.name, details=details))
        return changes

    def decided_of(self, job: JobConfig) -> dict[int, float]:
        """Return rung -> value of a point's results that are decided."""
        return self.decided.get(job.name, {})

    def _ask(self, sweep: SweepConfig, points: Sequence[JobConfig], entries: Mapping[str, Entry]) -> list[Change]:
        """Return the points that take the places of those that are over."""
        values = {job.name: kept(job, sorted(self.evaluated.get(job.name, {}).items())) for job in points if job.name not in entries}
        told = {job.point.number: (job.point.values, job.name not in entries, values.get(job.name)) for job in points if job.point}
        changes, like = [], job_mapping(points[0])
        for number in range(len(points), len(points) + num_to_ask(sweep, told)):
            chosen = ask(sweep, points[0].mode, told, number)
            told[number] = (chosen, False, None)
            mapping = point_of(sweep, like, number, chosen)
            changes.append(Change(event="added", job=mapping["name"], details={"config": mapping}))
        return changes

    def note(self, events: Sequence[Change]) -> list[str]:
        """Take note of decisions among events; return who continues."""
        promoted = []
        for event in events:
            if event.event in ("promoted", "stopped") and "rung" in event.details:
                rung = event.details["rung"]
                self.decided.setdefault(event.job, {})[rung] = _number(event.details["value"])
                self.arrived.pop(event.job, None)
                if event.event == "promoted":
                    self.rungs[event.job] = rung + 1
                    promoted.append(event.job)
        return promoted

    def write(self, states: Mapping[str, str]) -> None:
        """Write the leaderboard where it has changed; `states` are those of all jobs."""
        if self.points:
            evaluated = {name: sorted(values.items()) for name, values in self.evaluated.items()}
            boards = leaderboard(list(self.points.values()), states, evaluated, self.rungs)
            if boards != self._shown:
                self._shown = boards
                write_leaderboard(self.output_dir, boards)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
