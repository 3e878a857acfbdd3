"""What has arrived of a file, until it is whole and lies under its final name.

A partial file lives in the private directory at the root of its folder, so on the same file
system as its final place. Its size is the offset to go on from, stored nowhere else: blocks
are reserved without growing it. Its name says whose version of which file it is, so a
changed file never continues an old beginning.

The order that makes a receipt a promise: all bytes in, length and hash right, `seal` (mode and
time set, fsync of the file), the journal knows the coming file, `publish` (rename without
replacing, fsync of the directory), receipt. Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

import blake3

from syncd.disk.beneath import exchange, explain, open_directory, rename_new, reserve
from syncd.disk.paths import MAX_COMPONENT, PRIVATE
from syncd.errors import TransferError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Names that a conflict may try before something is plainly wrong.
_MAX_CONFLICTS = 1_000  # names
# A local part of a JID may fill four file names; who it was can still be told by this.
_MAX_WHO = 64  # bytes
# What is longer is a dot somewhere in a name.
_MAX_EXTENSION = 32  # bytes
# Hashing an existing file: large enough to be fast, small enough for the cache.
_CHUNK = 1_048_576  # bytes


@dataclass(frozen=True, slots=True)
class Identity:
    """A file on disk as it was at one moment; another version differs in one of these.

    Attributes:
      size: Bytes.
      mtime_ns: Time of the last change, nanoseconds since 1970.
      inode: Number of the inode.
    """

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Take it from a stat."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Action(enum.Enum):
    """How a file comes to its final name."""

    NEW = enum.auto()  # nothing is there
    REPLACE = enum.auto()  # the version that the sender itself put there, untouched since
    SAME = enum.auto()  # the same content is there already
    CONFLICT = enum.auto()  # something else is there: keep both


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is to go.

    Attributes:
      action: How.
      components: The final path below the folder.
      existing: What stands there, if anything.
    """

    action: Action
    components: tuple[str, ...]
    existing: Identity | None = None


def key_of(sender: str, folder: str, path: str, size: int, mtime_ns: int) -> str:
    """Name the partial file of one version of one file from one sender.

    Returns:
      A file name; its first half is the same for all versions of the file.
    """
    who = hashlib.sha256(f"{sender}\0{folder}\0{path}".encode()).hexdigest()[:24]
    what = hashlib.sha256(f"{size}\0{mtime_ns}".encode()).hexdigest()[:24]
    return f"{who}-{what}.part"


