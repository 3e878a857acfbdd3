"""Who serves a control socket: a lock file beside it, which dies with its process.

ZeroMQ itself cannot tell: a socket file stays behind when a daemon is killed, and a second
bind takes the path from a living one.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from syncd.errors import ControlError

if TYPE_CHECKING:
    from pathlib import Path

# Room for any process id and its line end.
_MAX_PID = 32  # bytes

# A lock file is never a link to something else (O_NOFOLLOW), never blocks the opener as a
# fifo would (O_NONBLOCK), and is not inherited by programs we start (O_CLOEXEC).
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

UNKNOWN = 0
"""The process id of a holder that has not yet written its own."""


def lock_path(path: Path) -> Path:
    """Where the lock of a socket lies."""
    return path.with_name(f"{path.name}.lock")


def take(path: Path) -> int | None:
    """Try to become the one that serves a socket; never waits.

    Args:
      path: The socket.

    Returns:
      The open lock file, to be given to `release`; None if somebody has the lock. That may
      be a client that has just a look, so it is worth a few tries.

    Raises:
      ControlError: The lock file is not ours to use.
      OSError: It cannot be opened or written.
    """
    lock = lock_path(path)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise ControlError(
                f"{lock} is not a file of ours",
                hint="remove it, or use another [control] socket",
            )
        if _locked(fd, fcntl.LOCK_EX) and _is_at(fd, lock):
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
            kept, fd = fd, -1
            return kept
        return None
    finally:
        if fd != -1:
            os.close(fd)


def release(fd: int, path: Path) -> None:
    """Give the lock back and remove its file.

    Args:
      fd: As `take` returned it.
      path: The socket.
    """
    # Removed while still held: who opened it meanwhile finds it gone, and tries again.
    lock_path(path).unlink(missing_ok=True)
    os.close(fd)


def holder(path: Path) -> int | None:
    """Look who serves a socket.

    Args:
      path: The socket.

    Returns:
      The process id, or `UNKNOWN`; None if nobody does.

    Raises:
      PermissionError: We may not look.
      OSError: It cannot be read.
    """
    try:
        fd = os.open(lock_path(path), os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return None
    try:
        # Shared, so that two who look do not take each other for a daemon.
        if _locked(fd, fcntl.LOCK_SH):
            return None
        text = os.pread(fd, _MAX_PID, 0).strip()
        return int(text) if text.isdigit() else UNKNOWN
    finally:
        os.close(fd)


def _locked(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, lock: Path) -> bool:
    """Whether the file we locked is still the one others would open."""
    try:
        return os.path.samestat(os.fstat(fd), lock.lstat())
    except FileNotFoundError:
        return False
