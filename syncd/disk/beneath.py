"""Files below a folder, reached by directory descriptors, never through a link.

Every step of a path is opened relative to the step before it with O_NOFOLLOW, so whoever
swaps a directory for a link meanwhile gains nothing: the walk ends with an error. Nor does it
leave the file system of the folder: what is mounted inside is not the folder's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shlex
import stat
from typing import TYPE_CHECKING

import blake3

from syncd.disk.paths import PRIVATE, fold
from syncd.errors import ChangedError, DeclinedError, ErrorType, TransferError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# Hashing a file: large enough to be fast, small enough for the cache.
_CHUNK = 1 << 20  # bytes

_libc = ctypes.CDLL(None, use_errno=True)
# renameat2(2)
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
# fallocate(2): reserve the blocks, but let the size say how much has arrived.
_FALLOC_FL_KEEP_SIZE = 1
# sync_file_range(2): begin to write, and wait for nothing.
_SYNC_FILE_RANGE_WRITE = 2


@contextlib.contextmanager
def open_directory(
    root: Path, components: Sequence[str], *, create: bool = False
) -> Iterator[int]:
    """Walk down from a folder and yield the descriptor of a directory.

    Args:
      root: The folder, as configured; may itself be a link.
      components: Names of directories below it.
      create: Make those that are missing, durably.

    Raises:
      OSError: A step is missing, is a link, is no directory, or is on another file system.
      DeclinedError: It leads into our private directory by another name.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        device = os.fstat(fd).st_dev
        private = _inode_of_private(fd) if components else None
        for component in components:
            fd, parent = _step(fd, component, create=create), fd
            os.close(parent)
            status = os.fstat(fd)
            # Of directories only: an overlay tells of a file the device of its layer.
            if status.st_dev != device:
                raise OSError(errno.EXDEV, "another file system is mounted here", component)
            if status.st_ino == private and component != PRIVATE:
                raise DeclinedError(f"{component!r} is syncd's own directory")
        yield fd
    finally:
        os.close(fd)


def _inode_of_private(root: int) -> int | None:
    """To know it as .SYNCD too, or as SYNCD~1, where the file system takes these for it."""
    with contextlib.suppress(OSError):
        return os.stat(PRIVATE, dir_fd=root, follow_symlinks=False).st_ino
    return None


def _step(parent: int, component: str, *, create: bool) -> int:
    _check_step(component)
    if create:
        try:
            os.mkdir(component, dir_fd=parent)
        except FileExistsError:
            pass
        else:
            os.fsync(parent)
    return os.open(component, _DIRECTORY, dir_fd=parent)


def _check_step(component: str) -> None:
    """Refuse what the kernel would take for more than one step down, or for none.

    Names from the network were judged long before (`paths`); this holds wherever else one may
    come from.
    """
    if component in ("", ".", "..") or "/" in component:
        raise OSError(errno.EINVAL, "this is no name of a file", component)


@contextlib.contextmanager
def open_parent(
    root: Path, components: Sequence[str], *, create: bool = False
) -> Iterator[tuple[int, str]]:
    """Walk down from a folder to where a file lies, or is to lie.

    Args:
      root: The folder, as configured; may itself be a link.
      components: The path of the file below it.
      create: Make the directories that are missing, durably.

    Yields:
      The descriptor of its directory, and its name there.

    Raises:
      OSError, DeclinedError: As for `open_directory`.
    """
    *directories, name = components
    _check_step(name)
    with open_directory(root, directories, create=create) as directory:
        yield directory, name


