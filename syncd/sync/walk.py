"""What lies in a folder, found by looking at the disk; all of it blocks.

Only regular files count, links are never followed, and what cannot be sent is noted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import stat
from fnmatch import translate
from typing import TYPE_CHECKING

from syncd.disk.beneath import open_directory
from syncd.disk.paths import PRIVATE
from syncd.errors import DeclinedError, NotFoundError, SyncdError
from syncd.sync.settle import Look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Names that programs use for what is not the file yet, or never will be. Not 4913, by which
# vim probes a directory: it is gone before it has rested, and a person's 4913 is a file.
IGNORED = (
    ".*.sw?", "*~", ".~lock.*#", "*.part", "*.partial", "*.crdownload", "*.tmp",
    ".goutputstream-*", ".nfs*", "~$*", ".#*", "#*#",
)  # fmt: skip

_IGNORED = re.compile("|".join(map(translate, IGNORED)))

# Files that are looked at, and told, at a time.
BATCH = 1_000  # files
# What the journal and an offer can tell; other times are those of a broken clock.
MIN_TIME, MAX_TIME = -(2**63), 2**63 - 1  # nanoseconds since 1970
# What a look at a file says when the file is not there.
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})
# What a later look says again, until somebody acts; the next scan will do for that.
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.EXDEV, errno.ELOOP, errno.ENAMETOOLONG})
# Texts about what cannot be read; one broken tree must not fill the status.
MAX_PROBLEMS = 20  # texts


def is_ignored(path: str) -> bool:
    """Whether a path below a folder is nobody's file: ours, or a program's half-written one."""
    components = path.split("/")
    return components[0] == PRIVATE or any(map(_IGNORED.match, components))


def walk(
    root: Path, skipped: list[tuple[str, str]], tree: str = ""
) -> Iterator[list[tuple[str, Look]]]:
    """Walk a tree, never through a link.

    Args:
      root: The folder.
      skipped: Gets what cannot be sent: path and reason.
      tree: Only what lies below this path, if anything does.

    Yields:
      Regular files, at most `BATCH` at a time.

    Raises:
      OSError: The folder itself cannot be read.
    """
    batch: list[tuple[str, Look]] = []
    directories = [tree]
    while directories:
        directory = directories.pop()
        try:
            with open_directory(root, _steps(directory)) as fd, os.scandir(fd) as entries:
                for entry in entries:
                    path = f"{directory}/{entry.name}" if directory else entry.name
                    if is_ignored(path):
                        continue
                    if reason := unsendable(path):
                        _note(skipped, path, reason)
                    elif entry.is_dir(follow_symlinks=False):
                        directories.append(path)
                    elif entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            look = Look.of(entry.stat(follow_symlinks=False))
                            if _is_dated(look):
                                batch.append((path, look))
                            else:
                                _note(skipped, path, "its time is not between 1678 and 2262")
                    if len(batch) >= BATCH:
                        yield batch
                        batch = []
        except (FileNotFoundError, NotADirectoryError, DeclinedError):
            if not directory:
                raise
        except OSError as error:
            if not directory:
                raise
            _note(skipped, directory, error.strerror or str(error))
    if batch:
        yield batch


def _steps(directory: str) -> list[str]:
    return directory.split("/") if directory else []


def count_files(root: Path) -> int:
    """How many files there are that could be sent; raises `OSError` as `walk` does."""
    return sum(len(batch) for batch in walk(root, []))


def unsendable(path: str) -> str:
    """Why nothing under such a path can be sent, or empty."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "the name is no valid UTF-8"
    return ""


def _is_dated(look: Look) -> bool:
    return MIN_TIME <= look.mtime_ns <= MAX_TIME


def _note(skipped: list[tuple[str, str]], path: str, reason: str) -> None:
    if len(skipped) < MAX_PROBLEMS:
        skipped.append((path, reason))


def look_at(
    root: Path, paths: dict[str, bool], unseen: list[str]
) -> dict[str, tuple[Look | None, bool]]:
    """Look at files.

    Args:
      root: The folder.
      paths: Of the files, below it; with each whether it came by rename.
      unseen: Gets those that are worth another look soon: the disk fails, or descriptors are
        used up, which says nothing about whether they are there.

    Returns:
      What is there (None: no file that could be sent), and whether it is known to be whole;
      nothing for what cannot be told.
    """
    looks: dict[str, tuple[Look | None, bool]] = {}
    with _places(root) as place_of:
        for path, renamed in paths.items():
            if unsendable(path):
                continue
            try:
                directory, name = place_of(path)
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except DeclinedError:
                looks[path] = (None, False)
                continue
            except OSError as error:
                if error.errno in _GONE:
                    looks[path] = (None, False)
                elif error.errno not in _LASTING:
                    unseen.append(path)
                continue
            look = Look.of(status)
            if not stat.S_ISREG(status.st_mode) or not _is_dated(look):
                # A directory is walked, everything else is nobody's; the file that may have
                # been here before is gone.
                looks[path] = (None, False)
                continue
            # A write sets both times alike, a rename only the second. So this file has not been
            # written since it got its name; if nobody can write to it now either, it is whole.
            unwritten = look.ctime_ns != look.mtime_ns and renamed
            looks[path] = (look, unwritten and _nobody_writes(name, directory))
    return looks


