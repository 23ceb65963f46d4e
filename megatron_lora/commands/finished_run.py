"""A run's directory, read back: what ran when, what the plan held, what it was predicted to cost.

    run = FinishedRun.read(Path("runs/quickstart-1"))
    run.makespan_s, run.predicted().makespan_s, run.replayed().makespan_s

A run that was resumed is read from its last start. Slots that were planned and not executed,
because the run was stopped, are left out, and so are those of a long run that have left the timeline;
slots are counted from the first that is left. A pass of a slot takes the mean of its times on the
ranks of the stage. Times of ranks on several hosts compare as well as the hosts' clocks agree.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import unsealed
from megatron_lora.output.metrics import metrics_file, read_metrics
from megatron_lora.output.resume import recorded_config
from megatron_lora.output.run_files import read_spans, read_windows
from scheduling.cost import CostModel, pass_features
from scheduling.plan_json import stream_from_json
from scheduling.simulate import Event, Timeline, simulate
from scheduling.types import Op, Stream

WORK = {"F": Op.FORWARD, "E": Op.EVAL, "B": Op.BACKWARD, "STEP": Op.STEP}


@dataclass(frozen=True)
class FinishedRun:
    """What a run left: its resolved config, its executed slots, every rank's spans, and cost.json."""

    path: Path
    config: RunConfig
    slots: list[list[list[int]]]  # as plan/ has them: [slot][sample] -> job, step, sample, tokens
    evaluated: frozenset[int]  # slots that run forward alone: of evaluations and references
    names: Mapping[int, str]  # of the jobs, by the numbers that slots have
    spans: Mapping[int, list[dict]]  # rank -> events of the Chrome trace format, microseconds
    cost: dict
    is_complete: bool  # the timeline, which keeps a bounded number of spans, reaches back to the run's first microbatch

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """Read a directory; UserError where it is not that of a run that has ended."""
        try:
            config = recorded_config(path)
            spans = read_spans(path)
            begin, spans = _shared(spans)
            slots, evaluated, names, is_complete = _read_windows(path, begin)
            cost = unsealed((path / "cost.json").read_text(encoding="utf-8"))
            _check_cost(cost, {job.name for job in config.jobs}, config.parallel.pipeline)
            names = names or dict(enumerate(cost["jobs"]))
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            said = one_line(f"{type(error).__name__}: {error}", 200)
            raise UserError(f"{path}: is not the directory of a run that has ended ({said}); name a run's output_dir") from None
        executed = [event["index"] for events in spans.values() for event in events if event["cat"] in ("F", "E")]
        if not executed:
            raise UserError(f"{path}: nothing was trained in the run's last start; name a run that has")
        if (num_slots := 1 + max(executed)) > len(slots):
            raise UserError(f"{path}: plan/ has {len(slots)} slots, and {num_slots} were executed; restore its windows")
        return cls(path, config, slots[:num_slots], evaluated, names, spans, cost, is_complete)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.config.parallel.pipeline

    @property
    def stages(self) -> dict[int, int]:
        """Return rank -> its stage."""
        return {rank: events[0]["pid"] for rank, events in self.spans.items()}

    @cached_property
    def stream(self) -> Stream:
        """The executed slots, as the planner saw them: with several replicas, a sample stands for one of each, as long as the longest."""
        return stream_from_json(self.slots, self.evaluated)

    @cached_property
    def steps(self) -> list[dict]:
        """What metrics.jsonl says of the steps of this start, job after job."""
        trained = (entries for slot, entries in enumerate(self.slots) if slot not in self.evaluated)
        taken = {(self.names[job], step + 1) for entries in trained for job, step, *_ in entries}
        logged = ((name, line) for name in self.names.values() for line in read_metrics(metrics_file(self.path, name)))
        return [line | {"job": name} for name, line in logged if (name, line["step"]) in taken]

    @property
    def tokens(self) -> int:
        """Real tokens trained on."""
        return sum(step["tokens"] for step in self.steps)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The microseconds of the clock at which the first work of any rank begins and the last ends."""
        work = [event for events in self.spans.values() for event in events if event["cat"] in WORK]
        return min(event["ts"] for event in work), max(event["ts"] + event["dur"] for event in work)

    @property
    def makespan_s(self) -> float:
        """Seconds from the first work of any rank to the end of the last."""
        return (self.bounds[1] - self.bounds[0]) / 1e6

    def seconds(self, stage: int, kind: str) -> float:
        """Return the seconds that a stage spent on spans of a kind while any rank worked: the mean over its ranks."""
        begin, end = self.bounds

        def inside(event: dict) -> float:
            return max(0.0, min(event["ts"] + event["dur"], end) - max(event["ts"], begin)) / 1e6

        ranks = [rank for rank, of_rank in self.stages.items() if of_rank == stage]
        return statistics.fmean(sum(inside(e) for e in self.spans[rank] if e["cat"] == kind) for rank in ranks)

    def bubble(self, stage: int) -> float:
        """Return the share of the makespan in which a stage did no work."""
        return 1 - sum(self.seconds(stage, kind) for kind in WORK) / self.makespan_s

    def passes(self, kind: str) -> list[list[float]]:
        """Return the seconds of every slot's forward ("F", evaluation's too) or "B" on each stage, [stage][slot]; 0 where nothing ran."""
        found = [[0.0] * len(self.slots) for _ in range(self.num_stages)]
        stages = list(self.stages.values())
        for rank, events in self.spans.items():
            for event in events:
                if event["cat"] == kind or (kind == "F" and event["cat"] == "E"):
                    found[self.stages[rank]][event["index"]] += event["dur"] / 1e6 / stages.count(self.stages[rank])
        return found

    def exposed_hops(self) -> dict[str, float]:
        """Return, per hop ("0>1": forward, "1>0": backward), the share of the makespan that its receiver waits for messages under way.

        A message is under way from the end of the neighbour's pass on. The mean over pipelines.
        """
        width = self.config.parallel.tensor * self.config.parallel.data
        ends = {
            (rank, "B" if event["cat"] == "B" else "F", event["index"]): event["ts"] + event["dur"]
            for rank, events in self.spans.items()
            for event in events
            if event["cat"] in ("F", "E", "B")
        }
        shares: dict[str, list[float]] = defaultdict(list)
        for receiver, events in self.spans.items():
            for kind, sender in (("F", receiver - width), ("B", receiver + width)):
                if sender not in self.spans:
                    continue
                waited = 0.0
                for event in events:
                    if event["cat"] == f"wait {kind}" and (sent := ends.get((sender, kind, event["index"]))) is not None:
                        waited += max(0.0, event["ts"] + event["dur"] - max(event["ts"], sent)) / 1e6
                shares[f"{self.stages[sender]}>{self.stages[receiver]}"].append(waited / self.makespan_s)
        return {hop: statistics.fmean(each) for hop, each in sorted(shares.items())}

    def predicted(self) -> Timeline:
        """Return the run as it was predicted when it began."""
        multiple = self.config.parallel.row_multiple
        ranks = {job.name: job.lora_rank for job in self.config.jobs}
        samples = ([(tokens, ranks[self.names[job]]) for job, _, _, tokens in slot] for slot in self.slots)
        times = CostModel.from_json(self.cost["stages"]).pass_times([[pass_features(slot, multiple)] for slot in samples])
        return simulate(self.stream, *times, self.cost["hop_s"], self.cost["step_s"], self.config.parallel.norm_delay)

    def replayed(self) -> Timeline:
        """Return the plan with the time that each pass took; what the real run takes beyond it is messages, launches and late plans."""
        taken = [event["dur"] / 1e6 for events in self.spans.values() for event in events if event["cat"] == "STEP"]
        step_s, delay = statistics.fmean(taken) if taken else 0.0, self.config.parallel.norm_delay
        return simulate(self.stream, self.passes("F"), self.passes("B"), 0.0, step_s, delay)

    def real(self) -> Timeline:
        """Return what ran on the first rank of each stage."""
        first = {stage: min(rank for rank, of_rank in self.stages.items() if of_rank == stage) for stage in range(self.num_stages)}
        begin, _ = self.bounds
        events = [
            Event(stage, WORK[e["cat"]], e["index"], (e["ts"] - begin) / 1e6, (e["ts"] + e["dur"] - begin) / 1e6)
            for stage, rank in first.items()
            for e in self.spans[rank]
            if e["cat"] in WORK
        ]
        return Timeline(self.num_stages, self.makespan_s, tuple(events))


def _shared(spans: dict[int, list[dict]]) -> tuple[int, dict[int, list[dict]]]:
    """Return the first slot that the spans of all ranks have, and the spans from there on, with its slots counted from it."""
    firsts = {rank: min((e["index"] for e in events if e["cat"] in ("F", "E")), default=0) for rank, events in spans.items()}
    begin = max(firsts.values(), default=0)
    kept: dict[int, list[dict]] = {}
    for rank, events in spans.items():
        since = min((e["ts"] for e in events if e["cat"] in ("F", "E") and e["index"] == begin), default=0.0)
        later = (e for e in events if e["ts"] >= since or begin == firsts[rank])
        counted = (e if e["cat"] in ("STEP", "MOVE") else e | {"index": e["index"] - begin} for e in later)
        kept[rank] = [e for e in counted if e["index"] >= 0]
    return begin, kept


def _read_windows(path: Path, begin: int) -> tuple[list[list[list[int]]], frozenset[int], dict[int, str], bool]:
    """Return the slots from `begin` on, with the no-ops that drain the pipeline; which are evaluation slots; the jobs' names.

    Last whether those are all that hold tokens.
    """
    slots: list[list[list[int]]] = []
    evaluated: set[int] = set()
    names: dict[int, str] = {}
    first = None
    for _, text in read_windows(path, begin):
        window = unsealed(text)
        first = window.get("slot", 0) if first is None else first
        evaluated |= {len(slots) + slot for slot in window.get("evaluate", ())}
        slots += window["microbatches"] + [[]] * window.get("drain", 0)
        names |= {int(number): name for number, name in window.get("jobs", {}).items()}
    skipped = begin - (first or 0)
    is_complete = not first and not any(slots[:skipped])
    return slots[skipped:], frozenset(slot - skipped for slot in evaluated if slot >= skipped), names, is_complete


def _check_cost(cost: dict, names: set[str], num_stages: int) -> None:
    """Raise ValueError, TypeError or KeyError unless cost.json has what a report reads."""
    if unknown := [name for name in cost["jobs"] if name not in names]:
        raise ValueError(f"cost.json names the job {unknown[0]!r}, which config.yaml does not have")
    stages = len(CostModel.from_json(cost["stages"]).stages)
    if stages != num_stages:
        raise ValueError(f"cost.json has {stages} stages, and config.yaml {num_stages}")
    if not (isinstance(cost["basis"], str) and all(isinstance(cost[name], (int, float)) for name in ("hop_s", "step_s"))):
        raise TypeError("cost.json: basis is a text, hop_s and step_s are seconds")
