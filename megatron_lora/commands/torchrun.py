"""torchrun, with its failures reported once, in one line.

    python -m megatron_lora.commands.torchrun REPORT.json <arguments of torchrun>

This is torch.distributed.run in a process of its own, and it adds a report of how the run ended. A
worker writes its exception to the file that torchrun names in its environment (`record_failure`); a
bare torchrun shows it too. Of all ranks that failed, the report names the one that caused the
others to fail: a user's mistake comes before a fatal signal, a signal before an exception, and of
several the earliest is chosen. REPORT.json is {"kind": "user" | "signal" | "crash", "rank", "line",
"traceback"}. The exit status is 0, or 1 with a report.

SLURM sends SIGTERM and SIGUSR1 to every process. This one blocks them, and the ranks stop and save
(stop_request.py). SIGINT ends this process, and with it the ranks.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback

from megatron_lora.errors import UserError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's variable: the file into which a worker writes its exception
PR_SET_PDEATHSIG = 1
HINTS = {
    "SIGKILL": ", which mostly means that the machine ran out of memory",
    "SIGABRT": ", which mostly means that NCCL failed, or waited for another rank longer than MEGATRON_LORA_TIMEOUT_S",
}


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send a signal when the parent process ends, so that no rank outlives its run. Does nothing except on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def record_failure(error: BaseException) -> None:
    """Write an exception of this worker to the file where torchrun and `main` look for it; without torchrun do nothing."""
    if ERROR_FILE not in os.environ:
        return
    is_user_error = isinstance(error, UserError)
    text = str(error) if is_user_error else "".join(traceback.format_exception(error))
    line = str(error) if is_user_error else traceback.format_exception_only(error)[-1].strip()
    failure = {"message": text, "timestamp": int(time.time()), "line": line, "user": is_user_error, "time": time.time()}
    with open(os.environ[ERROR_FILE], "w", encoding="utf-8") as file:
        json.dump(failure, file)


def explain(failures: dict) -> dict:
    """Return a report of the failure that caused the others; `failures`: rank -> torch.distributed.elastic's ProcessFailure."""

    def priority(rank: int) -> tuple:
        data = failures[rank].error_file_data
        number = -failures[rank].exitcode
        terminated = number == signal.SIGTERM  # mostly by torchrun, because another rank has failed
        return (not data.get("user", False), terminated, number <= 0, data.get("time", failures[rank].timestamp), rank)

    timed_out = [rank for rank in failures if _timed_out_waiting(failures[rank])]
    killed = [rank for rank in failures if failures[rank].exitcode == -signal.SIGKILL]
    if timed_out and killed:  # torchrun kills a rank that does not end when another has failed
        names = ", ".join(f"rank {rank}" for rank in sorted(killed))
        line = f"{names} hung: rank {min(timed_out)} timed out waiting for it, and it did not end on SIGTERM"
        return {"kind": "signal", "rank": min(killed), "line": line, "traceback": ""}
    rank = min(failures, key=priority)
    failure, data = failures[rank], failures[rank].error_file_data
    if data.get("user"):
        return {"kind": "user", "rank": rank, "line": data["line"], "traceback": ""}
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return {"kind": "signal", "rank": rank, "line": f"rank {rank} was ended by {name}{HINTS.get(name, '')}", "traceback": ""}
    line = data.get("line", f"ended with status {failure.exitcode}")
    return {"kind": "crash", "rank": rank, "line": f"rank {rank}: {line}", "traceback": data.get("message", "") if "line" in data else ""}


def _timed_out_waiting(failure) -> bool:
    """Whether a rank timed out waiting for another: gloo raises an exception that says so, NCCL's watchdog aborts the process."""
    return failure.exitcode == -signal.SIGABRT or "timed out" in failure.error_file_data.get("line", "").lower()


def main(argv: list[str]) -> int:
    """Run torchrun with argv[1:]; when ranks fail, write the report to argv[0] and return 1."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # torchrun sets its own handler before it starts ranks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the launcher has blocked it
    die_with_parent(signal.SIGINT)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # its log repeats what the report says
    try:
        run.main(argv[1:])
    except ChildFailedError as error:
        report = explain(error.failures)
    except SignalException as error:
        report = {"kind": "signal", "rank": -1, "line": f"stopped by {error.sigval.name}", "traceback": ""}
    else:
        return 0
    with open(argv[0], "w", encoding="utf-8") as file:
        json.dump(report, file)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