@contextlib.contextmanager
def open_private(root: Path, *, create: bool = True) -> Iterator[int]:
    """Open the private directory of a folder, which nobody else can change.

    Whoever could would put other bytes in the place of those that were checked.

    Args:
      root: The folder.
      create: Make it if it is missing.

    Yields:
      Its descriptor.

    Raises:
      TransferError: What stands there is not ours alone.
      OSError: It is missing, or the disk refuses.
    """
    with open_directory(root, ()) as folder:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(PRIVATE, 0o700, dir_fd=folder)
        try:
            fd = os.open(PRIVATE, _DIRECTORY, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise TransferError(
                f"{PRIVATE} in the folder is a link or a file, not syncd's own directory",
                hint=f"move {root / PRIVATE} out of the way; syncd makes a new one",
            ) from error
        try:
            _check_private(os.fstat(fd), os.fstat(folder), root / PRIVATE)
            yield fd
        finally:
            os.close(fd)


# The messages are told to peers whose files are refused, and so name no place of this machine;
# the hints are for our own user.
def _check_private(status: os.stat_result, folder: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid():
        raise TransferError(
            f"{PRIVATE} in the folder belongs to another user (uid {status.st_uid})",
            hint=f"move {path} out of the way, or give it to the user that runs syncd",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TransferError(
            f"others may write to {PRIVATE} in the folder, which is syncd's own directory",
            hint=f"run: chmod 700 {shlex.quote(str(path))}",
        )
    if status.st_dev != folder.st_dev:
        raise TransferError(
            f"{PRIVATE} in the folder is on another file system than its folder",
            hint="a file gets its name in one step only on the same one: "
            f"unmount what is at {path}",
        )


def check_twins(root: Path, components: Sequence[str]) -> None:
    """Make sure that a file can be told from all others by any system.

    Reads every directory on the way in which the step itself is missing.

    Args:
      root: The folder.
      components: A path below it, of which nothing needs to exist.

    Raises:
      DeclinedError: Only case or normalisation tells a step of it from what is there.
      TransferError: The disk refuses.
    """
    for depth, component in enumerate(components):
        try:
            with open_directory(root, components[:depth]) as directory:
                names = _others(component, directory)
        except FileNotFoundError:
            return  # nothing below it either
        except OSError as error:
            raise explain(error, "the file cannot be received") from error
        folded = fold(component)
        for name in names:
            if fold(name) == folded:
                # Whose it is, how it is written: its sender may not even know of that file.
                raise DeclinedError(
                    f"{component!r} is the same name on many systems as one that is there",
                    hint=f"{name!r} is there; when one of the two is renamed, it comes",
                )


def count_new(root: Path, components: Sequence[str]) -> int:
    """Count what has to be made so that a file can come: it, and directories on its way.

    Args:
      root: The folder.
      components: The path of the file below it.

    Raises:
      TransferError: The disk refuses.
    """
    *directories, _ = components
    for depth in range(len(directories), 0, -1):
        try:
            with open_directory(root, directories[:depth]):
                return len(directories) - depth + 1
        except FileNotFoundError:
            continue
        except OSError as error:
            raise explain(error, "the file cannot be received") from error
    return len(directories) + 1


def _others(name: str, directory: int) -> list[str]:
    """What lies in a directory, if this does not."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return os.listdir(directory)
    return []


def open_source(root: Path, components: Sequence[str]) -> int:
    """Open a regular file for sending.

    Returns:
      Its descriptor, which the caller closes.

    Raises:
      ChangedError: It is gone, or no regular file any more.
      TransferError: It cannot be read.
    """
    try:
        with open_parent(root, components) as (directory, name):
            # O_NONBLOCK: opening a fifo must not wait for its writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise ChangedError(f"the file is gone: {error.strerror}") from error
        raise explain(error, "the file cannot be read") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ChangedError("this is no regular file any more")
    return fd


def hash_file(name: str, directory: int, size: int) -> bytes:
    """BLAKE3 of a file, 32 bytes.

    Args:
      name: Of the file, in its directory.
      directory: Descriptor of that.
      size: How long it should be, bytes; one that grows all the time is not read for ever.

    Raises:
      OSError: It is missing, is a link, or cannot be read.
    """
    hasher = blake3.blake3()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=directory), "rb", buffering=0) as file:  # noqa: PTH123 - by descriptor
        while size >= 0 and (chunk := file.read(_CHUNK)):
            hasher.update(chunk)
            size -= len(chunk)
    return hasher.digest()


def rename_new(source: str, source_fd: int, target: str, target_fd: int) -> None:
    """Rename without ever replacing.

    Raises:
      FileExistsError: The target is there.
      OSError: Anything else.
    """
    try:
        _renameat2(source_fd, source, target_fd, target, _RENAME_NOREPLACE)
    except OSError as error:
        # EINVAL: a file system without the flag; ENOSYS: a kernel without the call.
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        # Else a link would become a second name of what it leads to.
        os.link(
            source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd, follow_symlinks=False
        )
        os.unlink(source, dir_fd=source_fd)


def exchange(source: str, source_fd: int, target: str, target_fd: int) -> None:
    """Swap two files in one step: whatever stood at the target is now at the source.

    Raises:
      OSError: One of them is missing, or the file system cannot do it.
    """
    _renameat2(source_fd, source, target_fd, target, _RENAME_EXCHANGE)


def _renameat2(source_fd: int, source: str, target_fd: int, target: str, flags: int) -> None:
    result = _libc.renameat2(
        source_fd, os.fsencode(source), target_fd, os.fsencode(target), flags
    )
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def reserve(fd: int, size: int) -> None:
    """Reserve the blocks for a file, so that a full disk is found before the transfer.

    Raises:
      OSError: There is no room (ENOSPC, EDQUOT), or the file would be too large (EFBIG).
    """
    if size == 0:
        return
    arguments = (ctypes.c_int64(0), ctypes.c_int64(size))
    if _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, *arguments) != 0:
        code = ctypes.get_errno()
        # EOPNOTSUPP: the file system cannot; a full disk is then met by the write.
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR):
            raise OSError(code, os.strerror(code))


def start_writing(fd: int, offset: int, count: int) -> None:
    """Let the kernel begin to bring a part of a file to the disk; promises nothing.

    Args:
      fd: The file.
      offset: Where the part begins, bytes.
      count: How long it is, bytes; 0: to the end of the file.
    """
    # A failure is told by the write or the fsync that follows.
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(count))
    _libc.sync_file_range(fd, *arguments, _SYNC_FILE_RANGE_WRITE)


def explain(error: OSError, what: str) -> TransferError:
    """Turn an error of the disk into what the user reads."""
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return TransferError(f"{what}: {reason}", hint="make room; it goes on by itself")
        case errno.EROFS | errno.EIO:
            return TransferError(f"{what}: {reason}", hint="look at the disk and its mount")
        case errno.EACCES | errno.EPERM:
            return TransferError(
                f"{what}: {reason}", hint="give the user that runs syncd access to it"
            )
        case errno.EFBIG:
            return TransferError(
                f"{what}: {reason}",
                hint="the file system, or a limit (LimitFSIZE=), does not allow files this big",
                type=ErrorType.CANCEL,
            )
        case errno.EXDEV:
            return TransferError(
                f"{what}: another file system is mounted inside the folder",
                hint="make the mount point a folder of its own",
                type=ErrorType.CANCEL,
            )
        case errno.ENOTDIR | errno.ELOOP | errno.EISDIR:
            return TransferError(
                f"{what}: a file or link stands where a directory is needed, or the reverse",
                hint="move it out of the way",
                type=ErrorType.CANCEL,
            )
        case _:
            return TransferError(f"{what}: {reason}")
