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
import threading
import weakref
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, TypeVarTuple, Unpack

import trio

from syncd.transfer.datathread import (
    StoppedError,
    Wire,
    Work,
    hash_file,
    receive_file,
    send_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from syncd.disk.partial import PartialFile
    from syncd.xmpp.jid import JID

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

# A mobile network may be silent for some ten seconds, and a disk that spins up too; a peer
# that has said nothing for a minute has gone.
IDLE_TIMEOUT = 60.0  # seconds

# What a sender has sent too much lies right behind the last byte, and a sender that closes
# does so at once; one that waits for us to close (XMPPFramework, QXmpp) costs us this.
SURPLUS_TIMEOUT = 0.5  # seconds

# Threads of our own, because the default limiter (40) also serves name resolution; and for each
# direction some, because who sends to us is not ours to choose. A few at full speed fill every
# line; there are more of them because most wait for a slow one. Each takes up to 1 MiB, sealed
# up to 2 MiB: all of them together half of the memory that the service may have (256 MiB).
OUT_THREADS = 16  # threads that send
IN_THREADS = 32  # threads that receive
# Whoever sends or takes a byte a minute keeps a thread for ever, and so may have only a part of
# them: twice what senders have under way at a time, so that a sender that was started anew is
# not kept out by what it left behind.
PEER_THREADS = 8  # threads of one bare JID, in each direction

# What is hashed before anything moves: a disk gets no faster when more of it is read at once,
# and nobody's bytes shall wait for that, nor all others for a few huge files of one peer.
HASH_THREADS = 8  # threads
PEER_HASH_THREADS = 4  # threads of one bare JID
# No more than this is no reason to stand in that queue: the slowest disk reads it in a second,
# and a file that is new, or small, would wait for hours behind huge ones.
LITTLE = 4 << 20  # bytes

# The slowest disk on which there shall be huge files: a worn card, or one behind a slow net,
# that several transfers read at once.
SLOWEST_DISK = 5_000_000  # bytes per second
# 70 GB at that speed, a terabyte on a hard disk. Who hashes longer does not wait in vain for
# ever for somebody who will not come back.
MAX_HASHING = 4 * 3600.0  # seconds

# How long a transfer that can be short is taken for one, which ends soon: a part of the
# patience of those that wait for its thread; and how many may be under way or wait for each.
SOON = 15.0  # seconds
MAX_QUEUED = 4  # transfers

Kind = Literal["out", "in", "hash"]

_threads: trio.lowlevel.RunVar[dict[Kind, Threads]] = trio.lowlevel.RunVar("data_threads")
_wires: trio.lowlevel.RunVar[set[Wire]] = trio.lowlevel.RunVar("bytestreams")


# Looks at folders, partial files, final names. On a disk that hangs all of them hang, and must
# not take those with them that look up the server's name.
DISK_THREADS = 16  # threads

_disk: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("disk_limiter")


async def on_disk(job: Callable[[Unpack[Arguments]], T], *args: *Arguments) -> T:
    """Run in a thread what waits for a disk, and moves no bulk of bytes.

    Args:
      job: Blocks.
      args: For it.

    Returns:
      What it returns.
    """
    limiter = _of_this_run(_disk, lambda: trio.CapacityLimiter(DISK_THREADS))
    return await trio.to_thread.run_sync(job, *args, limiter=limiter)


def _of_this_run(kept: trio.lowlevel.RunVar[T], make: Callable[[], T]) -> T:
    """What this trio run has of something; it is made when it is first asked for."""
    try:
        return kept.get()
    except LookupError:
        made = make()
        kept.set(made)
        return made


class Hasher(Protocol):
    """What takes in the bytes on their way: ``blake3.blake3``, or one of hashlib's."""

    def update(self, data: memoryview, /) -> object:
        """Take in the next bytes; called in the data thread."""


class Hashers:
    """Several hashers as one.

    Args:
      hashers: Each takes in everything.
    """

    def __init__(self, hashers: Sequence[Hasher]) -> None:
        self._hashers = tuple(hashers)

    def update(self, data: memoryview, /) -> None:
        """Let all of them take in the next bytes."""
        for hasher in self._hashers:
            hasher.update(data)


class Throttle(Protocol):
    """Says how fast bytes may move: `syncd.wiring.throttle.Throttle`."""

    @property
    def limits(self) -> int:
        """Which limits hold: another number after each change; read in the data threads."""

    def take(self, count: int, /, limits: int) -> float:
        """Count so many bytes, of the bytestream, that have just moved.

        Called in the data threads, in several at once.

        Args:
          count: How many.
          limits: Under which they began to; if others hold by now, they are not counted.

        Returns:
          How long to wait before more move, in seconds.
        """


def unlimited(_: JID) -> None:
    """No throttle, for whomever."""


class Sealer(Protocol):
    """Seals what is sent: `syncd.trust.seal.Sealer`."""

    @property
    def header(self) -> bytes:
        """The first bytes of the bytestream."""

    def seal(self, data: memoryview, *, final: bool) -> memoryview:
        """Seal whole segments, or with `final` the rest; called in the data thread."""


class Opener(Protocol):
    """Opens what was sealed: `syncd.trust.seal.Opener`; any error ends the transfer."""

    @property
    def header_size(self) -> int:
        """How many bytes stand before the first segment."""

    def header(self, data: memoryview, /) -> None:
        """Take these bytes; called in the data thread."""

    def open(self, data: memoryview, *, final: bool) -> memoryview:
        """Open whole segments, or with `final` the rest; called in the data thread."""


class Progress:
    """How far a transfer is; written by the data thread, read by anybody.

    Args:
      offset: Where the transfer begins, in bytes from the start of the file.

    Attributes:
      offset: How many bytes of the file the kernel has taken over: from us as sender, for the
        disk as receiver. When a transfer fails, a receiver's file is good up to here.
      method: The way that the bytes take: ``direct``, ``proxy``, ``ibb``, or empty before.
    """

    __slots__ = ("method", "offset")

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.method: Literal["", "direct", "proxy", "ibb"] = ""

    def __repr__(self) -> str:
        return f"<Progress {self.offset}>"


class Threads:
    """The threads for one kind of work, of which no peer gets more than its share.

    Who waits, waits in a queue of its peer first, and then with few others of it in that of
    all: a peer whose transfers never end keeps nobody else's waiting.

    Args:
      total: How many there are.
      share: How many of them may work for one peer.

    Attributes:
      limiter: Of all of them.
    """

    def __init__(self, total: int, share: int) -> None:
        self.limiter = trio.CapacityLimiter(total)
        self._share = share
        self._shares: weakref.WeakValueDictionary[JID, trio.CapacityLimiter] = (
            weakref.WeakValueDictionary()
        )

    async def run(self, job: Callable[[], T], peer: JID | None) -> T:
        """Run a job when it is its turn.

        Args:
          job: Blocks.
          peer: Whose share it takes: a bare JID; None: nobody's.
        """
        if peer is None:
            return await trio.to_thread.run_sync(job, limiter=self.limiter)
        async with self._shares.setdefault(peer, trio.CapacityLimiter(self._share)):
            return await trio.to_thread.run_sync(job, limiter=self.limiter)


def threads(kind: Kind) -> Threads:
    """The data threads of this trio run.

    A transfer that waits for one keeps its peer waiting, whose patience is the idle timeout:
    ask `Admission` before promising more than that.
    """
    return _of_this_run(_threads, _make_threads)[kind]


def _make_threads() -> dict[Kind, Threads]:
    return {
        "out": Threads(OUT_THREADS, PEER_THREADS),
        "in": Threads(IN_THREADS, PEER_THREADS),
        "hash": Threads(HASH_THREADS, PEER_HASH_THREADS),
    }


class Admission:
    """Says whether a further transfer to us will have a thread soon.

    One that can be short ends soon, as far as anybody knows, until it has been under way for a
    while: of these a few may wait for each thread that is left. One that cannot keeps its
    thread, and so needs one that nobody else has or waits for.
    """

    def __init__(self) -> None:
        self._began: dict[object, tuple[JID, float, bool]] = {}

    def begin(self, transfer: object, peer: JID, now: float, *, short: bool) -> None:
        """A transfer begins.

        Args:
          transfer: Which.
          peer: Whose, a bare JID.
          now: The time, seconds.
          short: Whether it can be a short one.
        """
        self._began[transfer] = peer, now, short

    def end(self, transfer: object) -> None:
        """It has ended, if it ever began."""
        self._began.pop(transfer, None)

    def has_room(self, now: float, *, short: bool, replaced: object = None) -> bool:
        """Whether one more may begin, whosever it is.

        Args:
          now: The time, seconds.
          short: Whether it can be a short one.
          replaced: The transfer that ends when this one begins, if there is one.
        """
        slow = quick = 0
        for lasting, ending in self._counts(now, replaced).values():
            # The others of this peer wait for its own share, and in nobody's way.
            kept = min(lasting, PEER_THREADS)
            slow += kept
            quick += min(ending, PEER_THREADS - kept)
        return _have_room(slow, quick, IN_THREADS, short=short)

    def has_share(self, peer: JID, now: float, *, short: bool, replaced: object = None) -> bool:
        """The same, of the threads that one bare JID may have."""
        slow, quick = self._counts(now, replaced).get(peer, (0, 0))
        return _have_room(slow, quick, PEER_THREADS, short=short)

    def _counts(self, now: float, replaced: object) -> dict[JID, tuple[int, int]]:
        """How many of each peer go on for long, and how many end soon."""
        counts: dict[JID, tuple[int, int]] = {}
        for transfer, (peer, began, short) in self._began.items():
            if transfer is not replaced:
                slow, quick = counts.get(peer, (0, 0))
                is_quick = short and now - began < SOON
                counts[peer] = slow + (not is_quick), quick + is_quick
        return counts


def _have_room(slow: int, quick: int, total: int, *, short: bool) -> bool:
    if short:
        return quick < (total - slow) * MAX_QUEUED
    return slow + quick < total


def hashing_time(size: int) -> float:
    """How long the other end may need to hash so much of a file first, in seconds.

    Both ends of a transfer between syncds know where it begins, and so how much each of them
    has to read again before it goes on there: so much longer they are patient.
    """
    return min(size / SLOWEST_DISK, MAX_HASHING)


async def send(
    stream: trio.SocketStream,
    file_fd: int,
    *,
    offset: int,
    length: int,
    hasher: Hasher | None,
    progress: Progress,
    idle_timeout: float = IDLE_TIMEOUT,
    throttle: Throttle | None = None,
    sealer: Sealer | None = None,
    peer: JID | None = None,
) -> None:
    """Send a part of a file; then close the stream, see above.

    Args:
      stream: The bytestream; nobody else may use it meanwhile.
      file_fd: The file, open for reading; its position is neither used nor moved.
      offset: First byte to send.
      length: How many bytes to send; exactly as offered.
      hasher: Takes in the bytes that are sent; without one they never leave the kernel.
      progress: Counts from `offset`; sealed, in whole segments.
      idle_timeout: How long not a byte may move, in seconds; not counting what the throttle
        takes.
      throttle: Slows it down.
      sealer: Seals it.
      peer: Whose share of the threads it takes: a bare JID.

    Raises:
      ValueError: `length` is negative.
      ChangedError: The file is shorter than that by now.
      StalledError: The peer takes nothing any more.
      TruncatedError: The peer hung up.
      TransferError: The file cannot be read.
    """
    progress.offset = offset
    work = Work(file_fd, offset + length, hasher, progress, throttle)

    def job() -> None:
        send_file(work, wire, sealer)

    with _wire(stream, idle_timeout) as wire:
        await _in_thread("out", peer, work.stop, job, wire.shut_down)


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
    until_end: bool = False,
    throttle: Throttle | None = None,
    opener: Opener | None = None,
    peer: JID | None = None,
) -> None:
    """Receive a part of a file; it is written, but not yet synced, when this returns.

    Args:
      stream: The bytestream; nobody else may use it meanwhile.
      file_fd: The file, open for writing; its position is neither used nor moved.
      offset: Where the first byte goes.
      length: How many bytes there are; exactly as offered.
      hasher: Takes in the bytes that are written; holds just those up to
        ``progress.offset``, also after a failure.
      progress: Counts from `offset`; what was sealed, only when it was found genuine.
      idle_timeout: How long not a byte may move, in seconds; not counting what the throttle
        takes.
      surplus_timeout: How long to look for bytes beyond the last, in seconds, when the
        sender does not close.
      until_end: The sender does not know the size: the file ends where the bytestream does,
        and `length` is only the most that is taken. Not for what is sealed.
      throttle: Slows it down, by reading no faster.
      opener: Opens what was sealed.
      peer: Whose share of the threads it takes: a bare JID.

    Raises:
      TruncatedError: The bytestream ended early; what came is kept.
      IntegrityError: The sender sent more than it offered, or it was not the sender.
      StalledError: The sender sends nothing any more.
      TransferError: The file cannot be written.
    """
    progress.offset = offset
    work = Work(file_fd, offset + length, hasher, progress, throttle)

    def job() -> None:
        receive_file(work, wire, opener, surplus_timeout, until_end=until_end)

    with _wire(stream, idle_timeout) as wire:
        await _in_thread("in", peer, work.stop, job, wire.shut_down)


