"""What has arrived of a file, until it is whole and lies under its final name.

A partial file lives in the private directory at the root of its folder, so on the same file
system as its final place. Its name says whose version of which file it is, so a changed file
never continues an old beginning; the digests beside it (see `blocks`) prove how much of it is
to go on from. Blocks are reserved without growing it.

The order that makes a receipt a promise: all bytes in, length and hash right, `seal` (mode and
time set, fsync of the file), the journal knows the coming file, `publish` (rename without
replacing, fsync of the directory), receipt. Everything here blocks, `PartialFile.close` too:
call it in a thread.

What a crash leaves in the private directory, `clean` finds at the next start by its name::

    WHO-WHAT.part                  kept for the next offer of this version of the file
    RANDOM.part                    nobody resumes it
    *.part.blocks                  digests; of no use without their file
    *.bad                          damaged, see `PartialFile.quarantine`
    *.part.swap.NEW.SIZE.TIME.OLD  the file, or what it replaces: see `PartialFile._replace`
    *.part.aside.OLD               what it replaces, where files cannot be exchanged
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from syncd.disk import room
from syncd.disk.beneath import (
    exchange,
    explain,
    hash_file,
    open_directory,
    open_parent,
    open_private,
    rename_new,
    reserve,
)
from syncd.disk.blocks import Blocks, open_notes
from syncd.disk.paths import MAX_COMPONENT, PRIVATE, fold, without_special
from syncd.disk.room import BAD, NOTES, PART
from syncd.errors import TransferError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Names of one second that a conflict may try before something is plainly wrong.
_MAX_CONFLICTS = 100_000  # names
# A local part of a JID may fill four file names; who it was can still be told by this.
_MAX_WHO = 64  # bytes
# What is longer is a dot somewhere in a name.
_MAX_EXTENSION = 32  # bytes
# How much of a partial file's name tells whose it is, and how much whose version of which file.
# 48 bits: two peers that share them share the room for what they have begun, nothing more.
_PEER = 12  # hexadecimal digits
_FILE = 24  # hexadecimal digits

# Names in the private directory, see above.
_SWAP = ".swap."
_ASIDE = ".aside."
_SWAPPED = re.compile(
    r"(?P<key>.+\.part)\.swap\.(?P<new>[0-9]+)"
    r"\.(?P<size>-?[0-9]+)\.(?P<mtime>-?[0-9]+)\.(?P<old>[0-9]+)"
)
# What a file is called whose place nobody knows any more.
_RECOVERED = "recovered"

# RENAME_EXCHANGE: the file system, FUSE's daemon, the kernel cannot.
_CANNOT_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


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
      A file name; it begins alike for all files of the sender, and up to the dash for all
      versions of the file.
    """
    peer = hashlib.sha256(sender.encode()).hexdigest()[:_PEER]
    file = hashlib.sha256(f"{sender}\0{folder}\0{path}".encode()).hexdigest()[:_FILE]
    what = hashlib.sha256(f"{size}\0{mtime_ns}".encode()).hexdigest()[:_FILE]
    return f"{peer}{file}-{what}{PART}"


def claim(root: Path, key: str, size: int) -> int:
    """Look up how much of a file has come before, and make nothing yet.

    Args:
      root: The folder.
      key: As for `PartialFile`.
      size: The file's whole length, bytes.

    Returns:
      What the `PartialFile` will have as its offset, unless somebody deletes it before.

    Raises:
      TransferError: The disk refuses.
    """
    if not _is_resumable(key):
        return 0
    with _explained("the file cannot be received"):
        try:
            with open_private(root, create=False) as private:
                status = os.stat(key, dir_fd=private, follow_symlinks=False)
        except FileNotFoundError:
            return 0
        if status.st_size > size:
            return 0
        notes = functools.partial(_open_notes, root, key)
        return Blocks(-1, size, notes).claim(status.st_size)


