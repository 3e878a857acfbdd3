"""What runs in a data thread: bytes from a file to a socket, or the reverse, and nothing else.

See `pump`, which starts, watches and stops it. All of it blocks, but never in a place where
`Work.stop` is not looked at soon: between two reads or writes, in `poll` (which a shutdown of
the socket ends) and while a throttle makes it wait.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

from syncd.errors import (
    ChangedError,
    ErrorType,
    IntegrityError,
    StalledError,
    TransferError,
    TruncatedError,
)
from syncd.trust.seal import BATCH, SEGMENT, TAG, sealed_length

if TYPE_CHECKING:
    import trio

    from syncd.transfer.pump import Hasher, Opener, Progress, Sealer, Throttle

# Measured: the fastest size for recv_into and pwrite, and one read's worth of cache.
CHUNK: Final = 1 << 20  # bytes

# How long a throttle should make us wait at a time: the peer's patience is longer, and the
# transfers that share a limit take turns this often. If it must be longer, it is looked that
# often whether the limit has changed.
_PAUSE = 0.25  # seconds
# Where a throttled transfer begins, not knowing yet what fits into one pause, and where it does
# again when the limit changes; it may go up to CHUNK. A second at the lowest limit: even when
# all threads share that, each has its turn in half the time after which a peer gives up.
_LEAST_TURN = 1 << 10  # bytes

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class StoppedError(Exception):
    """The task was cancelled; the nursery turns it into that, nobody else sees it."""


class Work:
    """What a data thread is about; `stop` is the only thing that is set from outside.

    Args:
      file_fd: The file.
      end: Where in the file the last byte ends.
      hasher: Takes in what passes, or None.
      progress: Where in the file the next byte is.
      throttle: Says how long to wait after each step, or None.
    """

    def __init__(
        self,
        file_fd: int,
        end: int,
        hasher: Hasher | None,
        progress: Progress,
        throttle: Throttle | None = None,
    ) -> None:
        if end < progress.offset:
            raise ValueError(f"cannot move {end - progress.offset} bytes")
        self.end = end
        self.progress = progress
        self.stop = threading.Event()
        self.file_fd = file_fd
        self.hasher = hasher
        self._throttle = throttle
        self._limits = 0 if throttle is None else throttle.limits
        self.turn = CHUNK if throttle is None else _LEAST_TURN

    def check(self) -> None:
        """The place to stop; called before each step."""
        if self.stop.is_set():
            raise StoppedError

    def left(self) -> int:
        """How many bytes there still are; a place to stop, too."""
        self.check()
        return self.end - self.progress.offset

    def pause(self, count: int) -> None:
        """Wait as the throttle says after so many bytes, and choose how many are next."""
        if self._throttle is None:
            return
        seconds = self._throttle.take(count, self._limits)
        if seconds > _PAUSE:
            self.turn = max(_LEAST_TURN, int(self.turn * _PAUSE / seconds))
        elif seconds < _PAUSE / 2:
            self.turn = min(CHUNK, 2 * self.turn)
        # After the last byte it is for others to wait: the throttle remembers.
        if seconds > 0 and self.left():
            self._wait(seconds, self._throttle)
        if self._throttle.limits != self._limits:
            self._limits = self._throttle.limits
            self.turn = _LEAST_TURN

    def _wait(self, seconds: float, throttle: Throttle) -> None:
        """Wait, but no longer than the limits hold that wanted it."""
        while seconds > 0 and throttle.limits == self._limits:
            if self.stop.wait(min(seconds, _PAUSE)):
                raise StoppedError
            seconds -= _PAUSE

    def buffer(self) -> memoryview:
        """A buffer for one step; no larger than what is left."""
        return memoryview(bytearray(max(1, min(CHUNK, self.left()))))

    def read(self, buffer: memoryview, ahead: int = 0) -> memoryview:
        """Read the next bytes of the file, or those so far ahead; does not count them."""
        wanted = buffer[: self.left() - ahead]
        try:
            count = os.preadv(self.file_fd, [wanted], self.progress.offset + ahead)
        except OSError as error:
            raise _file_error("read", error) from error
        if not count:
            raise self.shrunk()
        return wanted[:count]

    def read_full(self, buffer: memoryview) -> memoryview:
        """Read until the buffer is full, or all is read that is left."""
        have, wanted = 0, min(len(buffer), self.left())
        while have < wanted:
            have += len(self.read(buffer[have:wanted], have))
        return buffer[:wanted]

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
        """Let the hasher take in what passes."""
        if self.hasher is not None:
            self.hasher.update(data)

    def shrunk(self) -> ChangedError:
        """The error of a file that ends too early."""
        return ChangedError(
            f"the file has become shorter: {self.progress.offset:,} bytes instead of "
            f"{self.end:,}"
        )

    def cut(self, who: str, why: OSError | None = None) -> TruncatedError:
        """The error of a bytestream that ends too early."""
        reason = f" ({why.strerror})" if why is not None else ""
        return TruncatedError(
            f"the {who} hung up after {self.progress.offset:,} of {self.end:,} bytes{reason}"
        )


class Wire:
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
        """Let go of the socket; the stream itself stays open."""
        self._socket.close()

    @property
    def own_host(self) -> str:
        """Our address at this end of it; empty inside of this machine (in-band)."""
        if self._socket.family not in (socket.AF_INET, socket.AF_INET6):
            return ""
        return str(self._socket.getsockname()[0])

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
        """Send some of the bytes; 0 when the socket is full."""
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


def send_file(work: Work, wire: Wire, sealer: Sealer | None) -> None:
    """Send what is left of a file."""
    wire.moved()
    if sealer is not None:
        _send_sealed(work, wire, sealer)
    else:
        if work.hasher is None:
            # Whatever stops sendfile (a file system that lacks it, a disk error, the peer),
            # copying meets it again, and there it is clear whose fault it is.
            with contextlib.suppress(OSError):
                _send_by_kernel(work, wire)
        _send_by_copying(work, wire)
    wire.drain()


def _send_by_kernel(work: Work, wire: Wire) -> None:
    while left := work.left():
        count = wire.sendfile(work.file_fd, work.progress.offset, min(left, work.turn))
        if count is None:
            wire.wait(select.POLLOUT)
        elif not count:
            raise work.shrunk()
        else:
            work.progress.offset += count
            _rest(work, wire, count)


def _send_by_copying(work: Work, wire: Wire) -> None:
    buffer = work.buffer()
    while work.left():
        data = work.read(buffer)
        work.hash(data)
        while data:
            count = _push(work, wire, data)
            work.progress.offset += count
            data = data[count:]
            _rest(work, wire, count)


def _send_sealed(work: Work, wire: Wire, sealer: Sealer) -> None:
    """Send the header, and then as many segments at a time as one call seals.

    What counts is what went out as a whole segment: of one that was cut, the receiver has
    nothing.
    """
    header = memoryview(sealer.header)
    while header:
        count = _push(work, wire, header)
        header = header[count:]
        _rest(work, wire, count)
    buffer = memoryview(bytearray(min(BATCH * SEGMENT, work.left())))
    final = False
    while not final:  # an empty file has a segment as well: that it is empty is sealed, too
        data = work.read_full(buffer)
        work.hash(data)
        final = len(data) == work.left()
        sealed = sealer.seal(data, final=final)
        start, sent = work.progress.offset, 0
        while sent < len(sealed):
            count = _push(work, wire, sealed[sent:])
            sent += count
            whole = sent // (SEGMENT + TAG) * SEGMENT if sent < len(sealed) else len(data)
            work.progress.offset = start + whole
            _rest(work, wire, count)


def _push(work: Work, wire: Wire, data: memoryview) -> int:
    """Wait until the socket takes some of the bytes; returns how many."""
    while True:
        work.check()
        try:
            count = wire.send(data[: work.turn])
        except OSError as error:
            raise work.cut("receiver", error) from error
        if count:
            return count
        wire.wait(select.POLLOUT)


def _rest(work: Work, wire: Wire, count: int) -> None:
    """So many bytes have moved; a time that the throttle takes is no silence of the peer."""
    work.pause(count)
    wire.moved()


def receive_file(
    work: Work, wire: Wire, opener: Opener | None, surplus_timeout: float, *, until_end: bool
) -> None:
    """Receive what is left of a file, and look whether more comes."""
    wire.moved()
    if opener is not None:
        assert not until_end
        _receive_sealed(work, wire, opener)
    else:
        buffer = work.buffer()
        while left := work.left():
            pull = _pull if until_end else _pull_some
            count = pull(work, wire, buffer[:left])
            if not count:
                return
            work.write(buffer[:count])
            _rest(work, wire, count)
    if wire.surplus(surplus_timeout):
        raise IntegrityError(f"the sender sent more than the {work.end:,} bytes it offered")


def _receive_sealed(work: Work, wire: Wire, opener: Opener) -> None:
    """Receive the header, then open as many segments as are there; a part of one waits."""
    header = memoryview(bytearray(opener.header_size))
    have = 0
    while have < len(header):
        count = _pull_some(work, wire, header[have:])
        have += count
        _rest(work, wire, count)
    opener.header(header)
    coming = sealed_length(work.left())
    buffer = memoryview(bytearray(min(BATCH * (SEGMENT + TAG), coming)))
    have = 0
    while coming:
        count = _pull_some(work, wire, buffer[have:coming])
        have += count
        ready = have if have == coming else have - have % (SEGMENT + TAG)
        if ready:
            work.write(opener.open(buffer[:ready], final=ready == coming))
            coming -= ready
            have -= ready
            buffer[:have] = buffer[ready : ready + have]
        _rest(work, wire, count)


def _pull(work: Work, wire: Wire, buffer: memoryview) -> int:
    """Wait for bytes in the beginning of a buffer; returns how many, 0 at the end."""
    while True:
        work.check()
        try:
            count = wire.receive(buffer[: work.turn])
        except OSError as error:
            raise work.cut("sender", error) from error
        if count is not None:
            return count
        wire.wait(select.POLLIN)


def _pull_some(work: Work, wire: Wire, buffer: memoryview) -> int:
    """The same, where the end would come too early."""
    count = _pull(work, wire, buffer)
    if not count:
        raise work.cut("sender")
    return count


def hash_file(work: Work) -> None:
    """Let the hasher take in what is left of a file."""
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
