"""Room on a disk: what an unfinished file may take, what it keeps, and what goes for another.

All that is unfinished lies in the private directory of its folder (`partial` lists the names).
It is worth keeping, because what has arrived need not be sent again, and nobody misses it if
it goes, because it then is. So it is bounded in number for each peer, goes when nobody came
back to it for a month, and makes room, the oldest first, when the disk is full.

What is in use carries a lock (flock(2)) of whoever writes to it; nothing here takes away what
is locked. Everything blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from syncd.disk import beneath
from syncd.errors import TransferError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Ends of names in the private directory, see `partial`.
PART: Final = ".part"
BAD: Final = ".bad"
NOTES: Final = ".blocks"

# Days in which a peer that is away may come back and go on; then its beginning is cleared up.
MAX_AGE: Final = 30 * 24 * 3600.0  # seconds
# Beginnings of one peer in one folder. At most 64 of its transfers run at a time; whoever
# leaves more than four times as many behind does not mean to go on with them.
MAX_PARTS: Final = 256  # files
# What arrived and was not what was sent, in one folder: a peer that sends such files, out of
# malice or over a bad line, does not fill the disk with them.
MAX_BAD: Final = 8  # files
# This part of a disk stays free: file systems become slow when they are full, and other
# programs, and we ourselves, need some. Syncthing keeps as much by default.
LEAST_FREE: Final = 0.01

# How st_blocks counts, whatever the file system's blocks are (stat(2)).
_BLOCK = 512  # bytes
# What the file system notes of a file counts as its blocks, too; and to cut a file makes it
# seem just used, so that for less it is not worth it.
_SLACK = 1 << 20  # bytes
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True, order=True)
class _Leftover:
    """What is unfinished: since when nobody touched it, its name, what it takes in bytes."""

    changed: float
    name: str
    size: int


def occupy(fd: int) -> bool:
    """Lock a partial file for as long as it is open.

    Returns:
      Whether it is ours alone now; False: this file system has no locks.

    Raises:
      TransferError: It is in use.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TransferError("this file is being received already") from error
    except OSError:
        return False
    return True


def give_back(fd: int) -> int:
    """Free what was reserved behind the end of a file; only for who has locked it.

    Returns:
      Its length, bytes.
    """
    size = os.fstat(fd).st_size
    # Blocks behind the end go when a file is cut to the length that it has (ftruncate(2) does
    # not say so, but ext4, XFS, btrfs and tmpfs all do it).
    os.ftruncate(fd, size)
    return size


def take(fd: int, size: int, private: int, own: str) -> None:
    """Reserve what a file needs; on a full disk, old beginnings make room for it.

    Args:
      fd: The file.
      size: How long it will be, bytes.
      private: Descriptor of the private directory.
      own: Its name there, which stays.

    Raises:
      TransferError: Less than `LEAST_FREE` of the disk would be left.
      OSError: The disk refuses.
    """
    needed = size - os.fstat(fd).st_blocks * _BLOCK
    if needed <= 0:
        return  # it has them already
    free = _free(private)
    if free is not None and needed > free and not _make_room(private, needed - free, own):
        _check_length(fd, size)
        raise TransferError(
            "the disk has too little room left for the file",
            hint="make room; it goes on by itself",
        )
    try:
        beneath.reserve(fd, size)
    except OSError as error:
        # Where a quota counts, or who else writes was faster.
        if error.errno not in _FULL or not _make_room(private, needed, own):
            raise
        beneath.reserve(fd, size)


def _check_length(fd: int, size: int) -> None:
    """See that a file of this length could be at all, however much room there is.

    Raises:
      OSError: The file system, or a limit, does not allow it (EFBIG).
    """
    length = os.fstat(fd).st_size
    os.ftruncate(fd, max(size, length))  # without blocks
    os.ftruncate(fd, length)


def _free(directory: int) -> int | None:
    """How many bytes may still be taken; None: the file system does not tell."""
    disk = os.fstatvfs(directory)
    if not disk.f_blocks:
        return None
    return (disk.f_bavail - int(disk.f_blocks * LEAST_FREE)) * disk.f_frsize


