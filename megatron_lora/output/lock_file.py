"""`.lock` of a run's directory: locked by every live process of the run, by flock, so that a process loses it however it ends.

The owner locks it exclusively, signs it, prepares the directory, and shares the lock with the run's other
processes. The file is never a link. A lock holds for the file that was opened: where that is removed or
replaced, another run can begin, so writers look whether the file is still theirs.

    lock = lock_directory(path, fcntl.LOCK_EX);  sign(lock);  share(path, lock)
    check_held(path, lock)                       # before each write
"""

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from megatron_lora.errors import UserError

LOCK = ".lock"


def lock_directory(path: Path, kind: int) -> int:
    """Open and lock the lock file; returns the descriptor."""
    lock = _open(path, os.O_CREAT)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise in_use(path) from None
    except OSError as error:
        os.close(lock)
        raise UserError(f"output_dir: {str(path)!r} cannot be locked ({error.strerror}); choose another file system") from None
    return lock


def sign(lock: int) -> None:
    """Write into the file who holds it."""
    os.truncate(lock, 0)
    os.pwrite(lock, _this_process().encode(), 0)


def share(path: Path, lock: int) -> None:
    """Turn the owner's lock into a shared one. flock may unlock in between, and a process that locks the file then is the owner."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if _holder(path / LOCK) == _this_process():
            return
    raise in_use(path)


def check_held(path: Path, lock: int) -> None:
    """Raise UserError where the lock file is no longer the one that this process holds: another run may write here now."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if os.path.samestat(os.stat(path / LOCK, follow_symlinks=False), os.fstat(lock)):
            return
    raise UserError(
        f"output_dir: {str(path / LOCK)!r} was removed or replaced while this run held it, so that another run may write there; this one "
        "stops: see that no other runs, and start it again"
    )


def is_in_use(path: Path) -> bool:
    """Whether a live process holds the lock of a run's directory."""
    if not os.path.lexists(path / LOCK):
        return False
    lock = _open(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def in_use(path: Path) -> UserError:
    """Return the error that names who holds a directory."""
    return UserError(f"output_dir: {str(path)!r} is in use by {_holder(path / LOCK)}; wait for it, or choose another directory")


def _open(path: Path, create: int = 0) -> int:
    """Open the lock file; OSError where it is a link, or nothing that can be locked."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | create, 0o666)
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise OSError(errno.EINVAL, f"{LOCK} is no file")
    return lock


def _this_process() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def _holder(lock_file: Path) -> str:
    """Return who holds a lock, as a message names it."""
    try:
        return lock_file.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
