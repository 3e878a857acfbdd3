"""What `pump` runs; the plain ways of it are tested there."""

from __future__ import annotations

import math
import os
import threading
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import pytest
import trio
from blake3 import blake3

from syncd.errors import (
    ChangedError,
    IntegrityError,
    StalledError,
    TransferError,
    TruncatedError,
)
from syncd.transfer import datathread
from syncd.transfer.datathread import CHUNK, StoppedError, Work
from syncd.transfer.pump import Progress, receive, send
from syncd.trust.kem import Kem
from syncd.trust.seal import BATCH, SEGMENT, TAG, header_size, sealed_length
from syncd.wiring.throttle import Bucket, Throttle
from tests.support.sealing import MALLORY, agree, sealed
from tests.support.tcp import connection, pattern, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HEADER = header_size(Kem.X25519)
WHOLE = SEGMENT + TAG


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Make files, open for reading and writing."""
    fds = []

    def make(name: str, content: bytes = b"") -> int:
        (tmp_path / name).write_bytes(content)
        fds.append(os.open(tmp_path / name, os.O_RDWR))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, 1 << 30, 0)


# Sealed


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (0, 0),
        (1, 0),
        (1, 1),
        (SEGMENT, 0),
        (SEGMENT + 1, 0),
        (BATCH * SEGMENT, 0),
        (BATCH * SEGMENT + 1, 1),
        (3 * BATCH * SEGMENT + 3 * SEGMENT + 17, 70_001),
    ],
)
async def test_sealed_file_arrives_whole_from_any_offset(
    open_file: Callable[..., int], size: int, offset: int
) -> None:
    whole = pattern(size)
    source, target = open_file("source", whole), open_file("target", whole[:offset])
    sent, received = Progress(), Progress()
    ours, theirs = blake3(whole[:offset]), blake3(whole[:offset])
    agreed = agree(size, offset)

    async def sending() -> None:
        await send(
            a,
            source,
            offset=offset,
            length=size - offset,
            hasher=ours,
            progress=sent,
            sealer=agreed.sealer(),
        )
        await a.aclose()

    opener = agreed.opener()
    async with connection() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(sending)
        await receive(
            b,
            target,
            offset=offset,
            length=size - offset,
            hasher=theirs,
            progress=received,
            opener=opener,
        )
    assert opener.complete
    assert content(target) == whole
    assert ours.digest() == theirs.digest() == blake3(whole).digest()
    assert (sent.offset, received.offset) == (size, size)


async def test_nothing_of_the_file_is_seen_on_the_way(open_file: Callable[..., int]) -> None:
    whole = pattern(2 * SEGMENT)
    source = open_file("source", whole)
    sealer = agree(len(whole)).sealer()
    async with connection() as (a, b), trio.open_nursery() as nursery:
        came = bytearray()

        async def receiving() -> None:
            while data := await b.receive_some(CHUNK):
                came.extend(data)

        nursery.start_soon(receiving)
        await send(
            a,
            source,
            offset=0,
            length=len(whole),
            hasher=None,
            progress=Progress(),
            sealer=sealer,
        )
        await a.aclose()
    assert len(came) == HEADER + sealed_length(len(whole))
    assert bytes(came[:HEADER]) == sealer.header
    assert not any(whole[i : i + 16] in came for i in range(0, len(whole), 16))


async def refused(
    target: int, stream: bytes, size: int, *, progress: Progress, hasher: blake3 | None = None
) -> TransferError:
    """Receive a sealed file from a sender that says just this, and hangs up; why it fails."""
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            with suppress(trio.BrokenResourceError):  # it is refused before its end
                await a.send_all(stream)
            await a.aclose()

        nursery.start_soon(sending)
        with pytest.raises(TransferError) as caught:
            await receive(
                b,
                target,
                offset=0,
                length=size,
                hasher=hasher,
                progress=progress,
                opener=agree(size).opener(),
            )
        await trio.aclose_forcefully(b)
    return caught.value


SIZE = BATCH * SEGMENT + 3 * SEGMENT + 9


@pytest.mark.parametrize(
    "cut",
    [
        0,
        HEADER - 1,
        HEADER,
        HEADER + 1,
        HEADER + WHOLE - 1,
        HEADER + WHOLE,
        HEADER + (BATCH + 2) * WHOLE + 7,
        HEADER + sealed_length(SIZE) - 1,
    ],
)
async def test_sealed_stream_that_is_cut_leaves_its_whole_segments(
    open_file: Callable[..., int], cut: int
) -> None:
    whole = pattern(SIZE)
    target, progress, hasher = open_file("target"), Progress(), blake3()
    stream = b"".join(sealed(agree(SIZE), whole))[:cut]
    error = await refused(target, stream, SIZE, progress=progress, hasher=hasher)
    assert isinstance(error, TruncatedError)
    kept = max(0, cut - HEADER) // WHOLE * SEGMENT
    assert progress.offset == kept
    assert content(target) == whole[:kept]
    assert hasher.digest() == blake3(whole[:kept]).digest()


@pytest.mark.parametrize("number", [0, 1, BATCH, BATCH + 2, BATCH + 3])
async def test_no_byte_that_is_not_genuine_is_written(
    open_file: Callable[..., int], number: int
) -> None:
    whole = pattern(SIZE)
    target, progress, hasher = open_file("target"), Progress(), blake3()
    stream = bytearray(b"".join(sealed(agree(SIZE), whole)))
    stream[HEADER + number * WHOLE] ^= 1
    error = await refused(target, bytes(stream), SIZE, progress=progress, hasher=hasher)
    assert isinstance(error, IntegrityError)
    assert progress.offset <= number * SEGMENT
    assert content(target) == whole[: progress.offset]
    assert hasher.digest() == blake3(content(target)).digest()


@pytest.mark.parametrize("size", [0, 5])
async def test_end_that_nobody_sealed_is_no_end(
    open_file: Callable[..., int], size: int
) -> None:
    """That a file is empty is proved like every other content."""
    stream = b"".join(sealed(agree(size), pattern(size)))
    target = open_file("target")
    error = await refused(target, stream[:HEADER], size, progress=Progress())
    assert isinstance(error, TruncatedError)
    error = await refused(target, stream + b"!", size, progress=Progress())
    assert "sent more than" in str(error)
    forged = b"".join(sealed(agree(size, sender=MALLORY), pattern(size)))
    error = await refused(target, forged, size, progress=Progress())
    assert isinstance(error, IntegrityError)


async def test_sealed_source_that_shrinks_is_told(open_file: Callable[..., int]) -> None:
    source = open_file("source", pattern(SEGMENT + 5))
    async with connection() as (a, _):
        with pytest.raises(ChangedError, match="shorter"):
            await send(
                a,
                source,
                offset=0,
                length=SEGMENT + 6,
                hasher=None,
                progress=Progress(),
                sealer=agree(SEGMENT + 6).sealer(),
            )


async def test_sender_counts_what_went_out_in_whole_segments(
    open_file: Callable[..., int],
) -> None:
    """And not at all the part of one that nobody can open."""
    size = 200 * SEGMENT
    source, progress = open_file("source", bytes(size)), Progress()
    async with connection() as (a, b):
        with pytest.raises(StalledError):
            await send(
                a,
                source,
                offset=0,
                length=size,
                hasher=None,
                progress=progress,
                idle_timeout=0.05,
                sealer=agree(size).sealer(),
            )
        await a.aclose()
        came = 0
        with suppress(trio.BrokenResourceError):
            while data := await b.receive_some(CHUNK):
                came += len(data)
    assert 0 < progress.offset < size
    assert progress.offset % SEGMENT == 0
    assert progress.offset >= (came - HEADER) // WHOLE * SEGMENT


# Throttled


class Recorder:
    """A throttle that writes down what it is asked, and lets the test say how long."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.taken: list[int] = []
        self.limits = 0
        self._seconds = seconds

    def take(self, count: int, /, limits: int) -> float:
        self.taken.append(count)
        return self._seconds(count)