@contextlib.contextmanager
def _wire(stream: trio.SocketStream, idle_timeout: float) -> Iterator[Wire]:
    wires = _of_this_run(_wires, set)
    with contextlib.closing(Wire(stream, idle_timeout)) as wire:
        wires.add(wire)
        try:
            yield wire
        finally:
            wires.discard(wire)


def cut_lost(is_ours: Callable[[str], bool]) -> int:
    """End the bytestreams that cannot move any more: this machine has other addresses.

    Their transfers go on from there by another way, and not after `IDLE_TIMEOUT`.

    Args:
      is_ours: Tells whether an address is still ours.

    Returns:
      How many there were.
    """
    wires = _of_this_run(_wires, set)
    lost = [wire for wire in wires if wire.own_host and not is_ours(wire.own_host)]
    for wire in lost:
        wire.shut_down()
    return len(lost)


async def hash_prefix(
    file_fd: int, length: int, hasher: Hasher, peer: JID | None = None
) -> None:
    """Let a hasher take in the beginning of a file, to go on from there.

    Who has to read much waits for others that do; there is no queue for `LITTLE`.

    Args:
      file_fd: The file, open for reading; its position is neither used nor moved.
      length: How many bytes.
      hasher: Takes them in.
      peer: Whose share of the threads it takes: a bare JID.

    Raises:
      ChangedError: The file is shorter than that by now.
      TransferError: The file cannot be read.
    """
    work = Work(file_fd, length, hasher, Progress())
    if not length:
        await trio.lowlevel.checkpoint()
    elif length <= LITTLE:
        await on_disk(hash_file, work)
    else:
        await _in_thread("hash", peer, work.stop, lambda: hash_file(work))