class PartialFile:
    """One file on its way in.

    Args:
      root: The folder.
      key: From `key_of`, or any other name, without a dash, for a file that nobody resumes.
      size: Its whole length, bytes.

    Attributes:
      fd: Descriptor for the pump to write to.
      offset: Where to go on, bytes; until `prove` it is only claimed, but hardly ever wrong.
      blocks: Hashes what is there and what comes; for the pump, after `prove` or `restart`.

    Raises:
      TransferError: The disk refuses, or is full.
    """

    def __init__(self, root: Path, key: str, size: int) -> None:
        self.root = root
        self._key = key
        self._size = size
        self._gone = self._alone = False
        self._name, self._placing = key, False
        self._claimed = self.offset = 0
        with _explained("the file cannot be received"), open_private(root) as directory:
            self.fd = self._open(directory)
            self.blocks = self._new_blocks()
            try:
                self._alone = room.occupy(self.fd)
                # All of it may be right, until its notes have been read.
                self._claimed = _usable_length(self.fd, size)
                self.offset = self._claimed = self.blocks.claim(self._claimed)
                room.take(self.fd, size, directory, key)
            except BaseException:
                self.close()
                raise

    def prove(self, stopped: Callable[[], bool] = bool) -> int:
        """Find out how much of the file can be gone on from, and cut the rest off.

        Reads all of that: `blocks` has taken it in afterwards.

        Args:
          stopped: Asked now and then; once it is true nothing is cut, and the result is void.

        Returns:
          The new `offset`.

        Raises:
          TransferError: The disk refuses, or is full.
        """
        with _explained("the file cannot be received"):
            length = os.fstat(self.fd).st_size
            proved = self.blocks.prove(length, stopped)
            if not stopped():
                self._claimed = 0
                if proved < length:
                    os.ftruncate(self.fd, proved)
                    reserve(self.fd, self._size)  # cutting gave the room behind the end back
            self.offset = proved
        return proved

    def restart(self, keep: int = 0) -> None:
        """Forget what has arrived; for a sender that cannot begin in the middle.

        Args:
          keep: How many bytes at the beginning are right all the same; few, they are read.
        """
        with _explained("the file cannot be received"):
            kept = os.pread(self.fd, keep, 0)
            assert len(kept) == keep
            self._claimed = 0
            os.ftruncate(self.fd, keep)
            reserve(self.fd, self._size)
            self.blocks.forget()
            self.blocks = self._new_blocks()
            self.blocks.update(memoryview(kept))
            self.offset = keep

    def close(self) -> None:
        """Let go of the file; what has arrived stays, and proved, for the next attempt.

        What was only reserved is given back. Of a file in which nothing can be proved, nothing
        stays.
        """
        if self.fd >= 0:
            try:
                unfinished = self._is_unfinished()
                if unfinished:
                    self.blocks.close()
                else:
                    self.blocks.forget()  # a last note may cut the file on a full disk
                # Else the next transfer of this file might be writing to it.
                if self._alone and not self._gone:
                    self._leave(unfinished)
            finally:
                fd, self.fd = self.fd, -1
                # What NFS says here is too late: what counts was synced by `seal`.
                with contextlib.suppress(OSError):
                    os.close(fd)

    def _is_unfinished(self) -> bool:
        """Whether it surely has not got its final name, as it may although `publish` failed.

        What has it is not ours to write to any more: that would be a change in the folder.
        """
        if self._gone:
            return False
        with contextlib.suppress(OSError, TransferError):
            status = os.fstat(self.fd)
            if status.st_nlink != 1 or not self._placing:
                return status.st_nlink == 1
            with open_private(self.root, create=False) as private:
                return _inode(self._name, private) == status.st_ino
        return False

    def _leave(self, unfinished: bool) -> None:
        # What the disk refuses here, it gives at the next start (see `clean`).
        with contextlib.suppress(OSError, TransferError):
            kept = unfinished and room.give_back(self.fd)
            if kept and (self._claimed or self.blocks.noted):
                return
            with open_private(self.root, create=False) as private:
                if _inode(self._key, private) == os.fstat(self.fd).st_ino:
                    room.delete(self._key, private)

    def discard(self) -> None:
        """Delete what has arrived: it is of no use to anybody."""
        if not self._gone:
            self._gone = True
            self.blocks.forget()
            with (
                _explained("the partial file cannot be deleted"),
                open_private(self.root) as private,
            ):
                room.delete(self._key, private)

    def quarantine(self) -> str:
        """Put aside what is not what was sent: somebody may want to know what it is.

        Returns:
          Its path below the folder. It is kept until the room is needed, `room.MAX_BAD` newer
          ones have come, or `room.MAX_AGE` is over.

        Raises:
          TransferError: The disk refuses.
        """
        bad = self._key.removesuffix(PART) + BAD
        with (
            _explained("the damaged file cannot be put aside"),
            open_private(self.root) as private,
        ):
            if self._alone:
                room.give_back(self.fd)
            os.rename(self._key, bad, src_dir_fd=private, dst_dir_fd=private)
            self._gone = True
            self.blocks.forget()
            _unlink(self._key + NOTES, private)
            room.keep_newest(private, room.MAX_BAD, ends=BAD)
        return f"{PRIVATE}/{bad}"

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
            open_parent(self.root, components, create=True) as (directory, name),
        ):
            existing = _look(name, directory)
            if existing is None:
                return Place(Action.NEW, components)
            same_size = digest is not None and existing.size == self._size
            if same_size and hash_file(name, directory, self._size) == digest:
                return Place(Action.SAME, components, existing)
            if known is not None and existing == known:
                return Place(Action.REPLACE, components, existing)
            aside = _conflict_name(name, who, directory)
            return Place(Action.CONFLICT, (*components[:-1], aside), existing)

    def publish(self, place: Place) -> None:
        """Give the file its final name, durably, without ever losing what stood there.

        Raises:
          FileExistsError: Somebody was faster; choose the place anew.
          TransferError: The disk refuses.
        """
        self._placing = True
        try:
            with (
                open_private(self.root) as private,
                open_parent(self.root, place.components, create=True) as (directory, name),
            ):
                if place.action is Action.REPLACE:
                    self._replace(place, private, directory)
                else:
                    rename_new(self._key, private, name, directory)
                self._gone = True
                os.fsync(directory)
                self.blocks.forget()
                with contextlib.suppress(OSError):  # `clean` finds it; the file has its name
                    _unlink(self._key + NOTES, private)
        except FileExistsError:
            raise
        except OSError as error:
            raise explain(error, "the file cannot be stored") from error

    def _replace(self, place: Place, private: int, directory: int) -> None:
        """Put the file in the place of an older version, unless that has just changed.

        Meanwhile it has a name that tells what is what: who finds it after a crash, sees by
        the inode whether the two have been exchanged already (see `clean`).
        """
        name, old = place.components[-1], place.existing
        assert old is not None
        new = os.fstat(self.fd).st_ino
        swap = f"{self._key}{_SWAP}{new}.{old.size}.{old.mtime_ns}.{old.inode}"
        # Never onto another file, although there is none: what cannot do that fails here.
        rename_new(self._key, private, swap, private)
        self._name = swap
        try:
            self._swap(swap, name, old, private, directory)
        except OSError:
            # Not exchanged: it goes on being a partial file.
            with contextlib.suppress(OSError):
                if _inode(swap, private) == new:
                    rename_new(swap, private, self._key, private)
                    self._name = self._key
            raise
        taken = _look(swap, private)
        if taken == old:
            _unlink(swap, private)
        elif taken is not None:
            # Changed in the last instant. It is not ours to drop: keep it beside the new.
            _keep_aside(swap, private, name, directory)

    def _swap(self, swap: str, name: str, old: Identity, private: int, directory: int) -> None:
        try:
            try:
                exchange(swap, private, name, directory)
            except OSError as error:
                if error.errno not in _CANNOT_EXCHANGE:
                    raise
                aside = f"{self._key}{_ASIDE}{old.inode}"
                _swap_in_steps(swap, aside, name, old, private, directory)
        except FileNotFoundError:
            # Deleted meanwhile: then it is a new file.
            rename_new(swap, private, name, directory)

    def _new_blocks(self) -> Blocks:
        opener = functools.partial(_open_notes, self.root, self._key)
        return Blocks(self.fd, self._size, opener if _is_resumable(self._key) else None)

    def _open(self, directory: int) -> int:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if _is_resumable(self._key):
            with contextlib.suppress(FileNotFoundError):
                return os.open(self._key, flags, dir_fd=directory)
            self._forget_others(directory)
        return os.open(self._key, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)

    def _forget_others(self, directory: int) -> None:
        """Drop other versions of the file; and other files, if their sender has too many.

        Not what is arriving now: of several machines of one account, each may have its version.
        """
        who = self._key.partition("-")[0]
        for name in os.listdir(directory):
            # What was on its way out of the folder may be somebody's: `clean` looks at it.
            if name.startswith(f"{who}-") and name.endswith(PART):
                room.delete_unused(name, directory, locks=False)
        # So that the directory stays as short as it has to be to be listed at a new file.
        room.keep_newest(directory, room.MAX_PARTS - 1, begins=who[:_PEER], ends=PART)