@contextlib.contextmanager
def _places(root: Path) -> Iterator[Callable[[str], tuple[int, str]]]:
    """Yield what tells the descriptor of a path's directory, and the name there.

    The last directory stays open: paths that are looked at together mostly lie together.
    """
    with contextlib.ExitStack() as opened:
        last, fd = "", -1

        def place_of(path: str) -> tuple[int, str]:
            nonlocal last, fd
            directory, _, name = path.rpartition("/")
            if fd < 0 or directory != last:
                opened.close()
                fd = -1
                fd = opened.enter_context(open_directory(root, _steps(directory)))
                last = directory
            return fd, name

        yield place_of


def explain(error: OSError, root: Path) -> tuple[str, str]:
    """Say what is wrong with a folder, and what to do about it."""
    match error.errno:
        case errno.ENOSPC:
            return (
                "the kernel watches no more directories (fs.inotify.max_user_watches)",
                "run: sysctl fs.inotify.max_user_watches=1048576",
            )
        case errno.EMFILE:
            return (
                "the kernel gives no more inotify instances (fs.inotify.max_user_instances)",
                "run: sysctl fs.inotify.max_user_instances=1024",
            )
        case errno.ENOENT | errno.ENOTDIR | errno.ESTALE:
            return (
                f"{root} is gone or was replaced",
                "is its disk mounted? it is watched again as soon as it is back",
            )
        case _:
            return f"{root} cannot be read: {error.strerror}", "give syncd access to it"


def look_outside(path: Path) -> Look:
    """Look at one file that a person has named, and that may lie anywhere.

    Raises:
      NotFoundError: There is nothing.
      SyncdError: It cannot be sent, and why.
    """
    if reason := unsendable(str(path)):
        raise SyncdError(f"{str(path)!r} cannot be sent: {reason}", hint="rename it")
    try:
        # Not what a link leads to: who can change it could have us send any file. Opened, to
        # know that we may; O_NONBLOCK, or a FIFO would keep us for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _explain_outside(path, error) from error
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(status.st_mode):
        raise SyncdError(f"{path} is no regular file", hint="only files can be sent")
    look = Look.of(status)
    if not _is_dated(look):
        raise SyncdError(f"the time of {path} is not between 1678 and 2262", hint="touch it")
    return look


def _explain_outside(path: Path, error: OSError) -> SyncdError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NotFoundError(f"there is no file {path}")
        case errno.ELOOP:
            return SyncdError(
                f"{path} is a symbolic link, which syncd does not follow",
                hint="name the file that it leads to",
            )
        case errno.EACCES | errno.EPERM:
            return SyncdError(
                f"syncd may not read {path}", hint="give the user that runs syncd access to it"
            )
        case errno.ENXIO:  # a socket, or a device without a driver
            return SyncdError(f"{path} is no regular file", hint="only files can be sent")
        case _:
            return SyncdError(f"{path} cannot be read: {error.strerror}")


def missing(root: Path, paths: list[str]) -> list[str]:
    """Those that are no regular files; one that cannot be looked at now may well be."""
    gone = []
    with _places(root) as place_of:
        for path in paths:
            try:
                directory, name = place_of(path)
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                is_file = stat.S_ISREG(status.st_mode)
            except (FileNotFoundError, NotADirectoryError, DeclinedError):
                is_file = False
            except OSError:
                continue
            if not is_file:
                gone.append(path)
    return gone


def _nobody_writes(name: str, directory: int) -> bool:
    """Whether no process has the file open for writing, as far as the kernel tells us.

    A read lease (fcntl(2), F_SETLEASE) is granted only then. It needs a file of our own on a
    local file system; where it is refused for such reasons, the file rests like any other.
    Who opens the file for writing in the moment between waits until the lease is given back.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=directory)
    except OSError:
        return False
    try:
        # We are told of who waits by a signal: unless we choose it, SIGIO, which kills.
        # SIGURG does nothing by default.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)
