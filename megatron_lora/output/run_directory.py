"""The output directory of a run: who may write it, and the files that describe the run as a whole.

    .lock         locked by every live process of the run (by flock, so a process loses it however it ends)
    config.yaml   the resolved config          env.json   versions, commit, machine
    status.json   state of every job and, once the run has ended, its exit status; always a complete file
    plan/         the windows that were planned                jobs/<name>/   what a job writes
    requests/     requests of users that wait (requests.py)    events.jsonl   those that took effect, and other events (events.py)

Invariant: a directory belongs to one run. `check` writes nothing. It refuses a directory that
another process uses, that holds files of other origin, or whose run is finished or began with
another config (resume.py). A run that has begun (it has trained, or has requests) and ended early is
resumed, as its events left it; requests that wait are taken then. The files of one that has not begun
are removed. The owner prepares the directory under an exclusive lock, which
it then turns into a shared one. The run's workers `join` with a shared lock; any other process is
refused.

    RunDirectory.check(config)                     # before anything is written
    with RunDirectory.create(config) as run: ...   # the owner: the parent process, or rank 0 under a bare torchrun
    with RunDirectory.join(config) as run:         # a worker
        run.set_job("summarise", "running"); run.set_job("summarise", "failed", "loss is not finite")
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lora.config.schema import JobConfig, RunConfig, dump_config, load_config
from megatron_lora.config.yaml_file import dump_yaml
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import YAML_SEAL, remove, remove_leftovers, sealed, sealed_yaml, unsealed, write_atomically
from megatron_lora.output.changes import Run, apply, foresee, job_mapping, states_to_start_from
from megatron_lora.output.events import EVENTS_FILE, EventLog, read_events
from megatron_lora.output.final_files import STATUS, digests_of_metrics, digests_of_run
from megatron_lora.output.job_states import OVER, after, exit_status
from megatron_lora.output.leaderboard import BEST, LEADERBOARD
from megatron_lora.output.lock_file import LOCK, check_held, in_use, is_in_use, lock_directory, share, sign
from megatron_lora.output.requests import FOLDER, RequestFolder
from megatron_lora.output.resume import as_begun, check_resume, rewind, with_targets_of
from megatron_lora.output.standing import Best, Choose, ResumePoint, newest, resume_point_of, resume_points
from megatron_lora.output.take_requests import take_requests

OF_ONE_RUN = (
    *("calibration.json", "cost.json", "plan", "jobs", "timeline.json", "report.html"),
    *(EVENTS_FILE, "queue.json", "accounting.json", LEADERBOARD, BEST),
)
LEFTOVERS = (  # of processes that ended while they wrote
    *("plan/.window*", "plan/start-*/.*", "requests/.*", "requests/refused/.*"),
    *("jobs/*/.metrics.jsonl.*", "jobs/*/.checkpoint-*", "jobs/*/.best-*", "jobs/*/.adapter-*"),
    *(f".{name}.*" for name in (STATUS, "config.yaml", "env.json", *OF_ONE_RUN)),
)
RUN_FILES = {LOCK, STATUS, "config.yaml", "env.json", FOLDER, *OF_ONE_RUN}


class RunDirectory:
    """An output directory whose lock this process holds."""

    def __init__(self, path: Path, lock: int, created: bool):
        """Take a directory and the descriptor of its lock file, which is locked; use `create` or `join` instead."""
        self.path = path
        self.lock = lock
        self._created = created

    @staticmethod
    def check(config: RunConfig, choose: Choose = newest, keep_alive: bool = False) -> dict[str, ResumePoint]:
        """Return the resume points of the remaining jobs, as they are chosen; UserError when this run cannot use its directory.

        Writes nothing. With `keep_alive`, or where requests since the last start end what was left, no job need remain.
        """
        path = Path(config.output_dir)
        try:
            _check_available(path)
            if not has_begun(path):
                return resume_points(config, {})
            run = as_left(path, config, states_to_start_from(job_states(path)))
            return check_resume(path, run.states, run.config, choose, keep_alive or not _ended(path))
        except OSError as error:
            raise _unusable(path, error) from None

    @classmethod
    def create(
        cls,
        config: RunConfig,
        environment: dict | None = None,
        failed: Mapping[str, str] | None = None,
        choose: Choose = newest,
        rests_on: Mapping[str, str] | None = None,
        keep_alive: bool = False,
    ) -> "RunDirectory":
        """Lock and prepare the directory of a run, its remaining jobs queued; UserError when `check` refuses it.

        `failed`: names of remaining jobs that cannot start, with the reasons. Checkpoints newer than the one that is chosen are set
        aside. `rests_on`: digests of the base model's files, recorded where the run has none yet.
        """
        path = Path(config.output_dir)
        cls.check(config, choose, keep_alive)
        try:
            created = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, lock_directory(path, fcntl.LOCK_EX), created)
            try:
                run._initialise(config, environment or {}, failed or {}, choose, rests_on or {}, keep_alive)
                share(path, run.lock)
            except BaseException as error:
                if isinstance(error, OSError):
                    run.discard()
                run.close()
                raise
        except OSError as error:
            raise _unusable(path, error) from None
        return run

    def _initialise(
        self, config: RunConfig, environment: dict, failed: Mapping[str, str], choose: Choose, rests_on: Mapping[str, str], keep_alive: bool
    ) -> None:
        """Write the owner into the lock file, rewind the run or remove what never took a step, and write the run's files."""
        remove_leftovers(self.path, *LEFTOVERS)
        sign(self.lock)
        run, over, remaining = Run(config=config, states={job.name: "queued" for job in config.jobs}), {}, {}
        if has_begun(self.path):
            rests_on = base_files_of(self.path) or rests_on
            may_have_none = keep_alive or not _ended(self.path)
            run = self._take_requests(config)
            # Checked again, because another run may have ended between `check` and the lock.
            remaining = check_resume(self.path, run.states, run.config, choose, may_have_none)
            rewind(self.path, remaining)
            config = as_begun(load_config(self.path / "config.yaml"), run.config)
            over = {name: job for name, job in self.status()["jobs"].items() if job["state"] in OVER}
        else:
            for entry in OF_ONE_RUN:
                remove(self.path / entry)
        jobs = {job.name: _job(run.states.get(job.name, "queued"), run.reasons.get(job.name, "")) for job in config.jobs}
        for name, point in remaining.items():
            jobs[name] = _job(run.states.get(name, "queued"), run.reasons.get(name, ""), point.step, point.best)
        for name in run.states.keys() & jobs.keys() - over.keys():
            if run.states[name] == "stopped":  # by its sweep, and killed before that was recorded
                job_dir = self.path / "jobs" / name
                point, reason = resume_point_of(job_dir), run.reasons.get(name, "")
                jobs[name] = _job("stopped", reason, point.step, point.best, digests_of_metrics(job_dir))
        jobs |= {name: _job(after("queued", "failed"), reason) for name, reason in failed.items()} | over
        self._write_status({"exit_status": None, "reason": "", "rests_on": dict(rests_on), "jobs": jobs})
        write_atomically(self.path / "config.yaml", sealed_yaml(dump_config(config)))
        write_atomically(self.path / "env.json", json.dumps(environment, indent=1) + "\n")
        (self.path / "plan").mkdir(exist_ok=True)

    def _take_requests(self, config: RunConfig) -> Run:
        """Take the requests that wait, before the first window; return the run as it starts, and print what differs from the config."""
        log = EventLog(self.path)
        run = apply(log.events, states_to_start_from(job_states(self.path)), config)
        run, _, lines = take_requests(RequestFolder(self.path), log, run, window=0, slot=0)
        for line in [*lines, *_describe(run, config, self.path)]:
            print(f"megatron-lora: {line}", file=sys.stderr)
        return run

    @classmethod
    def join(cls, config: RunConfig) -> "RunDirectory":
        """Join a run whose owner has prepared the directory: take a shared lock and write nothing."""
        path = Path(config.output_dir)
        assert (path / STATUS).exists(), f"{path} was not created by RunDirectory.create"
        return cls(path, lock_directory(path, fcntl.LOCK_SH), False)

    def status(self) -> dict:
        """Return what status.json says: exit_status, reason, and jobs: name -> state, reason and, where known, step and best."""
        return _read_status(self.path)

    def set_job(
        self,
        name: str,
        state: str,
        reason: str = "",
        *,
        step: int | None = None,
        best: Best | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Record the state of one job, with the steps taken, the best evaluation and the SHA-256 of its final files if they are given.

        What was recorded of them before stays. Only one process of a run may call this.
        """
        status = self.status()
        assert name in status["jobs"], name
        status["jobs"][name] |= _job(after(status["jobs"][name]["state"], state), reason, step, best, files)
        self._write_status(status)

    def set_on_save(self, name: str, target: str, said: str) -> None:
        """Record what became of a finished adapter at a target of `on_save`."""
        status = self.status()
        status["jobs"][name].setdefault("on_save", {})[target] = said
        self._write_status(status)

    def add_jobs(self, jobs: Sequence[JobConfig]) -> None:
        """Add jobs, which the run does not have, to config.yaml and, queued, to status.json; after their events (events.py)."""
        file = self.path / "config.yaml"
        # `jobs` is the last key of the file, so its list is continued: a thousand jobs are not written anew for each that is added.
        text = YAML_SEAL.sub("", file.read_text(encoding="utf-8"))
        write_atomically(file, sealed_yaml(text + dump_yaml([job_mapping(job) for job in jobs])))
        status = self.status()
        status["jobs"] |= {job.name: _job("queued", "") for job in jobs}
        self._write_status(status)

    def write_resolved(self, config: RunConfig, cost: dict) -> None:
        """Replace config.yaml by the resolved config; write cost.json, what its stages are predicted to cost."""
        write_atomically(self.path / "config.yaml", sealed_yaml(dump_config(config)))
        write_atomically(self.path / "cost.json", sealed(json.dumps(cost, indent=1)))

    def finish(self, status_of_run: int | None = None, reason: str = "") -> int:
        """Record how the run ended, by default as the jobs' states say, those of earlier starts too; returns the exit status.

        Jobs that had not ended become paused, and the same command resumes them.
        """
        if status_of_run is None:
            status_of_run = exit_status(job_states(self.path).values())
        status = self.status() | {"exit_status": status_of_run, "reason": reason, "files": digests_of_run(self.path)}
        for name, job in status["jobs"].items():
            if job["state"] not in (*OVER, "paused"):
                job = job | _job(after(job["state"], "paused"), reason or "the run ended first")
            status["jobs"][name] = job | ({} if job["state"] in OVER else {"files": digests_of_metrics(self.path / "jobs" / name)})
        try:
            self._write_status(status)
        except OSError:  # mostly a full disk: no space for a second file, so the first is overwritten
            (self.path / STATUS).write_text(_as_json(status), encoding="utf-8")
        return status_of_run

    def discard(self) -> None:
        """Remove the files of a run that has not begun."""
        if has_begun(self.path):
            return
        self.check_lock()
        for entry in RUN_FILES:
            remove(self.path / entry)
        if self._created:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def close(self) -> None:
        """Release this process's lock; processes that inherited it keep theirs."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def check_lock(self) -> None:
        """Raise UserError where the lock file is no longer the one that this process holds: another run may write here now."""
        check_held(self.path, self.lock)

    def _write_status(self, status: dict) -> None:
        self.check_lock()
        write_atomically(self.path / STATUS, _as_json(status))


def _check_available(path: Path) -> None:
    """Raise UserError when a new run cannot use this directory."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"output_dir: {str(path)!r} is a link that leads nowhere; choose a directory that does not exist yet")
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir: {str(path)!r} is a file; choose a directory that does not exist yet")
    if not path.exists():
        above = next((parent for parent in path.absolute().parents if parent.exists()), path)
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {str(path)!r} cannot be created below {str(above)!r}; choose a directory that you may write")
        return
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: {str(path)!r} cannot be written; choose a directory that you may write")
    if is_in_use(path):
        raise in_use(path)
    visible = {name for name in os.listdir(path) if not name.startswith(".")}
    foreign = sorted(visible if STATUS not in visible else visible - RUN_FILES)
    if foreign:
        raise UserError(f"output_dir: {str(path)!r} holds {foreign[0]!r}, which no run wrote; choose an empty or new directory")


def _unusable(path: Path, error: OSError) -> UserError:
    name = one_line(repr(str(path)), 200)
    return UserError(f"output_dir: {name} cannot be used ({error.strerror}); choose a directory that you may write, with free space")


def has_trained(path: Path) -> bool:
    """Whether a directory holds steps or adapters of a job."""
    metrics = any(file.stat().st_size for file in path.glob("jobs/*/metrics.jsonl"))
    return metrics or any(path.glob("jobs/*/adapter_model.safetensors")) or any(path.glob("jobs/*/checkpoint-*"))


def has_begun(path: Path) -> bool:
    """Whether a directory holds what must not be lost: steps or adapters of a job, or requests, taken or not."""
    return has_trained(path) or RequestFolder(path).has_any() or any(event.id is not None for event in read_events(path))


def as_left(path: Path, config: RunConfig, states: Mapping[str, str]) -> Run:
    """Return the run in a directory as its events leave it, and as requests that wait will; `states` are those before them."""
    events = read_events(path)
    requests, _, _ = RequestFolder(path).look({event.id for event in events if event.id is not None})
    return foresee(requests, apply(events, states, config))


def with_changes(config: RunConfig) -> RunConfig:
    """Return a config with the jobs that were added to the run that it resumes, and the values and targets that were set there."""
    path = Path(config.output_dir)
    if not (path / STATUS).exists() or not has_begun(path):
        return config
    return with_targets_of(load_config(path / "config.yaml"), as_left(path, config, {}).config)


def base_files_of(path: Path) -> dict[str, str]:
    """Return the digests of the base model's files that a run which has begun has recorded; nothing where there are none."""
    return _read_status(path).get("rests_on", {}) if (path / STATUS).exists() and has_begun(path) else {}


def job_states(path: Path) -> dict[str, str]:
    """Return the state of every job of the run in a directory; UserError for a status.json that this trainer did not write."""
    try:
        return {name: job["state"] for name, job in _read_status(path)["jobs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"output_dir: {str(path)!r} holds the results of a run whose {STATUS} cannot be read; restore it, or choose another directory"
        ) from None


def _ended(path: Path) -> bool:
    """Whether the last start left no job that a start could train; requests since then may have ended more, and say so in the next."""
    return all(state in OVER for state in job_states(path).values())


def _describe(run: Run, config: RunConfig, path: Path) -> list[str]:
    """Say in a line how a run that is resumed differs from its config, if it does; and in another which jobs are paused."""
    before = {job.name: job for job in config.jobs}
    added = [job.name for job in run.config.jobs if job.name not in before]
    changed = [job.name for job in run.config.jobs if job != before.get(job.name, job)]
    paused = [name for name, state in run.states.items() if state == "paused"]
    said = [f"{len(added)} jobs were added ({', '.join(added)})"] if added else []
    said += [f"values of {', '.join(changed)} were set"] if changed else []
    lines = [one_line(f"resumes the run as requests have left it: {'; '.join(said)}", 1000)] if said else []
    return lines + ([one_line(f"paused on request: {', '.join(paused)}; megatron-lora resume {path} NAME", 1000)] if paused else [])


def _as_json(status: dict) -> str:
    return sealed(json.dumps(status, indent=1))


def _job(state: str, reason: str, step: int | None = None, best: Best | None = None, files: Mapping[str, str] | None = None) -> dict:
    known = {"step": step, "best": None if best is None else dataclasses.asdict(best), "files": files}
    return {"state": state, "reason": reason} | {key: value for key, value in known.items() if value is not None}


def _read_status(path: Path) -> dict:
    return unsealed((path / STATUS).read_text(encoding="utf-8"))
