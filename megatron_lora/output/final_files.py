"""The files that a run and its jobs leave, compared with the digests that the run recorded of them.

status.json has the SHA-256 of the metrics and of the PEFT directory of each job that is over; once a run has
ended also of all jobs' metrics, and of the files of the run as a whole. Before that a job's newest checkpoint
has that of its metrics. A run of an earlier version has none: nothing is compared.

    check_run_files(run)                # before a report of it
    check_job_files(run / "jobs/a")     # before that PEFT directory is read
"""

import hashlib
from pathlib import Path

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import digest_of_file, unsealed
from megatron_lora.output.job_states import OVER
from megatron_lora.output.metrics import METRICS_FILE
from megatron_lora.output.resume import logged_lines
from megatron_lora.output.run_files import window_files
from megatron_lora.output.standing import resume_point_of

STATUS, PLAN = "status.json", "plan/window-*.json"
OF_THE_RUN = ("config.yaml", "events.jsonl", "accounting.json", "cost.json", "timeline.json")


def digests_of_run(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a run as a whole that a report reads, and one for all windows of its plan."""
    found = {name: digest_of_file(run / name) for name in OF_THE_RUN if (run / name).is_file()}
    windows = "".join(f"{digest_of_file(file)}  {file.name}\n" for file in window_files(run))
    return found | ({PLAN: hashlib.sha256(windows.encode()).hexdigest()} if windows else {})


def digests_of_metrics(job_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of a job's metrics, if there are any."""
    metrics = job_dir / METRICS_FILE
    return {METRICS_FILE: digest_of_file(metrics)} if metrics.is_file() else {}


def check_run_files(run: Path) -> None:
    """Raise UserError for the first file of a run that is not what the run has recorded of it."""
    status = _recorded(run)
    found = digests_of_run(run) if status["files"] else {}
    for name, digest in status["files"].items():
        if found.get(name) != digest:
            raise UserError(f"{run / name}: is not what the run wrote (its SHA-256 differs from that in {STATUS}); restore it")
    for name, job in status["jobs"].items():
        check_job_files(run / "jobs" / name)
        if job["state"] not in OVER and "files" not in job:
            logged_lines(run / "jobs" / name, resume_point_of(run / "jobs" / name))


def check_job_files(directory: Path) -> None:
    """Raise UserError unless the final files in the directory of a run's job are what the run has recorded, if it has."""
    directory = directory.absolute()
    run = directory.parent.parent
    recorded = _recorded(run)["jobs"].get(directory.name, {}) if directory.parent.name == "jobs" else {}
    for name, digest in recorded.get("files", {}).items():
        try:
            found = digest_of_file(directory / name)
        except OSError as error:
            raise UserError(f"{directory / name}: cannot be read ({error.strerror}); restore it") from None
        if found != digest:
            raise UserError(f"{directory / name}: is not what the run wrote (its SHA-256 differs from that in {STATUS}); restore it")


def _recorded(run: Path) -> dict[str, dict]:
    """Return `files` and `jobs` of status.json; nothing in them where there is none."""
    try:
        status = unsealed((run / STATUS).read_text(encoding="utf-8"))
        return {"files": {**status.get("files", {})}, "jobs": {name: {**job} for name, job in status["jobs"].items()}}
    except (FileNotFoundError, NotADirectoryError):
        return {"files": {}, "jobs": {}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{run / STATUS}: cannot be read ({one_line(error, 120)}); restore it") from None
