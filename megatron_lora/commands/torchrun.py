"""torchrun, with its failures reported once, in one line.

    python -m megatron_lora.commands.torchrun REPORT.json <arguments of torchrun>

This is torch.distributed.run in a process of its own, and it adds a report of how the run ended. A
worker writes its exception to the file that torchrun names in its environment (`record_failure`); a
bare torchrun shows it too. Of all ranks that failed, the report names the one that caused the
others to fail (`explain`). REPORT.json is {"kind": "user" | "signal" | "out of memory" | "crash",
"rank", "line", "traceback"}. The exit status is 0, or 1 with a report.

SLURM sends its signals to every process. This one blocks those that ask a run to stop, also for the
ranks that it starts, until they listen (stop_request.py). END_RANKS ends this process, and with it
the ranks.
"""

import ctypes
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from megatron_lora.errors import UserError
from megatron_lora.files import write_atomically
from megatron_lora.output.whereabouts import Whereabout, read_whereabouts
from megatron_lora.training.stop_request import STOP_SIGNALS

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's variable: the file into which a worker writes its exception
END_RANKS = signal.SIGUSR2  # the launcher's to this process, which SLURM and terminals do not send
PR_SET_PDEATHSIG = 1
PATIENCE_S = 30  # torchrun's: ranks that do not end on its SIGTERM when another has failed are killed
OTHERS_FAULT = re.compile("closed by peer|reset by peer|broken pipe|timed out|remote process exited|got 0 bytes", re.IGNORECASE)
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
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in line
    failure = {"message": text, "timestamp": int(time.time()), "line": line, "user": is_user_error, "time": time.time()}
    failure["out_of_memory"] = out_of_memory
    write_atomically(Path(os.environ[ERROR_FILE]), json.dumps(failure))  # torchrun has no words for half a file


def explain(failures: dict, places: Mapping[int, Whereabout]) -> dict:
    """Return a report of the failure that caused the others; `failures`: rank -> torch.distributed.elastic's ProcessFailure.

    `places` says where ranks were last.

    A user's mistake comes first, then what kills a process, what it raises, and last what another rank's
    end makes a rank raise; of several the earliest. Whom torchrun has ended caused nothing, but may have hung.
    """
    recorded = {rank: failure.error_file_data if "line" in failure.error_file_data else {} for rank, failure in failures.items()}
    times = {rank: recorded[rank].get("time", failure.timestamp) for rank, failure in failures.items()}

    def ended_by_torchrun(rank: int) -> bool:
        number = -failures[rank].exitcode
        late = times[rank] >= min(times.values()) + PATIENCE_S - 1  # torch's times are whole seconds
        return not recorded[rank] and (number == signal.SIGTERM or (number == signal.SIGKILL and late))

    def priority(rank: int) -> tuple:
        data, number = recorded[rank], -failures[rank].exitcode
        kinds = (
            data.get("user", False),
            not data and number > 0 and number not in (signal.SIGABRT, signal.SIGTERM) and not ended_by_torchrun(rank),
            bool(data) and not OTHERS_FAULT.search(data["line"]),
            not data and number == signal.SIGABRT,
            not ended_by_torchrun(rank),
            True,
        )
        return kinds.index(True), number != signal.SIGKILL, times[rank], rank

    rank = min(failures, key=priority)
    if _timed_out_waiting(failures[rank]):
        killed = sorted(rank for rank in failures if failures[rank].exitcode == -signal.SIGKILL and ended_by_torchrun(rank))
        busy = [rank for rank in failures if ended_by_torchrun(rank) and rank in places and not places[rank].waits]
        hung = killed or sorted(busy, key=lambda rank: places[rank].since_s)[:1]
        where = "".join(f"; rank {rank} was {places[rank].words}" for rank in (*hung, rank) if rank in places)
        if hung:
            names, still = ", ".join(f"rank {rank}" for rank in hung), ", and it did not end on SIGTERM" if killed else ""
            line = f"{names} hung: rank {rank} timed out waiting for it{still}{where}"
            return {"kind": "signal", "rank": hung[0], "line": line, "traceback": ""}
    else:
        where = ""
    exitcode, data = failures[rank].exitcode, recorded[rank]
    if data:
        kind = "out of memory" if data["out_of_memory"] else "crash"
        crashed = {"kind": kind, "rank": rank, "line": f"rank {rank}: {data['line']}{where}", "traceback": data["message"]}
        return {"kind": "user", "rank": rank, "line": data["line"], "traceback": ""} if data["user"] else crashed
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        return {"kind": "signal", "rank": rank, "line": f"rank {rank} was ended by {name}{HINTS.get(name, '')}{where}", "traceback": ""}
    return {"kind": "crash", "rank": rank, "line": f"rank {rank}: ended with status {exitcode}", "traceback": ""}


def _timed_out_waiting(failure) -> bool:
    """Whether a rank timed out waiting for another: gloo raises an exception that says so, NCCL's watchdog aborts the process."""
    return failure.exitcode == -signal.SIGABRT or "timed out" in failure.error_file_data.get("line", "").lower()


def main(argv: list[str]) -> int:
    """Run torchrun with argv[1:]; when ranks fail, write the report to argv[0] and return 1."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(END_RANKS, lambda *_: os._exit(1))  # there are no ranks yet
    die_with_parent(END_RANKS)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def end_ranks(number: int, frame: object) -> None:
        raise SignalException("the launcher ends the ranks", signal.SIGTERM)

    signal.signal(END_RANKS, end_ranks)
    logging.disable(logging.CRITICAL)  # its log repeats what the report says
    try:
        run.main(argv[1:])
    except ChildFailedError as error:
        report = explain(error.failures, read_whereabouts(Path(argv[0]).parent))
    except SignalException as error:
        report = {"kind": "signal", "rank": -1, "line": f"stopped by {error.sigval.name}", "traceback": ""}
    else:
        return 0
    with open(argv[0], "w", encoding="utf-8") as file:
        json.dump(report, file)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
