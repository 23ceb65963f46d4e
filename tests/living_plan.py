"""A run without a model: the real control and plan feed, and a rank that only counts the steps that its windows have it take.

world = World(tmp_path, jobs, lengths, num_stages=2, room=2)
world.run(between=lambda window: ...)          # between windows: leave requests, say
world.trained["a"]                             # the samples of each step, in the steps that the job's result rests on
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import JobConfig, RunConfig, load_jobs
from megatron_lora.output.changes import Run
from megatron_lora.output.events import Replay
from megatron_lora.output.standing import CheckpointState, checkpoint_name
from megatron_lora.planning.adapter_memory import adapters_of, rows_of
from megatron_lora.planning.adapter_rows import Book
from megatron_lora.planning.plan_feed import PlanFeed, PlannedJob, PlanSettings
from megatron_lora.training.control import Control
from megatron_lora.training.window_changes import Leaving, WindowChanges
from scheduling.data_parallel import DealtJob
from scheduling.follow import Window
from scheduling.job_lengths import read_lengths
from scheduling.slot_cost import SlotCost

Lengths = Mapping[str, Sequence[Sequence[int]]]


def job_config(name: str, **keys) -> JobConfig:
    """Return a job whose data nobody reads."""
    return load_jobs(
        None, [{"name": name, "datasets": [{"path": "nowhere.jsonl", "type": "text"}], "target_modules": list(TARGET_MODULES), **keys}], 0
    )[0]


class Reader:
    """Reads a job by the second time it is asked for answers; `bad` ones cannot be."""

    def __init__(self, bad: Mapping[str, str]):
        self.bad = bad
        self.asked: set[str] = set()
        self.late: list[str] = []

    def ask(self, job: JobConfig) -> None:
        self.asked.add(job.name)

    def answers(self) -> dict[str, str | None]:
        found = {name: self.bad.get(name) for name in self.late}
        self.late = sorted(self.asked)
        self.asked.clear()
        return found

    def close(self) -> None:
        pass


@dataclasses.dataclass
class Resident:
    name: str
    taken: int
    first: int
    num_steps: int
    leaving: Leaving | None = None


class World:
    """One rank, which is the first: it takes steps at once when their STEP comes."""

    def __init__(
        self,
        path: Path,
        jobs: Sequence[JobConfig],
        lengths: Lengths,
        *,
        num_stages: int = 1,
        delay: int = 0,
        room: Sequence[JobConfig] | None = None,
        validation: Mapping[str, Sequence[int]] | None = None,
        bad: Mapping[str, str] | None = None,
        replay: Path | None = None,
        capacity: int = 32,
        value_of: Callable[[str, int], float] = lambda name, step: 1.0,
        **control,
    ):
        self.path, self.lengths, self.validation, self.value_of = path, lengths, validation or {}, value_of
        (path / "plan").mkdir(parents=True)
        self.states = {job.name: "queued" for job in jobs}
        self.control = Control(
            path,
            Run(config=_run_config(path, jobs), states=dict(self.states)),
            Book(rows_of(adapters_of(jobs if room is None else room))),
            Reader(bad or {}),  # type: ignore[arg-type]
            read=[],
            begun=[],
            gap=num_stages + delay,
            replay=None if replay is None else Replay(replay),
            **control,
        )
        self.settings = PlanSettings(
            num_stages=num_stages, num_replicas=1, capacity=capacity, delay=delay, cost=SlotCost(), num_slots=8, max_endings=4
        )
        self.gap = num_stages + delay
        self.residents: dict[int, Resident] = {}
        self.trained: defaultdict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.evaluated: list[tuple[str, int]] = []
        self.windows: list[Window] = []
        self.num_begun = 0  # windows
        self.most_resident = 0
        self.recent: list[tuple] = []  # endings by index
        self.moved: list[tuple[str, int]] = []

    # planning.plan_feed.Crew

    def read(self, changes: WindowChanges, known=None) -> list[PlannedJob]:
        planned = []
        configs = {job.name: job for job in self.control.run.config.jobs}
        coming = [(each.number, each.config, each.point.step, each.rungs) for each in changes.joined]
        coming += [(each.number, configs[self.residents[each.number].name], each.step, each.rungs) for each in changes.continued]
        for number, config, first, passed in coming:
            name = config.name
            steps = read_lengths(0, self.lengths[name])
            held = self.validation.get(name, ())
            dealt = DealtJob.of(steps, 1, SlotCost(), held)
            rungs = config.point.sweep.rung_steps(len(steps)) if config.point else ()
            due = [step for step in range(first + 1, len(steps) + 1) if step % 2 == 0 or step == len(steps) or step in rungs]
            after = due if held else []
            until = rungs[passed] if passed < len(rungs) else None
            planned.append(PlannedJob(number=number, dealt=dealt, first_step=first, evaluate_after=after, until=until))
        return planned

    def prepare(self, changes: WindowChanges) -> None:
        pass

    # output files

    def add_jobs(self, jobs: Sequence[JobConfig]) -> None:
        self.states |= {job.name: "queued" for job in jobs}

    def set_state(self, name: str, state: str, reason: str) -> None:
        self.states[name] = state

    def run(self, between: Callable[[int], None] = lambda window: None) -> None:
        """Take all windows."""
        feed = PlanFeed(self.settings, 0, self.path / "plan", dist.group.WORLD, self.control, self)  # type: ignore[arg-type]
        for number, window in enumerate(feed):
            self._begin(window.changes)
            self._execute(window)
            self.windows.append(window)
            between(number)
        self.control.write_later(self)
        self.control.finish()
        assert not self.residents or all(each.taken == each.num_steps or each.leaving for each in self.residents.values())

    def _begin(self, changes: WindowChanges) -> None:
        self.num_begun += 1
        self.control.write_later(self, self.num_begun)
        for number in changes.freed:
            del self.residents[number]
        for joining in changes.joined:
            name, first = joining.config.name, joining.point.step
            assert joining.number not in self.residents
            for step in [step for step in self.trained[name] if step >= first]:
                del self.trained[name][step]  # taken again
            self.residents[joining.number] = Resident(name, first, first, len(self.lengths[name]))
        for number, leaving in changes.left.items():
            self.residents[number].leaving = leaving
            if self.residents[number].taken == leaving.step:
                self._leave(self.residents[number])
        self.most_resident = max(self.most_resident, len(self.residents))

    def _execute(self, window: Window) -> None:
        for microbatch, ended in zip(window.stream, window.ended, strict=True):
            if microbatch.evaluate:
                for segment in microbatch.segments:
                    assert self.residents[segment.job].taken == segment.step
                continue
            if len(self.recent) >= self.gap:
                for ending in self.recent[-self.gap]:
                    self._step(ending, window)
            for segment in microbatch.segments:
                resident = self.residents[segment.job]
                assert segment.step == resident.taken, "a segment meets another version"
                self.trained[resident.name][segment.step] += segment.samples
            self.recent.append(ended)

    def _step(self, ending, window: Window) -> None:
        resident = self.residents[ending.job]
        if ending.evaluation:
            self.evaluated.append((resident.name, ending.step))
            config = next(job for job in self.control.run.config.jobs if job.name == resident.name)
            self.control.sweeps.tell(config, ending.step, self.value_of(resident.name, ending.step), resident.num_steps)
            if config.point and ending.step in config.point.sweep.rung_steps(resident.num_steps):
                self.control.tell("exported", resident.name)
            return
        assert resident.taken == ending.step
        resident.taken += 1
        if (ending.job, ending.step) in window.moves:
            self.moved.append((resident.name, ending.step))
        if resident.taken == resident.num_steps:
            self._set(resident.name, "done")
        elif resident.leaving is not None and resident.leaving.step == resident.taken:
            self._leave(resident)

    def _leave(self, resident: Resident) -> None:
        assert resident.leaving is not None
        if not resident.leaving.saves:
            return
        if resident.taken > resident.first:
            state = CheckpointState(step=resident.taken, num_steps=resident.num_steps, num_updates=0, skipped_in_a_row=0, samples="")
            folder = self.path / "jobs" / resident.name / checkpoint_name(resident.taken)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
        self._set(resident.name, resident.leaving.state)

    def _set(self, name: str, state: str) -> None:
        if self.states[name] not in ("cancelled", "failed", "stopped"):
            self.states[name] = state
            self.control.tell("done" if state == "done" else "saved", name)

    def check(self, name: str) -> None:
        """Assert that every sample of every step of a job was trained once."""
        steps = self.trained[name]
        assert sorted(steps) == list(range(len(self.lengths[name]))), (name, sorted(steps))
        for step, samples in steps.items():
            assert sorted(samples) == list(range(len(self.lengths[name][step]))), (name, step, samples)


def _run_config(path: Path, jobs: Sequence[JobConfig]) -> RunConfig:
    return RunConfig(base_model="nowhere", output_dir=str(path), jobs=tuple(jobs))
