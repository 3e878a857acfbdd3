"""The data thread: one worker thread moves the bytes of one bytestream.

Bulk bytes never touch the event loop, so that the XMPP stream and the control socket answer
in milliseconds while files pour in or a disk stalls; and a thread per transfer, not per
chunk, because each hop between loop and thread costs as much as moving 200 KiB. Trio starts
the thread, watches it, and cancels it::

    task:    start the thread ---------------- waits ----------------> its result, or error
    sibling: sleep ... cancelled? tell the thread to stop, shut the socket down
    thread:  poll -> recv -> pwrite -> hash -> count ... poll wakes -> return

The thread is never abandoned: when `send` or `receive` ends, in whatever way, nothing touches
the file any more, and `Progress.offset` is exactly what was moved. Errors are raised outside
the nursery, so that callers never see a group.

After `send` returns, the caller closes the stream at once (``await stream.aclose()``):
Prosody's proxy holds the tail back until then, and nothing is ever acknowledged on a
bytestream. A plain close is enough; the kernel delivers what it has taken.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final, Protocol

import trio

from syncd.errors import (
    ChangedError,
    ErrorType,
    IntegrityError,
    StalledError,
    TransferError,
    TruncatedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Measured: the fastest size for recv_into and pwrite, and one read's worth of cache.
CHUNK: Final = 1 << 20  # bytes

# A mobile network may be silent for some ten seconds, and a disk that spins up too; a peer
# that has said nothing for a minute has gone.
IDLE_TIMEOUT = 60.0  # seconds

# What a sender has sent too much lies right behind the last byte, and a sender that closes
# does so at once; one that waits for us to close (XMPPFramework, QXmpp) costs us this.
SURPLUS_TIMEOUT = 0.5  # seconds

# A thread at full speed takes half a core, and up to 1 MiB; more of them than this only take
# turns. Own, because the default limiter (40) also serves name resolution and disk jobs.
DATA_THREADS = 8  # threads

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("data_limiter")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Hasher(Protocol):
    """What takes in the bytes on their way: ``blake3.blake3``, or one of hashlib's."""

    def update(self, data: memoryview, /) -> object:
        """Take in the next bytes; called in the data thread."""


class Progress:
    """How far a transfer is; written by the data thread, read by anybody.

    Args:
      offset: Where the transfer begins, in bytes from the start of the file.

    Attributes:
      offset: How many bytes of the file the kernel has taken over: from us as sender, for the
        disk as receiver. When a transfer fails, a receiver's file is good up to here.
    """

    __slots__ = ("offset",)

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def __repr__(self) -> str:
        return f"<Progress {self.offset}>"


def data_limiter() -> trio.CapacityLimiter:
    """The limiter of the data threads of this trio run.

    A transfer that waits here keeps its peer waiting, whose patience is the idle timeout:
    look at ``available_tokens`` before promising more than that.
    """
    try:
        return _limiter.get()
    except LookupError:
        _limiter.set(trio.CapacityLimiter(DATA_THREADS))
        return _limiter.get()


async def send(
    stream: trio.SocketStream,
    file_fd: int,
    *,
    offset: int,
    length: int,
    hasher: Hasher | None,
    progress: Progress,
    idle_timeout: float = IDLE_TIMEOUT,
) -> None:
    """Send a part of a file; then close the stream, see above.

    Args:
      stream: The bytestream; nobody else may use it meanwhile.
      file_fd: The file, open for reading; its position is neither used nor moved.
      offset: First byte to send.
      length: How many bytes to send; exactly as offered.
      hasher: Takes in the bytes that are sent; without one they never leave the kernel.
      progress: Counts from `offset`.
      idle_timeout: How long not a byte may move, in seconds.

    Raises:
      ValueError: `length` is negative.
      ChangedError: The file is shorter than that by now.
      StalledError: The peer takes nothing any more.
      TruncatedError: The peer hung up.
      TransferError: The file cannot be read.
    """
    progress.offset = offset
    work = _Work(file_fd, offset + length, hasher, progress)
    with contextlib.closing(_Wire(stream, idle_timeout)) as wire:
        await _in_thread(work, lambda: _send(work, wire), wire.shut_down)


