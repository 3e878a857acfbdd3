"""How much of a partial file can be gone on from: proved by digests, never by its length.

After a power cut a file may be as long as it was and hold zeros, and a disk may have turned a
bit meanwhile. So while a file arrives, the digest of everything from its start is noted at the
end of each block, in a file beside it. Whoever goes on later hashes the beginning once more,
which the digest of the whole file needs anyway, and compares at each note: what matches is
there, the rest is cut off and sent again.

That is one hash, not two: BLAKE3 tells the digest of what it has taken in so far and goes on,
so a note costs some microseconds. And because each note speaks for everything before it, one
that is missing or torn is passed over: the next one proves as much.

Nothing is synced on the way, and nothing needs to be: a note that reached the disk without its
bytes, or the reverse, does not match and is the end of what is proved. `close` notes the tail
as well, so an orderly end loses nothing; kill -9 loses less than a block, or the first moment;
a power cut loses what the kernel had not written, which it is told to begin with every second.

The file of notes, all numbers big-endian::

    header   magic, size of the file, size of a block, CRC-32 of these
    note     offset, BLAKE3 of the file up to it, CRC-32 of both

Note *n* ends block *n*, at a place of its own, so the file cannot grow beyond one note a block.
A note inside its block is a tail; the note of the whole block takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import struct
import time
import zlib
from typing import TYPE_CHECKING, Final

import blake3

from syncd.disk.beneath import start_writing

if TYPE_CHECKING:
    from collections.abc import Callable

# One window of TCP without scaling: less is not worth a note.
MIN_BLOCK: Final = 64 << 10  # bytes
# A second of a good connection; more would save nothing any more.
MAX_BLOCK: Final = 8 << 20  # bytes
# At most this part of a file is sent twice after a crash, unless a block is the least there is.
PARTS: Final = 100

# A small file that comes at once is not worth a file of notes, which costs it a third more
# time on the disk (measured, 1 MiB with its fsync): notes begin after either of these.
FIRST_BYTES: Final = 1 << 20  # bytes
FIRST_MOMENT: Final = 0.05  # seconds

# What a power cut may take is this and some seconds, until the file system writes its own
# journal. An fdatasync would stop the transfer for as long as the disk needs; this only
# starts what the fsync at the end would have to do. By time and not by bytes: where a second
# holds the whole file, it is not needed.
FLUSH: Final = 1.0  # seconds

# What a new file takes from a full disk: a directory's and a file's block of any file system.
_ROOM = 16 << 10  # bytes

# Notes that cannot be read for one of these reasons are there all the same, and with them what
# they prove: too many open files, too little memory, a disk or a server that does not answer.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ETIMEDOUT})

# As in the data thread: fast, and one read's worth of cache.
_CHUNK = 1 << 20  # bytes

_HEADER = struct.Struct(">8sQQI")
_MAGIC = b"syncdB1\n"
_NOTE = struct.Struct(">Q32sI")
_CRC = 4  # bytes


def block_size(size: int) -> int:
    """How long a block of a file is.

    Args:
      size: Of the whole file, bytes.

    Returns:
      A power of two, bytes: at most a hundredth of the file, from 64 KiB to 8 MiB.
    """
    part = max(1, size // PARTS)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << (part.bit_length() - 1)))


class Blocks:
    """Hashes a file while it arrives, and notes how far it came; a hasher for the pump.

    Not for two threads at once. A note that cannot be written costs the next attempt a block,
    and never this transfer.

    Args:
      fd: The file, open for reading and writing.
      size: Its whole length, bytes.
      open_notes: Opens the file of notes; makes it if it is told so. None: keep no notes,
        nobody goes on from this file.
      clock: The time in seconds, never going back.

    Attributes:
      offset: How many bytes, from the start of the file, have been taken in.
    """

    def __init__(
        self,
        fd: int,
        size: int,
        open_notes: Callable[[bool], int] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.offset = 0
        self._fd = fd
        self._size = size
        self._block = block_size(size)
        self._open_notes = open_notes
        self._hasher = blake3.blake3()
        self._notes = -1
        self._ends: tuple[tuple[int, bytes], ...] = ()  # of the last two blocks
        self._noted = 0  # up to where the notes prove the file
        self._flushed = 0  # up to where the kernel was told to write
        self._clock = clock
        self._flushed_at = clock()
        self._began = (0, -math.inf)  # where and when this attempt did

    def update(self, data: memoryview, /) -> None:
        """Take in the next bytes, which the file holds already."""
        if self._began[1] == -math.inf:
            self._began = self.offset, self._clock()
        while data:
            part = data[: self._block - self.offset % self._block]
            self._hasher.update(part)
            self.offset += len(part)
            data = data[len(part) :]
            # The end of the file needs no note: it gets its name now, or `close` writes it.
            if self.offset % self._block == 0 and self.offset < self._size:
                self._note_block()

    def digest(self) -> bytes:
        """BLAKE3 of all bytes so far, 32 bytes."""
        return self._hasher.digest()

    @property
    def noted(self) -> int:
        """How much of the file its notes prove, as far as was looked, bytes from its start."""
        return self._noted

    def claim(self, length: int) -> int:
        """Look up how far the file has come; quickly, and without a proof.

        Args:
          length: How long the file is, bytes.

        Returns:
          What `prove` says, unless the file or its notes are damaged.

        Raises:
          OSError: The notes cannot be read now; how far it has come is not known.
        """
        if self._open_notes is None or not self._find_notes(self._open_notes):
            self._let_go()
            return 0
        number = self._slots(min(length, self._size))
        claimed = 0
        while number > 0 and not claimed:
            number -= 1
            note = self._read_note(number)
            if note is not None and note[0] <= length:
                claimed = note[0]
        self._let_go()
        return claimed

    def prove(self, length: int, stopped: Callable[[], bool] = bool) -> int:
        """Take in as much of the file as the notes prove.

        Args:
          length: How long the file is, bytes.
          stopped: Asked before each read; true ends the work with what is proved until then.

        Returns:
          The offset to go on from. The caller cuts off what lies behind it.

        Raises:
          OSError: The notes cannot be read now; nothing may be cut off.
        """
        assert self.offset == 0
        if self._open_notes is not None and self._find_notes(self._open_notes):
            # A file that is longer than it should be is proved as far as it should be.
            for number in range(self._slots(min(length, self._size))):
                note = self._read_note(number)
                if note is None:
                    continue
                offset, digest = note
                trial = self._hasher.copy()
                if not self._hash(trial, offset, stopped) or trial.digest() != digest:
                    break
                self._hasher, self.offset = trial, offset
        if self.offset == 0:
            self._let_go()  # of another file, or of another version of this one: begun anew
        self._noted = self._flushed = self.offset
        return self.offset

    def close(self) -> None:
        """Note how far the file came, and let go of the notes."""
        if self.offset > self._noted:
            try:
                self._note(self.offset, self._hasher.digest())
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self._note_in_their_place()
        self.forget()

    def forget(self) -> None:
        """Let go of the notes without another one: the file has its name, or is gone."""
        self._open_notes = None
        self._let_go()

    def _let_go(self) -> None:
        if self._notes >= 0:
            fd, self._notes = self._notes, -1
            # NFS tells here that the disk is full: it costs the next attempt some blocks.
            with contextlib.suppress(OSError):
                os.close(fd)

    def _hash(self, hasher: blake3.blake3, end: int, stopped: Callable[[], bool]) -> bool:
        """Let a hasher take in the file up to an offset; False if that cannot be."""
        offset = self.offset
        buffer = memoryview(bytearray(min(_CHUNK, end - offset)))
        while offset < end:
            if stopped():
                return False
            try:
                count = os.preadv(self._fd, [buffer[: end - offset]], offset)
            except OSError:  # a bad sector: what lies there is sent again, to another
                return False
            if not count:
                return False
            hasher.update(buffer[:count])
            offset += count
        return True

    def _slots(self, size: int) -> int:
        """How many blocks, also begun ones, a file of this size has."""
        return -(-size // self._block)

    def _find_notes(self, open_notes: Callable[[bool], int]) -> bool:
        """Open the notes of an earlier attempt, if they are those of this file.

        Raises:
          OSError: It is not known whether they are, for a reason that passes.
        """
        try:
            self._notes = open_notes(False)
            return os.pread(self._notes, _HEADER.size, 0) == self._header()
        except OSError as error:
            # All others: there are none, or what stands there is something else.
            if error.errno in _PASSING:
                self._let_go()
                raise
            return False

    def _header(self) -> bytes:
        return _checked(_HEADER.pack(_MAGIC, self._size, self._block, 0))

    def _read_note(self, number: int) -> tuple[int, bytes] | None:
        """Read a note: up to where, and the digest; None if it is missing or torn."""
        try:
            found = os.pread(self._notes, _NOTE.size, _place(number))
        except OSError:
            return None
        if len(found) != _NOTE.size or _checked(found) != found:
            return None
        offset, digest, _ = _NOTE.unpack(found)
        # In its own place, so that offsets only grow.
        if self._slots(offset) != number + 1 or offset > self._size:
            return None
        return offset, digest

    def _note_block(self) -> None:
        """Note the end of a block; a disk that refuses costs the next attempt that block."""
        now = self._clock()
        end = self.offset, self._hasher.digest()
        self._ends = (*self._ends[-1:], end)
        start, began = self._began
        if (
            self._notes < 0
            and self.offset <= start + FIRST_BYTES
            and now < began + FIRST_MOMENT
        ):
            return
        with contextlib.suppress(OSError):
            self._note(*end)
        if self._notes >= 0 and now >= self._flushed_at + FLUSH:
            start_writing(self._fd, self._flushed, self.offset - self._flushed)
            start_writing(self._notes, 0, 0)
            self._flushed, self._flushed_at = self.offset, now

    def _note(self, offset: int, digest: bytes) -> None:
        if self._open_notes is None:
            return
        if self._notes < 0:
            self._notes = self._begin_notes(self._open_notes)
        note = _checked(_NOTE.pack(offset, digest, 0))
        os.pwrite(self._notes, note, _place(self._slots(offset) - 1))
        self._noted = offset

    def _note_in_their_place(self) -> None:
        """On a full disk, give the end of the file up for the notes of the rest."""
        for offset, digest in self._ends:
            if self._noted < offset <= self.offset - _ROOM:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, offset)
                    self._note(offset, digest)
                return

    def _begin_notes(self, open_notes: Callable[[bool], int]) -> int:
        notes = open_notes(True)
        try:
            os.ftruncate(notes, 0)
            os.pwrite(notes, self._header(), 0)
        except OSError:
            os.close(notes)
            raise
        return notes


def open_notes(name: str, directory: int, *, create: bool) -> int:
    """Open a file of notes, in no case anything else.

    Args:
      name: Its name.
      directory: Descriptor of the private directory.
      create: Make it if it is missing.

    Raises:
      OSError: It is missing, or what stands there is no plain file.
    """
    # O_NONBLOCK: opening a fifo must not wait for its other end.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags | (os.O_CREAT if create else 0), 0o600, dir_fd=directory)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return fd
    os.close(fd)
    raise FileExistsError(errno.EEXIST, "what stands there is no plain file", name)


def _place(number: int) -> int:
    return _HEADER.size + number * _NOTE.size


def _checked(packed: bytes) -> bytes:
    """The same with its right checksum at the end."""
    body = packed[:-_CRC]
    return body + zlib.crc32(body).to_bytes(_CRC, "big")
