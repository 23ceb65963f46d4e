"""The states of a job: what follows which, and the exit status of a run that follows from them.

    queued -> running -> done | stopped | cancelled | failed          over: a job in one of these is never resumed
    queued, running <-> paused

`stopped` is early, by the job's patience or its sweep; `cancelled` is on request. status.json records one state per job
(run_directory.py); code that changes one does so by `after`.
"""

from collections.abc import Iterable

FOLLOWERS = {
    "queued": ("running", "paused", "done", "stopped", "cancelled", "failed"),
    "running": ("paused", "done", "stopped", "cancelled", "failed"),
    "paused": ("queued", "running", "cancelled", "failed"),
    "done": (),
    "stopped": (),
    "cancelled": (),
    "failed": (),
}
OVER = tuple(state for state, followers in FOLLOWERS.items() if not followers)

ALL_DONE, SOME_FAILED, NOT_OVER = 0, 3, 75  # exit statuses of a run


def after(state: str, following: str) -> str:
    """Return the state that follows; a state may follow itself. Anything else that cannot follow is a bug of the caller's."""
    assert following == state or following in FOLLOWERS[state], f"a job cannot become {following} after {state}"
    return following


def exit_status(states: Iterable[str]) -> int:
    """Return the exit status of a run whose jobs end in these states: 75 when some are not over, else 3 when some failed, else 0."""
    found = set(states)
    if found - set(OVER):
        return NOT_OVER
    return SOME_FAILED if "failed" in found else ALL_DONE
