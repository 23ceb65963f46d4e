"""The states of a job, which may follow which (FOLLOWERS), and the run's exit status, which follows from them.

    queued -> running -> done | stopped | cancelled | failed      the last four are OVER: never resumed
    queued, running <-> paused; running -> queued

A `stopped` job was ended early, by its patience or its sweep, also by an evaluation that it was still
owed when it was paused; a `cancelled` one on request. A running job is queued again when it makes
room for one that has waited too long. status.json records one state per job (run_directory.py). Code
that changes a state takes the new one from `after`.
"""

from collections.abc import Iterable

FOLLOWERS = {
    "queued": ("running", "paused", "done", "stopped", "cancelled", "failed"),
    "running": ("queued", "paused", "done", "stopped", "cancelled", "failed"),
    "paused": ("queued", "running", "done", "stopped", "cancelled", "failed"),
    "done": (),
    "stopped": (),
    "cancelled": (),
    "failed": (),
}
OVER = tuple(state for state, followers in FOLLOWERS.items() if not followers)

ALL_DONE, SOME_FAILED, NOT_OVER = 0, 3, 75  # exit statuses of a run


def after(state: str, following: str) -> str:
    """Return `following`, which must be allowed to follow `state`; a state may follow itself."""
    assert following == state or following in FOLLOWERS[state], f"a job cannot become {following} after {state}"
    return following


def exit_status(states: Iterable[str]) -> int:
    """Return the exit status of a run whose jobs end in these states: 75 when some are not over, else 3 when some failed, else 0."""
    found = set(states)
    if found - set(OVER):
        return NOT_OVER
    return SOME_FAILED if "failed" in found else ALL_DONE
