"""The output directory of a run: who may write it, and the files that describe the run as a whole.

    .lock         held by every live process of the run (flock, so it goes with the process, however that ends)
    config.yaml   the resolved config          env.json   versions, commit, machine
    status.json   state of every job and, once the run has ended, its exit status; always a complete file
    cost.json     what the run was predicted to cost       calibration.json   the machine's cost table that it goes by, if there is one
    plan/         the windows that were planned                jobs/<name>/   what a job writes

Invariant: a directory belongs to one run. `check` refuses, without touching it, one that another process uses, that holds a run which is
finished or began with another config (resume.py), or that holds files of other origin. A run that has trained and ended early is
taken up again; what a run left that never took a step is taken away. The owner makes the directory under an exclusive lock and then
shares it; workers of the run `join` with a shared lock, newcomers find it taken.

    RunDirectory.check(config)                     # early, read-only
    with RunDirectory.create(config) as run: ...   # the owner: the parent process, or rank 0 under a bare torchrun
    with RunDirectory.join(config) as run:         # a worker
        run.set_job("summarise", "running"); run.set_job("summarise", "failed", "loss is not finite")
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from megatron_lora.config.schema import RunConfig, dump_config
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import write_atomically
from megatron_lora.output.resume import check_resume, rewind
from megatron_lora.output.standing import Standing, standings

JOB_STATES = ("queued", "running", "paused", "done", "failed")
LOCK, STATUS = ".lock", "status.json"
OURS = {LOCK, STATUS, "config.yaml", "env.json", "calibration.json", "cost.json", "plan", "timeline.json", "jobs"}


class RunDirectory:
    """An output directory whose lock this process holds."""

    def __init__(self, path: Path, lock: int, made: bool):
        """Wrap a directory and the descriptor of its locked lock file; use create or join."""
        self.path, self.lock, self._made = path, lock, made

    @staticmethod
    def check(config: RunConfig) -> dict[str, Standing]:
        """Return where each job begins or goes on that is not over; UserError when this run cannot have its directory. Writes nothing."""
        path = Path(config.output_dir)
        try:
            _check_free(path)
            return check_resume(path, job_states(path), config) if has_trained(path) else standings(config, {})
        except OSError as error:
            raise _unusable(path, error) from None

    @classmethod
    def create(cls, config: RunConfig, environment: dict | None = None) -> "RunDirectory":
        """Lock the directory of a run and make it ready, every job queued that is not over; UserError when check refuses it."""
        path = Path(config.output_dir)
        cls.check(config)
        try:
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _lock(path, fcntl.LOCK_EX), made)
            try:
                run._fill(config, environment or {})
                _share(path, run.lock)
            except BaseException as error:
                if isinstance(error, OSError):
                    run.discard()
                run.close()
                raise
        except OSError as error:
            raise _unusable(path, error) from None
        return run

    def _fill(self, config: RunConfig, environment: dict) -> None:
        """Leave our name in the lock file; go back to where the jobs go on, or take away what never took a step; write the run's files."""
        os.truncate(self.lock, 0)
        os.pwrite(self.lock, _ourselves().encode(), 0)
        jobs = {job.name: _job("queued", "") for job in config.jobs}
        if has_trained(self.path):
            left = check_resume(self.path, job_states(self.path), config)  # another run may have ended between the check and the lock
            rewind(self.path, left)
            jobs |= {name: job for name, job in self.status()["jobs"].items() if name not in left}
        else:
            for entry in ("calibration.json", "cost.json", "plan", "jobs", "timeline.json"):
                _remove(self.path / entry)
        self._write_status({"exit_status": None, "reason": "", "jobs": jobs})
        write_atomically(self.path / "config.yaml", dump_config(config))
        write_atomically(self.path / "env.json", json.dumps(environment, indent=1) + "\n")
        (self.path / "plan").mkdir(exist_ok=True)

    @classmethod
    def join(cls, config: RunConfig) -> "RunDirectory":
        """Take part in a run whose owner has made its directory: a shared lock, nothing written."""
        path = Path(config.output_dir)
        assert (path / STATUS).exists(), f"{path} was not made by RunDirectory.create"
        return cls(path, _lock(path, fcntl.LOCK_SH), False)

    @property
    def plan_dir(self) -> Path:
        """Where the executed plan windows go."""
        return self.path / "plan"

    def job_dir(self, name: str) -> Path:
        """The directory of a job, made when it is not there yet."""
        path = self.path / "jobs" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def status(self) -> dict:
        """What status.json says: exit_status, reason and jobs, a mapping from name to state and reason."""
        return _read_status(self.path)

    def set_job(self, name: str, state: str, reason: str = "") -> None:
        """Record the state of one job; one process of a run does this."""
        assert state in JOB_STATES, state
        status = self.status()
        assert name in status["jobs"], name
        status["jobs"][name] = _job(state, reason)
        self._write_status(status)

    def resolve(self, config: RunConfig, cost: dict) -> None:
        """Record the config with the choices made that it left open, and what its stages are predicted to cost."""
        write_atomically(self.path / "config.yaml", dump_config(config))
        write_atomically(self.path / "cost.json", json.dumps(cost, indent=1) + "\n")

    def finish(self, exit_status: int, reason: str = "") -> None:
        """Record how the run ended; jobs that had not ended are paused: the same command takes them up again."""
        status = self.status() | {"exit_status": exit_status, "reason": reason}
        for name, job in status["jobs"].items():
            if job["state"] in ("queued", "running"):
                status["jobs"][name] = _job("paused", reason or "the run ended first")
        try:
            self._write_status(status)
        except OSError:  # mostly a full disk: no room for a second file, but the first has its own
            (self.path / STATUS).write_text(_as_json(status), encoding="utf-8")

    def discard(self) -> None:
        """Take away everything that a run wrote which never took a step; a run that has trained stays."""
        if has_trained(self.path):
            return
        for entry in OURS:
            _remove(self.path / entry)
        if self._made:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def close(self) -> None:
        """Give this process's hold on the lock back; processes that inherited it keep theirs."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _write_status(self, status: dict) -> None:
        write_atomically(self.path / STATUS, _as_json(status))


def _check_free(path: Path) -> None:
    """Raise UserError when a new run cannot have this directory."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"output_dir: {str(path)!r} is a link that leads nowhere; choose a directory that does not exist yet")
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir: {str(path)!r} is a file; choose a directory that does not exist yet")
    if not path.exists():
        above = next((parent for parent in path.absolute().parents if parent.exists()), path)
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {str(path)!r} cannot be made below {str(above)!r}; choose a directory that you may write")
        return
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: {str(path)!r} cannot be written; choose a directory that you may write")
    if (path / LOCK).exists() and not _unlocked(path / LOCK):
        raise UserError(f"output_dir: {str(path)!r} is in use by {_holder(path / LOCK)}; wait for it, or choose another directory")
    visible = {name for name in os.listdir(path) if not name.startswith(".")}
    foreign = sorted(visible if STATUS not in visible else visible - OURS)
    if foreign:
        raise UserError(f"output_dir: {str(path)!r} holds {foreign[0]!r}, which no run wrote; choose an empty or new directory")


