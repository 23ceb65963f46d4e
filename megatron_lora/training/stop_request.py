"""Who may ask a rank to stop and save.

The launcher passes SIGTERM, SIGUSR1 and Ctrl-C on to every rank as SIGTERM, and SLURM sends its own to every process of a step. torchrun
also sends SIGTERM, to the ranks that are left when one has failed; those must end at once. What tells the two apart is the sender, which
a thread learns that waits for the signal; all other threads leave it alone. Before the first slot there is nothing to save, and
whoever asks ends the rank.

    stop = StopRequest()
    stop.listen()          # in a rank that launch.py has started, before any other thread is
"""

import os
import signal
import threading
from typing import NoReturn

LISTENED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this rank has been asked to stop and save."""

    def __init__(self):
        self.asked = False
        self.can_save = self.stopped = False  # set by whoever acts on it (agree_to_stop.py)
        self._parent = os.getppid()

    def listen(self) -> None:
        """Take the signals of this process from now on, before any thread is started; where there is no sigwaitinfo, they end it."""
        if not hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, LISTENED)  # which the agent has blocked
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, LISTENED)
        threading.Thread(target=self._wait, name="stop-request", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self._take(signal.sigwaitinfo(LISTENED).si_pid)

    def _take(self, sender: int) -> None:
        """Note that somebody asks; or end, where there is nothing to save, or the one who asks is torchrun (or its end)."""
        if sender == self._parent or not self.can_save:
            _end()
        self.asked = True


def _end() -> NoReturn:
    """End this process as SIGTERM does, in the one thread that does not block it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("SIGTERM ends a process")