def _is_resumable(key: str) -> bool:
    return "-" in key


def _open_notes(root: Path, key: str, create: bool) -> int:
    try:
        with open_private(root) as private:
            return open_notes(key + NOTES, private, create=create)
    except TransferError as error:
        # To do without notes is all that a disk may cost; this one is no worse.
        raise OSError(errno.EPERM, str(error)) from error


def _swap_in_steps(
    swap: str, aside: str, name: str, old: Identity, private: int, directory: int
) -> None:
    """Replace a version where files cannot be exchanged: on NFS, and on many a FUSE.

    The old one is moved, not deleted, and looked at only then: whatever it is, it is not
    lost. For an instant there is neither; `clean` keeps the old one if that is the last.

    Raises:
      FileExistsError: Something else stood there, and does so again.
      OSError: It failed; the old one is back.
    """
    os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=private)
    try:
        if _look(aside, private) != old:
            raise FileExistsError(errno.EEXIST, "changed in the last instant", name)
        rename_new(swap, private, name, directory)
    except OSError:
        try:
            rename_new(aside, private, name, directory)
        except FileExistsError:
            _keep_aside(aside, private, name, directory)
        raise
    _unlink(aside, private)


def _keep_aside(source: str, private: int, name: str, directory: int) -> str:
    """Give a file the name of a conflict."""
    while True:
        aside = _conflict_name(name, "local", directory)
        # Not for the caller to try again: our file lies at its place already.
        with contextlib.suppress(FileExistsError):
            rename_new(source, private, aside, directory)
            return aside


