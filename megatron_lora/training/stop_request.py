"""Receives the signals that ask a rank to stop and save, or to end.

The launcher forwards its requests to every rank as SIGTERM, and SLURM sends its signals to every
process itself: these ask the rank to stop and save. torchrun also sends SIGTERM, to the remaining
ranks when one has failed, and these must end at once. Only the sender tells the two apart. The
signals are blocked from a rank's start; one thread waits for them with `sigwaitinfo`, which returns
the sender. Before the first slot there is nothing to save, and any request ends the rank; a rank
that records why it fails does so to the end.

    stop = StopRequest()
    stop.listen()          # in a rank that launch.py has started, before any other thread starts
"""

import os
import signal
import threading
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Whether this rank has a request to stop and save, and whether the run has stopped for one."""

    def __init__(self):
        self.requested = False
        self.can_save = False  # set by agree_to_stop.py: from the first slot on
        self.stopped = False  # set by agree_to_stop.py: the ranks have agreed
        self.fails = False  # this rank has failed, and ends without a signal
        self._parent = os.getppid()

    def listen(self) -> None:
        """Handle this process's signals from now on; call it before any thread starts.

        Where the platform has no sigwaitinfo, the signals end the process.
        """
        if not hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the process that started this one has blocked them
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._wait, name="stop-request", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self._handle(signal.sigwaitinfo(STOP_SIGNALS).si_pid)

    def _handle(self, sender: int) -> None:
        """Note the request, or end if there is nothing to save or the sender is torchrun (its death also sends a signal)."""
        if self.fails:
            return
        if sender == self._parent or not self.can_save:
            _end()
        self.requested = True


def _end() -> NoReturn:
    """End this process as SIGTERM does, by unblocking the signal in this thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("SIGTERM ends a process")