async def receive(
    stream: trio.SocketStream,
    file_fd: int,
    *,
    offset: int,
    length: int,
    hasher: Hasher | None,
    progress: Progress,
    idle_timeout: float = IDLE_TIMEOUT,
    surplus_timeout: float = SURPLUS_TIMEOUT,
) -> None:
    """Receive a part of a file; it is written, but not yet synced, when this returns.

    Args:
      stream: The bytestream; nobody else may use it meanwhile.
      file_fd: The file, open for writing; its position is neither used nor moved.
      offset: Where the first byte goes.
      length: How many bytes there are; exactly as offered.
      hasher: Takes in the bytes that are written; holds just those up to
        ``progress.offset``, also after a failure.
      progress: Counts from `offset`.
      idle_timeout: How long not a byte may move, in seconds.
      surplus_timeout: How long to look for bytes beyond the last, in seconds, when the
        sender does not close.

    Raises:
      TruncatedError: The bytestream ended early; what came is kept.
      IntegrityError: The sender sent more than it offered.
      StalledError: The sender sends nothing any more.
      TransferError: The file cannot be written.
    """
    progress.offset = offset
    work = _Work(file_fd, offset + length, hasher, progress)
    with contextlib.closing(_Wire(stream, idle_timeout)) as wire:
        await _in_thread(work, lambda: _receive(work, wire, surplus_timeout), wire.shut_down)


async def hash_prefix(file_fd: int, length: int, hasher: Hasher) -> None:
    """Let a hasher take in the beginning of a file, to go on from there.

    Args:
      file_fd: The file, open for reading; its position is neither used nor moved.
      length: How many bytes.
      hasher: Takes them in.

    Raises:
      ChangedError: The file is shorter than that by now.
      TransferError: The file cannot be read.
    """
    work = _Work(file_fd, length, hasher, Progress())
    await _in_thread(work, lambda: _hash(work), lambda: None)


async def _in_thread(work: _Work, job: Callable[[], None], wake: Callable[[], object]) -> None:
    """Run a job in a data thread; on cancellation stop it, and wait until it has stopped."""
    running = True
    failure: Exception | None = None

    async def stop_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if running:
                work.stop = True
                wake()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_when_cancelled)
        try:
            await trio.to_thread.run_sync(job, limiter=data_limiter())
        except Exception as error:
            failure = error  # raised inside the nursery it would become a group
        finally:
            running = False
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _StoppedError(Exception):
    """The task was cancelled; the nursery turns it into that, nobody else sees it."""


class _Work:
    """What a data thread is about; `stop` is the only thing that is set from outside.

    Args:
      file_fd: The file.
      end: Where in the file the last byte ends.
      hasher: Takes in what passes, or None.
      progress: Where in the file the next byte is.
    """

    def __init__(
        self, file_fd: int, end: int, hasher: Hasher | None, progress: Progress
    ) -> None:
        if end < progress.offset:
            raise ValueError(f"cannot move {end - progress.offset} bytes")
        self.end = end
        self.progress = progress
        self.stop = False
        self.file_fd = file_fd
        self.hasher = hasher

    def left(self) -> int:
        """How many bytes there still are; asked before each step, and the place to stop."""
        if self.stop:
            raise _StoppedError
        return self.end - self.progress.offset

    def buffer(self) -> memoryview:
        return memoryview(bytearray(max(1, min(CHUNK, self.left()))))

    def read(self, buffer: memoryview) -> memoryview:
        """Read the next bytes of the file; does not count them."""
        wanted = buffer[: self.left()]
        try:
            count = os.preadv(self.file_fd, [wanted], self.progress.offset)
        except OSError as error:
            raise _file_error("read", error) from error
        if not count:
            raise self.shrunk()
        return wanted[:count]

    def write(self, data: memoryview) -> None:
        """Write what has arrived, and count what the disk has taken."""
        while data:
            try:
                count = os.pwrite(self.file_fd, data, self.progress.offset)
            except OSError as error:
                raise _file_error("written", error) from error
            self.hash(data[:count])
            self.progress.offset += count
            data = data[count:]

    def hash(self, data: memoryview) -> None:
        if self.hasher is not None:
            self.hasher.update(data)

    def shrunk(self) -> ChangedError:
        return ChangedError(
            f"the file has become shorter: {self.progress.offset:,} bytes instead of "
            f"{self.end:,}"
        )

    def cut(self, who: str, why: OSError | None = None) -> TruncatedError:
        reason = f" ({why.strerror})" if why is not None else ""
        return TruncatedError(
            f"the {who} hung up after {self.progress.offset:,} of {self.end:,} bytes{reason}"
        )


