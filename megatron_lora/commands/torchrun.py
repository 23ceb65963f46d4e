"""torchrun, with its failures told once and in our words.

    python -m megatron_lora.commands.torchrun REPORT.json <arguments of torchrun>

This is torch.distributed.run in a process of its own; what it adds is the ending. Of all ranks that failed, the one that explains
the others is found (a user's mistake before a fatal signal before an exception, then the earliest) and written to REPORT.json:
{"kind": "user" | "signal" | "crash", "rank", "line", "traceback"}. Workers tell their exception by `record_failure`, in the file
that torchrun names in their environment, so a bare torchrun shows it too. Ends 0, or 1 with a report.

SIGTERM and SIGUSR1, which SLURM sends to every process, are for the ranks, which stop and save (stop_request.py); SIGINT ends this
process, and with it the ranks.
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

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's name for the file a worker leaves its exception in
PR_SET_PDEATHSIG = 1
HINTS = {
    "SIGKILL": ", which mostly means that the machine ran out of memory",
    "SIGABRT": ", which mostly means that NCCL failed, or waited for another rank longer than MEGATRON_LORA_TIMEOUT_S",
}


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent process ends, so that no rank outlives its run. Linux only; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def record_failure(error: BaseException) -> None:
    """Leave an exception of this worker where torchrun, and `main` below, look for it; without torchrun do nothing."""
    if ERROR_FILE not in os.environ:
        return
    mistake = isinstance(error, UserError)
    text = str(error) if mistake else "".join(traceback.format_exception(error))
    line = str(error) if mistake else traceback.format_exception_only(error)[-1].strip()
    failure = {"message": text, "timestamp": int(time.time()), "line": line, "user": mistake, "time": time.time()}
    with open(os.environ[ERROR_FILE], "w", encoding="utf-8") as file:
        json.dump(failure, file)


def explain(failures: dict) -> dict:
    """Pick the failure that explains the others; `failures` maps ranks to torch.distributed.elastic's ProcessFailure."""

    def weight(rank: int) -> tuple:
        data = failures[rank].error_file_data
        ended_by = -failures[rank].exitcode
        closed = ended_by == signal.SIGTERM  # mostly by torchrun, because another rank had failed
        return (not data.get("user", False), closed, ended_by <= 0, data.get("time", failures[rank].timestamp), rank)

    waited = [rank for rank in failures if _waited_in_vain(failures[rank])]
    silent = [rank for rank in failures if failures[rank].exitcode == -signal.SIGKILL]
    if waited and silent:  # torchrun kills a rank that does not end when another has failed
        names = ", ".join(f"rank {rank}" for rank in sorted(silent))
        line = f"{names} stood still: rank {min(waited)} waited for it in vain, and it did not end when it was asked to"
        return {"kind": "signal", "rank": min(silent), "line": line, "traceback": ""}
    rank = min(failures, key=weight)
    failure, data = failures[rank], failures[rank].error_file_data
    if data.get("user"):
        return {"kind": "user", "rank": rank, "line": data["line"], "traceback": ""}
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return {"kind": "signal", "rank": rank, "line": f"rank {rank} was ended by {name}{HINTS.get(name, '')}", "traceback": ""}
    line = data.get("line", f"ended with status {failure.exitcode}")
    return {"kind": "crash", "rank": rank, "line": f"rank {rank}: {line}", "traceback": data.get("message", "") if "line" in data else ""}


def _waited_in_vain(failure) -> bool:
    """Whether a rank gave up waiting for another: gloo raises and says so, NCCL's watchdog aborts the process."""
    return failure.exitcode == -signal.SIGABRT or "timed out" in failure.error_file_data.get("line", "").lower()


def main(argv: list[str]) -> int:
    """Run torchrun with argv[1:]; when ranks fail, write the report to argv[0] and return 1."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # until torchrun listens, there are no ranks yet
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the launcher has blocked until now
    die_with_parent(signal.SIGINT)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # its log says again what the report says
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
