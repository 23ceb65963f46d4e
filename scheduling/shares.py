"""Priorities as shares of device time: whose step is next where several jobs could have used a slot.

Each job has a virtual time, and so has the stream:

    a job's      += its time in a slot / its priority
    the stream's += the slot's time / sum of the priorities; at least that of every job that waits

A job *waits* at a slot that it could have used, by the gap, and did not. It is *due* if it was not
ahead of the stream when its step began. Due jobs come first, of these begun steps, then the step that
would end at the least virtual time (worst-case fair weighted fair queueing). So every job stays within
about a step of its share, jobs that the gap holds back claim nothing for the slots that they could not
use, and no slot waits.

A planner holds one number per resident job: how far it is `ahead` of the stream. A job joins at 0.
What was really planned counts, evaluation and the search's changes included, so what one window takes
from a share the next ones give back. Jobs of equal priorities that began together have no shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from scheduling.backlog import OpenJob, have_shares

_LEAD = 2.0  # of its longest steps that a job may be ahead, at most
_LAG = 1.0  # and behind


class Turns:
    """Virtual times while slots are planned; jobs by any key."""

    def __init__(self, priorities: Mapping[int, float], ahead: Mapping[int, float], taken: Mapping[int, float]):
        """Begin where each job is `ahead` of the stream by a virtual time, `taken` the time of what it has of its step."""
        self.priorities = priorities
        self.ahead = dict(ahead)
        self.start = {job: each - taken[job] / priorities[job] for job, each in ahead.items()}  # of the step
        self.clock = 0.0
        self.total = math.fsum(priorities.values())

    def due(self, job: int) -> bool:
        """Whether the job was not ahead of the stream when its step began."""
        return self.start[job] <= self.clock

    def finish(self, job: int, step_time: float) -> float:
        """Return when its step would end."""
        return self.start[job] + step_time / self.priorities[job]

    def count(self, used: Mapping[int, float], ended: Iterable[int], waiting: Iterable[int]) -> None:
        """Count the time that jobs have `used`; of some a step has `ended`, others were waiting."""
        for job, time in used.items():
            self.ahead[job] += time / self.priorities[job]
        for job in ended:
            self.start[job] = self.ahead[job]
        self.clock += math.fsum(used.values()) / self.total
        self.clock = max(self.clock, min((self.start[job] for job in waiting), default=self.clock))


def ahead_after(jobs: Mapping[int, OpenJob], used: Mapping[int, float], first_slot: int) -> dict[int, float]:
    """Return how far each job is ahead of the stream after a window before `first_slot` in which jobs have `used` time."""
    if not have_shares(jobs.values()):
        return dict.fromkeys(jobs, 0.0)
    turns = Turns(
        {number: job.priority for number, job in jobs.items()},
        {number: job.ahead for number, job in jobs.items()},
        dict.fromkeys(jobs, 0.0),
    )
    ready = [number for number, job in jobs.items() if job.progress.ready <= first_slot]
    turns.count({number: time for number, time in used.items() if number in jobs}, jobs, ready)
    steps = {number: float(np.diff(job.times).max()) / job.priority for number, job in jobs.items()}
    return {number: min(max(ahead - turns.clock, -_LAG * steps[number]), _LEAD * steps[number]) for number, ahead in turns.ahead.items()}