class _Wire:
    """The socket as the data thread sees it: never blocks but in `wait`."""

    def __init__(self, stream: trio.SocketStream, idle_timeout: float) -> None:
        # A descriptor of our own: should somebody close the stream meanwhile, its number
        # must not lead to another file.
        try:
            self._socket = socket.socket(fileno=os.dup(stream.socket.fileno()))
        except OSError as error:
            raise TransferError(
                f"the bytestream cannot be used: {error.strerror}",
                hint="if too many files are open, raise the limit (LimitNOFILE=)",
            ) from error
        self._socket.setblocking(False)
        self._idle_timeout = idle_timeout
        self._quiet_since = 0.0
        self._poll = select.poll()

    def close(self) -> None:
        self._socket.close()

    def shut_down(self) -> None:
        """Wake the thread out of poll; for another thread to call."""
        with contextlib.suppress(OSError):  # the peer has hung up: that wakes as well
            self._socket.shutdown(socket.SHUT_RDWR)

    def moved(self) -> None:
        """Note that a byte has moved just now, or that the waiting begins."""
        self._quiet_since = time.monotonic()

    def wait(self, event: int) -> None:
        """Wait until the socket is ready.

        Raises:
          StalledError: No byte has moved for too long.
        """
        left = self._quiet_since + self._idle_timeout - time.monotonic()
        if not self._ready(event, left):
            raise StalledError(f"no byte has moved for {self._idle_timeout:g} seconds")

    def send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def sendfile(self, file_fd: int, offset: int, count: int) -> int | None:
        """Send straight from a file; 0 at its end, None when the socket is full."""
        try:
            return os.sendfile(self._socket.fileno(), file_fd, offset, count)
        except BlockingIOError:
            return None

    def receive(self, buffer: memoryview) -> int | None:
        """Receive into a buffer; 0 when the peer hung up, None when nothing is there."""
        try:
            return self._socket.recv_into(buffer)
        except BlockingIOError:
            return None

    def drain(self) -> None:
        """Throw away what a receiver has said, which should be nothing.

        A socket that is closed with bytes unread is reset, and a reset destroys what is
        still on its way to the receiver.
        """
        with contextlib.suppress(OSError):  # nothing there, or hung up already
            self._socket.recv(CHUNK)

    def surplus(self, seconds: float) -> bool:
        """Whether more bytes come within a time; to hang up, in whatever way, means no."""
        with contextlib.suppress(OSError):
            return self._ready(select.POLLIN, seconds) and bool(self._socket.recv(1))
        return False

    def _ready(self, event: int, seconds: float) -> bool:
        self._poll.register(self._socket, event)
        return bool(self._poll.poll(max(0, math.ceil(seconds * 1000))))


def _send(work: _Work, wire: _Wire) -> None:
    wire.moved()
    if work.hasher is None:
        # Whatever stops sendfile (a file system that lacks it, a disk error, the peer),
        # copying meets it again, and there it is clear whose fault it is.
        with contextlib.suppress(OSError):
            _send_by_kernel(work, wire)
    _send_by_copying(work, wire)
    wire.drain()


def _send_by_kernel(work: _Work, wire: _Wire) -> None:
    while left := work.left():
        count = wire.sendfile(work.file_fd, work.progress.offset, min(left, CHUNK))
        if count is None:
            wire.wait(select.POLLOUT)
        elif not count:
            raise work.shrunk()
        else:
            work.progress.offset += count
            wire.moved()


def _send_by_copying(work: _Work, wire: _Wire) -> None:
    buffer = work.buffer()
    while work.left():
        data = work.read(buffer)
        work.hash(data)
        while data and work.left():
            try:
                count = wire.send(data)
            except OSError as error:
                raise work.cut("receiver", error) from error
            if not count:
                wire.wait(select.POLLOUT)
                continue
            work.progress.offset += count
            data = data[count:]
            wire.moved()


def _receive(work: _Work, wire: _Wire, surplus_timeout: float) -> None:
    wire.moved()
    buffer = work.buffer()
    while left := work.left():
        try:
            count = wire.receive(buffer[:left])
        except OSError as error:
            raise work.cut("sender", error) from error
        if count is None:
            wire.wait(select.POLLIN)
        elif not count:
            raise work.cut("sender")
        else:
            work.write(buffer[:count])
            wire.moved()
    if wire.surplus(surplus_timeout):
        raise IntegrityError(f"the sender sent more than the {work.end:,} bytes it offered")


def _hash(work: _Work) -> None:
    buffer = work.buffer()
    while work.left():
        data = work.read(buffer)
        work.hash(data)
        work.progress.offset += len(data)


def _file_error(done: str, error: OSError) -> TransferError:
    if error.errno in _FULL:
        return TransferError(
            f"the file cannot be {done}: {error.strerror}",
            hint="make room on the disk; the transfer then goes on by itself",
        )
    if error.errno == errno.EFBIG:
        return TransferError(
            f"the file cannot be {done}: {error.strerror}",
            hint="the file system, or a limit (LimitFSIZE=), does not allow files this big",
            type=ErrorType.CANCEL,
        )
    return TransferError(
        f"the file cannot be {done}: {error.strerror}",
        hint="look at the disk and at the permissions",
    )