def _unusable(path: Path, error: OSError) -> UserError:
    name = one_line(repr(str(path)), 200)
    return UserError(f"output_dir: {name} cannot be used ({error.strerror}); choose a directory that you may write, with space left")


def _remove(path: Path) -> None:
    """Take away a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def has_trained(path: Path) -> bool:
    """Whether a directory holds steps or adapters of a job."""
    metrics = any(file.stat().st_size for file in path.glob("jobs/*/metrics.jsonl"))
    return metrics or any(path.glob("jobs/*/adapter_model.safetensors")) or any(path.glob("jobs/*/checkpoint-*"))


def job_states(path: Path) -> dict[str, str]:
    """Return the state of every job of the run in a directory; UserError where its status.json is not one of ours."""
    try:
        return {name: job["state"] for name, job in _read_status(path)["jobs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"output_dir: {str(path)!r} holds the results of a run whose {STATUS} cannot be read; restore it, or choose another directory"
        ) from None


def _as_json(status: dict) -> str:
    return json.dumps(status, indent=1) + "\n"


def _job(state: str, reason: str) -> dict:
    return {"state": state, "reason": reason}


def _read_status(path: Path) -> dict:
    return json.loads((path / STATUS).read_text(encoding="utf-8"))


def _lock(path: Path, kind: int) -> int:
    """Open and lock the lock file; returns the descriptor."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"output_dir: {str(path)!r} is in use by {_holder(path / LOCK)}; wait for it, or choose another directory"
        ) from None
    except OSError as error:
        os.close(lock)
        raise UserError(f"output_dir: {str(path)!r} cannot be locked ({error.strerror}); choose another file system") from None
    return lock


def _share(path: Path, lock: int) -> None:
    """Turn the owner's lock into a shared one. flock may let go in between: whoever slips in then owns the directory."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if _holder(path / LOCK) == _ourselves():
            return
    raise UserError(f"output_dir: {str(path)!r} is in use by {_holder(path / LOCK)}; wait for it, or choose another directory")


def _ourselves() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def _unlocked(lock_file: Path) -> bool:
    """Whether no live process holds the lock."""
    with open(lock_file, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _holder(lock_file: Path) -> str:
    """Who holds a lock, in words."""
    try:
        return lock_file.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