def clean(root: Path, now: float) -> list[str]:
    """Clear up what a crash has left; at the start, before the first transfer.

    Only in the private directory, and nothing that another process has open as a partial file.

    Args:
      root: The folder.
      now: Seconds since 1970.

    Returns:
      The names, at the top of the folder, that files have got which were found to be neither
      ours nor anywhere else.

    Raises:
      TransferError: The disk refuses.
    """
    with (
        _explained("what a crash left in the folder cannot be cleared up"),
        open_directory(root, ()) as folder,
    ):
        try:
            with open_private(root, create=False) as private:
                return _clean(private, folder, now)
        except FileNotFoundError:
            return []


def expire(root: Path, now: float) -> None:
    """Delete what nobody has gone on with for `room.MAX_AGE`; also while transfers run.

    Args:
      root: The folder.
      now: Seconds since 1970.

    Raises:
      TransferError: The disk refuses.
    """
    with (
        _explained("what is unfinished in the folder cannot be cleared up"),
        contextlib.suppress(FileNotFoundError),
        open_private(root, create=False) as private,
    ):
        room.expire(private, now)


def _clean(private: int, folder: int, now: float) -> list[str]:
    found: list[str] = []
    for name in sorted(os.listdir(private)):
        if swap := _SWAPPED.fullmatch(name):
            if not _finish_swap(swap, private):
                found.append(_keep_aside(name, private, _RECOVERED, folder))
        elif _ASIDE in name:
            found.append(_keep_aside(name, private, _RECOVERED, folder))
        elif name.endswith((PART, BAD)):
            room.trim(name, private)
    room.expire(private, now)
    for name in os.listdir(private):
        if name.endswith(NOTES) and _look(name.removesuffix(NOTES), private) is None:
            _unlink(name, private)
    return found


def _finish_swap(swap: re.Match[str], private: int) -> bool:
    """Do what a crash kept `_replace` from; False if it was a last-minute change."""
    name, key = swap[0], swap["key"]
    status = os.stat(name, dir_fd=private, follow_symlinks=False)
    old = Identity(int(swap["size"]), int(swap["mtime"]), int(swap["old"]))
    if status.st_ino == int(swap["new"]):
        # Not exchanged yet: whole, and proved when it is offered again.
        with contextlib.suppress(FileExistsError):
            rename_new(name, private, key, private)
            return True
    elif _look(name, private) != old:
        return False
    os.unlink(name, dir_fd=private)
    return True


def _unlink(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _inode(name: str, directory: int) -> int:
    return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino


def _usable_length(fd: int, size: int) -> int:
    """How much of a partial file can be gone on from; the rest is cut off."""
    status = os.fstat(fd)
    if not status.st_nlink:  # between its opening and our lock
        raise TransferError("what had come of the file was cleared up at this moment")
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise TransferError(f"what stands in {PRIVATE} for this file is no plain file")
    if status.st_size > size:
        os.ftruncate(fd, 0)
        return 0
    return status.st_size


def identity_of(root: Path, components: Sequence[str]) -> Identity | None:
    """Look at a regular file below a folder; None if there is none."""
    try:
        with open_parent(root, components) as (directory, name):
            return _look(name, directory)
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


def _conflict_name(name: str, who: str, directory: int) -> str:
    """Find a free name that still says what the file is, and that keeps its extension."""
    stem, dot, extension = name.rpartition(".")
    if not stem or len(os.fsencode(extension)) > _MAX_EXTENSION:
        stem, dot, extension = name, "", ""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    # RFC 7622 allows much in a local part that a portable name must not hold; and what is in
    # anybody's folder may be carried to where names are compared as loosely as here.
    who = _cut(without_special(who), _MAX_WHO)
    taken = {fold(each) for each in os.listdir(directory)}
    for number in range(1, _MAX_CONFLICTS):
        count = f"-{number}" if number > 1 else ""
        tail = f".conflict-{who}-{stamp}{count}{dot}{extension}"
        short = _cut(stem, MAX_COMPONENT - len(os.fsencode(tail)))
        if fold(short + tail) not in taken:
            return short + tail
    raise TransferError(f"there are {_MAX_CONFLICTS} conflicts of {name} already")


def _cut(text: str, size: int) -> str:
    return os.fsencode(text)[:size].decode(errors="ignore")


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