def _make_room(private: int, needed: int, own: str) -> bool:
    """Delete what is of least use, but only if that is enough."""
    victims: list[str] = []
    for leftover in (*_leftovers(private, BAD), *_leftovers(private, PART)):
        if needed <= 0:
            break
        with _unused(leftover.name, private) as unused:
            if unused is not None and leftover.name != own:
                victims.append(leftover.name)
                needed -= leftover.size
    if needed > 0:
        return False
    for name in victims:
        delete_unused(name, private)
    return True


def keep_newest(private: int, keep: int, *, begins: str = "", ends: str) -> None:
    """Delete the oldest of the files whose names begin and end like this.

    Args:
      private: Descriptor of the private directory.
      keep: How many stay; so do those that are in use.
      begins: How their names begin.
      ends: How they end: `PART` or `BAD`.
    """
    spare = sum(_fits(each, begins, ends) for each in os.listdir(private)) - keep
    if spare <= 0:
        return  # nearly always: to look at each takes its time
    for leftover in _leftovers(private, ends, begins):
        spare -= delete_unused(leftover.name, private)
        if spare <= 0:
            return


def expire(private: int, now: float) -> None:
    """Delete what nobody has touched for `MAX_AGE`; at any time.

    Args:
      private: Descriptor of the private directory.
      now: Seconds since 1970.
    """
    for leftover in (*_leftovers(private, PART), *_leftovers(private, BAD)):
        if leftover.changed < now - MAX_AGE:
            delete_unused(leftover.name, private, locks=False)


def delete_unused(name: str, private: int, *, locks: bool = True) -> bool:
    """Delete an unfinished file, and its notes, unless somebody uses it.

    Args:
      name: Of the file.
      private: Descriptor of the private directory.
      locks: Where there are none, take it for in use.

    Returns:
      Whether it was there, and is not any more.
    """
    with _unused(name, private, locks=locks) as fd:
        if fd is not None:
            delete(name, private)
        return fd is not None


def delete(name: str, private: int) -> None:
    """Delete an unfinished file, and its notes, if they are there.

    Args:
      name: Of the file.
      private: Descriptor of the private directory.
    """
    for each in (name, name + NOTES):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(each, dir_fd=private)


def trim(name: str, private: int) -> None:
    """Take from an unfinished file what a crash has left reserved, or all of it.

    At the start, before the first transfer.
    """
    with _unused(name, private, locks=False) as fd:
        if fd is None:
            return
        status = os.fstat(fd)
        # Without a dash nobody resumes it. A second link: it has its final name already.
        nobodys = "-" not in name and name.endswith(PART)
        if nobodys or status.st_nlink > 1 or (status.st_size == 0 and name.endswith(PART)):
            delete(name, private)
            return
    if status.st_blocks * _BLOCK > status.st_size + _SLACK:
        with _unused(name, private) as fd:
            if fd is not None:
                give_back(fd)


def _leftovers(private: int, ends: str, begins: str = "") -> list[_Leftover]:
    """Plain files with such names, what was touched last at the end."""
    found = []
    for name in os.listdir(private):
        if _fits(name, begins, ends):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=private, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    # Not its mtime, which is the sender's as soon as it is whole.
                    size = status.st_blocks * _BLOCK
                    found.append(_Leftover(status.st_ctime, name, size))
    return sorted(found)


def _fits(name: str, begins: str, ends: str) -> bool:
    return name.startswith(begins) and name.endswith(ends)


@contextlib.contextmanager
def _unused(name: str, private: int, *, locks: bool = True) -> Iterator[int | None]:
    """Hold a plain file that nobody uses, so that nobody begins to.

    Args:
      name: Of the file.
      private: Descriptor of the private directory.
      locks: Where there are none, take it for in use.

    Yields:
      Its descriptor; None if it is in use, or not what it should be.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=private)
    except OSError:  # a link, not ours, or gone: it is in nobody's way
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            free = not locks
        else:
            free = True
        yield fd if free and stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)
