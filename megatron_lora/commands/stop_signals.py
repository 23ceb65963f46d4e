"""The signals that ask a run to stop, as its launcher takes them: what a request does depends on how far the run is.

    with StopSignals() as signals:       # checks: a request raises Stopped, before anything is written
        signals.hold()                   # the directory is made, or finished: a request is only noted
        signals.pass_on(forward)         # ranks are up: a request is theirs

Signals that arrive close together are one request. A run that `nohup` has started ignores the end of its terminal.
"""

import signal
import time
from collections.abc import Callable

from megatron_lora.training.stop_request import STOP_SIGNALS

SAME_REQUEST_S = 3.0  # SLURM signals both the batch script and the step; a shell and the kernel both tell of a closed terminal


class Stopped(KeyboardInterrupt):
    """A request to stop, of which nothing has to be saved."""

    def __init__(self, number: int):
        """Take the signal's number."""
        super().__init__(number)
        self.number = number


class StopSignals:
    """The requests of this process, from `with` on; `received` are their signals."""

    def __init__(self):
        self.received: list[int] = []
        self._last_s = -SAME_REQUEST_S
        self._act: Callable[[], None] | None = None  # None: raise Stopped
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  what signal.signal returned

    def hold(self) -> None:
        """Only note requests from now on."""
        self._act = lambda: None

    def pass_on(self, act: Callable[[], None]) -> None:
        """Call `act` for each request from now on."""
        self._act = act

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if now < self._last_s + SAME_REQUEST_S:
            return
        self._last_s = now
        self.received.append(number)
        if self._act is None:
            raise Stopped(number)
        self._act()


def stop_reason(number: int, undone: str) -> str:
    """Say that a signal ended a command, and what it had not done yet."""
    return f"stopped by {signal.Signals(number).name} before {undone}"
