"""Bounds on what a chat template, which is the base model's own program, may take: CPU time, memory, and the size of what it writes.

Jinja's sandbox keeps a template from files and attributes, but not from nested loops or strings that double. The bounds hold where a
process tokenises in its main thread, which is always so for data that are not in the cache.

    with bounded():
        text = render(...)          # TimeoutError or MemoryError beyond them
"""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

MOST_CPU_S = 20.0
MOST_BYTES = 1 << 30  # beyond what the process has
MOST_CHARACTERS = 1 << 25
PAGE = resource.getpagesize()


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError in a block that takes too much CPU time, and MemoryError in one that takes too much memory."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"it took more than {MOST_CPU_S:g} s")

    before, (soft, hard) = signal.signal(signal.SIGVTALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + MOST_BYTES
    limited = soft == resource.RLIM_INFINITY or most < soft
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