class NoTime(threading.Event):
    """Whoever waits for this comes back at once, and is told what the test says."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self._answer = answer

    def wait(self, timeout: float | None = None) -> bool:
        return self._answer


@pytest.mark.parametrize("way", ["kernel", "copying", "sealed"])
async def test_both_ends_count_every_byte_of_the_bytestream(
    open_file: Callable[..., int], way: str
) -> None:
    size = 3 * CHUNK + 5
    whole = pattern(size)
    source, target = open_file("source", whole), open_file("target")
    ours, theirs = Recorder(lambda _: 0.0), Recorder(lambda _: 0.0)
    agreed = agree(size)
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            await send(
                a,
                source,
                offset=0,
                length=size,
                hasher=blake3() if way == "copying" else None,
                progress=Progress(),
                throttle=ours,
                sealer=agreed.sealer() if way == "sealed" else None,
            )
            await a.aclose()

        nursery.start_soon(sending)
        await receive(
            b,
            target,
            offset=0,
            length=size,
            hasher=None,
            progress=Progress(),
            throttle=theirs,
            opener=agreed.opener() if way == "sealed" else None,
        )
    assert content(target) == whole
    wire = HEADER + sealed_length(size) if way == "sealed" else size
    assert sum(ours.taken) == sum(theirs.taken) == wire


def test_steps_are_as_large_as_the_limit_allows() -> None:
    """A pause ends before the peer loses patience, and a fast limit costs no more steps."""
    work = Work(0, 1 << 40, None, Progress(), Recorder(lambda count: count / 8192 - 0.1))
    work.stop = NoTime(False)
    sizes = []
    for _ in range(12):
        sizes.append(work.turn)
        work.pause(work.turn)
    assert all(1024 <= size <= 8192 for size in sizes)
    fast = Work(0, 1 << 40, None, Progress(), Recorder(lambda _: 0.0))
    for _ in range(10):
        fast.pause(fast.turn)
    assert fast.turn == CHUNK
    slow = Work(0, 1 << 40, None, Progress(), Recorder(lambda _: 3600.0))
    slow.turn = CHUNK
    slow.stop = NoTime(False)
    slow.pause(1)
    assert slow.turn == 1024
    assert Work(0, 1, None, Progress()).turn == CHUNK


@pytest.mark.parametrize("lifted", [False, True])
def test_pause_ends_when_the_limit_changes_and_a_small_step_is_next(lifted: bool) -> None:
    throttle = Recorder(lambda _: 80.0)
    work = Work(0, 1 << 40, None, Progress(), throttle)
    work.turn = CHUNK
    waits: list[float | None] = []

    class Changing(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            throttle.limits += lifted and len(waits) == 8
            return False

    work.stop = Changing()
    work.pause(CHUNK)
    assert sum(filter(None, waits)) == (2.0 if lifted else 80.0)
    assert max(filter(None, waits)) == 0.25
    assert work.turn == 1024 if lifted else 3276


def test_four_transfers_that_are_suddenly_slowed_down_wait_less_than_their_peers() -> None:
    """Each is in the middle of the largest step, without a limit until now."""
    now = 0.0
    bucket = Bucket()
    throttle = Throttle([bucket], clock=lambda: now, lock=nullcontext())
    works = [Work(0, 1 << 40, None, Progress(), throttle) for _ in range(4)]
    waited = {id(work): 0.0 for work in works}

    class Counted(threading.Event):
        def __init__(self, work: Work) -> None:
            super().__init__()
            self._work = id(work)

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waited[self._work] += timeout
            return False

    for work in works:
        work.stop = Counted(work)
        work.turn = CHUNK
    bucket.rate = 50 * 1024
    due = {id(work): 0.0 for work in works}
    longest = 0.0
    while now < 20:
        work = min(works, key=lambda work: due[id(work)])
        now = max(now, due[id(work)])
        waited[id(work)] = 0.0
        work.pause(work.turn)
        due[id(work)] = now + waited[id(work)]
        longest = max(longest, waited[id(work)])
    assert 0.0 < longest < 5.0


def test_nobody_waits_after_the_last_byte() -> None:
    """For a minute, here; the throttle remembers it for those who come next."""
    progress = Progress(0)
    work = Work(0, 5, None, progress, Recorder(lambda _: 60.0))
    progress.offset = 5
    work.stop = NoTime(True)
    work.pause(5)
    progress.offset = 4
    with pytest.raises(StoppedError):
        work.pause(1)


@pytest.mark.parametrize("receiving", [False, True])
async def test_cancelling_ends_the_pause_of_a_throttle(
    open_file: Callable[..., int], receiving: bool
) -> None:
    source = open_file("source", bytes(CHUNK))
    target = open_file("target")
    progress, throttle = Progress(), Recorder(lambda _: 3600.0)
    async with connection() as (a, b):
        if receiving:
            await a.send_all(bytes(5000))
        with trio.fail_after(20), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def cancelling() -> None:
                    await until(lambda: bool(throttle.taken))
                    scope.cancel()

                nursery.start_soon(cancelling)
                if receiving:
                    await receive(
                        b,
                        target,
                        offset=0,
                        length=CHUNK,
                        hasher=None,
                        progress=progress,
                        throttle=throttle,
                    )
                else:
                    await send(
                        a,
                        source,
                        offset=0,
                        length=CHUNK,
                        hasher=None,
                        progress=progress,
                        throttle=throttle,
                    )
    assert scope.cancelled_caught
    # Moved, counted and, at the receiver, written before the pause: nothing of it is lost.
    assert progress.offset == sum(throttle.taken) > 0
    assert os.fstat(target).st_size == (progress.offset if receiving else 0)


async def test_what_a_throttle_takes_is_no_silence_of_the_peer(
    open_file: Callable[..., int],
) -> None:
    """Each pause is longer than the patience with the peer."""
    whole = pattern(8192)
    source, target = open_file("source", whole), open_file("target")
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            await send(
                a,
                source,
                offset=0,
                length=8192,
                hasher=None,
                progress=Progress(),
                idle_timeout=0.04,
                throttle=Recorder(lambda _: 0.05),
            )
            await a.aclose()

        nursery.start_soon(sending)
        await receive(b, target, offset=0, length=8192, hasher=None, progress=Progress())
    assert content(target) == whole


async def test_limit_holds_and_can_be_lifted_on_the_way(open_file: Callable[..., int]) -> None:
    """At 64 KiB a second these four megabytes would take a minute."""
    whole = pattern(4 << 20)
    source, target = open_file("source", whole), open_file("target")
    bucket, progress = Bucket(64 << 10), Progress()
    throttle = Throttle([bucket], clock=time.monotonic, lock=threading.Lock())
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            await send(
                a,
                source,
                offset=0,
                length=len(whole),
                hasher=None,
                progress=Progress(),
                throttle=throttle,
            )
            await a.aclose()

        async def lifting() -> None:
            await until(lambda: progress.offset > 0)
            assert progress.offset < len(whole) / 2
            bucket.rate = math.inf

        nursery.start_soon(sending)
        nursery.start_soon(lifting)
        with trio.fail_after(30):
            await receive(
                b, target, offset=0, length=len(whole), hasher=None, progress=progress
            )
    assert content(target) == whole


# Of unknown length


@pytest.mark.parametrize("size", [0, 1, CHUNK + 1])
async def test_file_of_unknown_length_ends_where_the_bytestream_does(
    open_file: Callable[..., int], size: int
) -> None:
    whole, target, progress = pattern(size), open_file("target"), Progress()
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            await a.send_all(whole)
            await a.aclose()

        nursery.start_soon(sending)
        await receive(
            b,
            target,
            offset=0,
            length=1 << 40,
            until_end=True,
            hasher=None,
            progress=progress,
        )
    assert content(target) == whole
    assert progress.offset == size


@pytest.mark.parametrize("size", [4, 5])
async def test_file_of_unknown_length_has_a_limit(
    open_file: Callable[..., int], size: int
) -> None:
    target = open_file("target")
    async with connection() as (a, b):
        await a.send_all(b"FILES"[:size])
        await a.aclose()
        expectation = pytest.raises(IntegrityError, match="sent more") if size > 4 else None
        with expectation or nullcontext():
            await receive(
                b,
                target,
                offset=0,
                length=4,
                until_end=True,
                hasher=None,
                progress=Progress(),
            )
    assert content(target) == b"FILE"


# The rest


async def test_little_waits_unsent_at_the_sender() -> None:
    """What the kernel took counts as sent, but it is lost with the connection.

    Trio sets this limit for every stream; without it, it would be up to 4 MiB.
    """
    async with connection() as (a, _):
        limit = a.getsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NOTSENT_LOWAT)
        assert 0 < limit <= 64 << 10


def test_disk_error_is_told_with_what_to_do() -> None:
    error = datathread._file_error("written", OSError(5, "Input/output error"))
    assert isinstance(error, TransferError)
    assert "look at the disk" in error.hint
