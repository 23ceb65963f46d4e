"""What a run's directory says of one job: its state, and the numbers of its steps and evaluations, read as they are written.

    job = JobView("summarise", metrics_file(run, "summarise"))
    job.read()                    # only what was added since the last call; a line that is being written waits for the next
    job.losses[-1], job.evaluations[-1]["eval_loss"], job.best()

A metrics file that has become another one, because the run was resumed, is read from its start.
"""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

from megatron_lora.config.rules import METRICS


class JobView:
    """One job: `state`, `reason` and `recorded` are from status.json, `settings` from config.yaml, the rest from metrics.jsonl."""

    def __init__(self, name: str, metrics: Path):
        """Know nothing yet but where its metrics are."""
        self.name = name
        self.metrics = metrics
        self.state, self.reason = "queued", ""
        self.recorded: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self.steps, self.losses = array("q"), array("d")  # of each step: its number, from 1, and its loss, nan where it was not finite
        self.evaluations: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}  # the last step's line
        self.tokens = self.num_skipped = self.num_unreadable = 0
        self._steps_per_epoch: int | None = None
        self._file, self._offset = 0, 0

    def read(self) -> None:
        """Read the lines that were added to the metrics since the last call."""
        try:
            with open(self.metrics, "rb") as file:
                status = file.seek(0, 2), self.metrics.stat().st_ino
                if status[1] != self._file or status[0] < self._offset:
                    self._forget()
                    self._file = status[1]
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return
        complete, _, _ = added.rpartition(b"\n")
        if not complete:
            return
        self._offset += len(complete) + 1
        for line in complete.split(b"\n"):
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                self.num_unreadable += 1

    def _add(self, line: dict[str, Any]) -> None:
        """Take one line: an evaluation has `eval_loss`, a step has `loss`."""
        if "eval_loss" in line:
            values = {key: value for key, value in line.items() if isinstance(value, int | float)}
            self.evaluations.append(values | {"step": int(line["step"])})
            return
        step, loss, tokens = int(line["step"]), line["loss"], int(line.get("tokens") or 0)
        loss = math.nan if loss is None else float(loss)
        if step == 1 and line.get("epoch"):
            self._steps_per_epoch = math.ceil(1 / line["epoch"] - 1e-9)
        self.steps.append(step)
        self.losses.append(loss)
        self.tokens += tokens
        self.num_skipped += bool(line.get("skipped"))
        self.last = line

    @property
    def step(self) -> int:
        """Steps taken, as far as they are known."""
        recorded = self.recorded.get("step")
        return max(self.steps[-1] if self.steps else 0, recorded if isinstance(recorded, int) else 0)

    @property
    def num_steps(self) -> int | None:
        """Steps of the complete job; None where neither its config nor its first step says."""
        if self.state == "done":
            return self.step
        if self.settings.get("max_steps"):
            return self.settings["max_steps"]
        return self._steps_per_epoch and self._steps_per_epoch * (self.settings.get("num_epochs") or 1)

    @property
    def loss(self) -> float | None:
        """The last finite loss of a step."""
        return next((loss for loss in reversed(self.losses) if math.isfinite(loss)), None)

    @property
    def metric(self) -> str:
        """Which number of an evaluation decides."""
        return self.settings.get("metric") or "eval_loss"

    def evaluated(self, metric: str = "eval_loss") -> list[tuple[int, float]]:
        """Return (step, value) of every evaluation that has a finite value."""
        return [(line["step"], line[metric]) for line in self.evaluations if math.isfinite(line.get(metric, math.nan))]

    def best(self) -> tuple[int, float] | None:
        """Return (step, value) of the best evaluation by the job's metric: the recorded one, else the first of the best found."""
        found = self.evaluated(self.metric)
        recorded = self.recorded.get("best")
        step = recorded.get("step") if isinstance(recorded, dict) else recorded
        if recorded_best := [each for each in found if each[0] == step]:
            return recorded_best[-1]
        choose = max if self.best_is_largest else min
        return choose(found, key=lambda each: each[1]) if found else None

    @property
    def best_is_largest(self) -> bool:
        """Whether larger numbers of the metric are better."""
        return (self.settings.get("mode") or METRICS.get(self.metric, "min")) == "max"