class PartialFile:
    """One file on its way in.

    Args:
      root: The folder.
      key: From `key_of`, or any other name for a file that nobody resumes.
      size: Its whole length, bytes.

    Attributes:
      fd: Descriptor for the pump to write to.
      offset: What has arrived before, bytes.

    Raises:
      TransferError: The disk refuses, or is full.
    """

    def __init__(self, root: Path, key: str, size: int) -> None:
        self.root = root
        self._key = key
        self._size = size
        self._gone = False
        with _explained("the file cannot be received"), _private(root) as directory:
            self._forget_other_versions(directory)
            self.fd = os.open(
                key,
                os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
                dir_fd=directory,
            )
            try:
                self.offset = _usable_length(self.fd, size)
                reserve(self.fd, size)
            except BaseException:
                if os.fstat(self.fd).st_size == 0:  # nothing in it to go on from
                    os.unlink(key, dir_fd=directory)
                self.close()
                raise

    def restart(self) -> None:
        """Forget what has arrived; for a sender that cannot begin in the middle."""
        with _explained("the file cannot be received"):
            os.ftruncate(self.fd, 0)
            self.offset = 0

    def close(self) -> None:
        """Let go of the file; what has arrived stays for the next attempt."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def discard(self) -> None:
        """Delete what has arrived: it is of no use to anybody."""
        if not self._gone:
            self._gone = True
            with (
                _explained("the partial file cannot be deleted"),
                _private(self.root) as private,
                contextlib.suppress(FileNotFoundError),
            ):
                os.unlink(self._key, dir_fd=private)

    def seal(self, mtime_ns: int | None) -> Identity:
        """Make the bytes durable, with their final mode and time.

        Args:
          mtime_ns: The sender's time of the last change, if it told.

        Returns:
          What the file will be under its final name.

        Raises:
          TransferError: The disk could not keep the bytes; nothing may be promised.
        """
        with _explained("the file cannot be stored"):
            os.fchmod(self.fd, 0o666 & ~_UMASK)
            if mtime_ns is not None:
                os.utime(self.fd, ns=(mtime_ns, mtime_ns))
            os.fsync(self.fd)
            return Identity.of(os.fstat(self.fd))

    def choose_place(
        self,
        components: tuple[str, ...],
        known: Identity | None,
        digest: bytes | None,
        who: str,
    ) -> Place:
        """Decide where the file goes; look again after a `FileExistsError` of `publish`.

        Args:
          components: Path below the folder, checked.
          known: The version that this sender put there last, if any.
          digest: BLAKE3 of the file that is to go there; None if it is not known.
          who: The sender, for the name of a conflict.

        Raises:
          TransferError: The disk refuses.
        """
        with (
            _explained("the file cannot be stored"),
            open_directory(self.root, components[:-1], create=True) as directory,
        ):
            existing = _look(components[-1], directory)
            if existing is None:
                return Place(Action.NEW, components)
            same_size = digest is not None and existing.size == self._size
            if same_size and _digest(components[-1], directory) == digest:
                return Place(Action.SAME, components, existing)
            if known is not None and existing == known:
                return Place(Action.REPLACE, components, existing)
            name = _conflict_name(components[-1], who, directory)
            return Place(Action.CONFLICT, (*components[:-1], name), existing)

    def publish(self, place: Place) -> None:
        """Give the file its final name, durably, without ever losing what stood there.

        Raises:
          FileExistsError: Somebody was faster; choose the place anew.
          TransferError: The disk refuses.
        """
        try:
            with (
                _private(self.root) as private,
                open_directory(self.root, place.components[:-1], create=True) as directory,
            ):
                name = place.components[-1]
                if place.action is Action.REPLACE:
                    self._replace(place, private, directory)
                else:
                    rename_new(self._key, private, name, directory)
                self._gone = True
                os.fsync(directory)
        except FileExistsError:
            raise
        except OSError as error:
            raise explain(error, "the file cannot be stored") from error

    def _replace(self, place: Place, private: int, directory: int) -> None:
        name = place.components[-1]
        try:
            exchange(self._key, private, name, directory)
        except FileNotFoundError:
            # Deleted meanwhile: then it is a new file.
            rename_new(self._key, private, name, directory)
            return
        taken = _look(self._key, private)
        if taken == place.existing:
            os.unlink(self._key, dir_fd=private)
        elif taken is not None:
            # Changed in the last instant. It is not ours to drop: keep it beside the new.
            self._keep_aside(name, private, directory)

    def _keep_aside(self, name: str, private: int, directory: int) -> None:
        while True:
            aside = _conflict_name(name, "local", directory)
            # Not for the caller to try again: our file lies at its place already.
            with contextlib.suppress(FileExistsError):
                rename_new(self._key, private, aside, directory)
                return

    def _forget_other_versions(self, directory: int) -> None:
        who, dash, _ = self._key.partition("-")
        if not dash:
            return
        for name in os.listdir(directory):
            if name.startswith(f"{who}-") and name != self._key:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)


def _usable_length(fd: int, size: int) -> int:
    """How much of a partial file can be gone on from; the rest is cut off."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise TransferError(f"what stands in {PRIVATE} for this file is no plain file")
    if status.st_size > size:
        os.ftruncate(fd, 0)
        return 0
    return status.st_size


def identity_of(root: Path, components: Sequence[str]) -> Identity | None:
    """Look at a regular file below a folder; None if there is none."""
    try:
        with open_directory(root, components[:-1]) as directory:
            return _look(components[-1], directory)
    except OSError:
        return None


def _look(name: str, directory: int) -> Identity | None:
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(status.st_mode):
        return Identity.of(status)
    # A directory, a link, a device: never the same as any file, and never replaced.
    return Identity(-1, -1, status.st_ino)


def _digest(name: str, directory: int) -> bytes:
    hasher = blake3.blake3()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=directory), "rb", buffering=0) as file:  # noqa: PTH123 - by descriptor
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.digest()


def _conflict_name(name: str, who: str, directory: int) -> str:
    """Find a free name that still says what the file is, and that keeps its extension."""
    stem, dot, extension = name.rpartition(".")
    if not stem or len(os.fsencode(extension)) > _MAX_EXTENSION:
        stem, dot, extension = name, "", ""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for number in range(1, _MAX_CONFLICTS):
        count = f"-{number}" if number > 1 else ""
        mark = f".conflict-{_cut(who, _MAX_WHO)}-{stamp}{count}"
        tail = mark + dot + extension
        short = _cut(stem, MAX_COMPONENT - len(os.fsencode(tail)))
        if _look(short + tail, directory) is None:
            return short + tail
    raise TransferError(f"there are {_MAX_CONFLICTS} conflicts of {name} already")


def _cut(text: str, size: int) -> str:
    return os.fsencode(text)[:size].decode(errors="ignore")


@contextlib.contextmanager
def _private(root: Path) -> Iterator[int]:
    with open_directory(root, ()) as folder, contextlib.suppress(FileExistsError):
        os.mkdir(PRIVATE, 0o700, dir_fd=folder)
    with open_directory(root, (PRIVATE,)) as directory:
        yield directory


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain(error, what) from error


def _read_umask() -> int:
    """The umask, without the race of setting it to read it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077


_UMASK = _read_umask()
