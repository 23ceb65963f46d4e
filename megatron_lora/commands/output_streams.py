"""A run outlives those who read its words: a terminal that was closed, or a pipe whose reader has ended, loses them, and the run continues.

keep_running_unread()        # in the launcher, in every rank, and in commands that show a run; once
"""

import contextlib
import errno
import io
import sys

UNREAD = (errno.EIO, errno.EPIPE)  # the terminal is closed; the pipe has no reader


class _Output(io.FileIO):
    """A file descriptor whose bytes are dropped where they have no reader."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in UNREAD:
                raise
            return len(data)


def keep_running_unread() -> None:
    """Let no write to standard output or error raise because its reader is gone, or has no such character: it gets a '?'."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or stream is None:
            continue  # something else has taken its place
        with contextlib.suppress(OSError):
            stream.flush()
        raw = _Output(stream.fileno(), "wb", closefd=False)
        errors = "replace" if stream.errors == "strict" else stream.errors
        kept = io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=errors, line_buffering=stream.line_buffering)
        setattr(sys, name, kept)
