"""Killing a piece of work in front of every change that it makes to the files of a folder: what a crash leaves there.

for number in killed_at_every_change(work, folder, set_up): ...      # it was killed in front of change `number`; what it left lies there

A change is an open for writing, a rename, a removal, a new directory, or a cut.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def killed_at_every_change(work: Callable[[], object], folder: Path, set_up: Callable[[], object]) -> Iterator[int]:
    """Yield 0, 1, ... after `set_up` and a `work` that was killed in front of that change; ends once it ran to its end.

    The work runs in a child process, which is gone without any clean-up.
    """
    number, status = 0, 9
    while status == 9:
        set_up()
        child = os.fork()
        if not child:
            _kill_at(number, str(folder))
            try:
                work()
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), f"change {number}: status {status}"
        if status == 9:
            yield number
        number += 1


def changes_file(event: str, arguments: tuple, folder: str) -> bool:
    """Whether an audit event stands in front of a change of the files of a folder."""
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    return bool((writes or event in CHANGES) and str(arguments[0]).startswith(folder))


def _kill_at(number: int, folder: str) -> None:
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if changes_file(event, arguments, folder):
            if left == 0:
                os._exit(9)
            left -= 1

    sys.addaudithook(hook)