async def prove(partial: PartialFile, peer: JID | None = None) -> int:
    """Find out in a thread how much of a partial file is to go on from.

    At the speed of the disk: when the answer must not wait for that, look at its offset,
    which only claims, first. Who claims much waits for others that do, as in `hash_prefix`.

    Args:
      partial: Just opened; its ``blocks`` are the hasher for `receive` afterwards.
      peer: Whose share of the threads it takes: a bare JID.

    Returns:
      Its offset.

    Raises:
      TransferError: The disk refuses, or is full.
    """
    if partial.offset <= LITTLE:
        return await on_disk(partial.prove)
    stop = threading.Event()
    return await _in_thread("hash", peer, stop, lambda: partial.prove(stop.is_set))


async def _in_thread(
    kind: Kind,
    peer: JID | None,
    stop: threading.Event,
    job: Callable[[], T],
    wake: Callable[[], object] = bool,
) -> T:
    """Run a job in a data thread; on cancellation stop it, and wait until it has stopped."""
    running = True
    outcome: T | Exception = StoppedError()

    async def stop_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if running:
                stop.set()
                wake()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_when_cancelled)
        try:
            outcome = await threads(kind).run(job, peer)
        except Exception as error:
            outcome = error  # raised inside the nursery it would become a group
        finally:
            running = False
        nursery.cancel_scope.cancel()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
