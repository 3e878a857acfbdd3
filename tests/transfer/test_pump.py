import hashlib
import itertools
import os
import random
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, closing, nullcontext, suppress
from pathlib import Path

import pytest
import trio
from blake3 import blake3
from trio.testing import wait_all_tasks_blocked

from syncd.disk.blocks import MIN_BLOCK
from syncd.disk.partial import PartialFile, key_of
from syncd.errors import (
    ChangedError,
    ErrorType,
    IntegrityError,
    StalledError,
    SyncdError,
    TransferError,
    TruncatedError,
)
from syncd.transfer import pump
from syncd.transfer.datathread import CHUNK
from syncd.transfer.pump import Progress, hash_prefix, prove, receive, send
from syncd.xmpp.jid import JID
from tests.support.processes import until as looking_until
from tests.support.steps import cancelled_at, open_sockets
from tests.support.tcp import connection, pattern, until

SLOW, FAST = JID.parse("slow@example.org"), JID.parse("fast@example.org")

# Reset instead of an orderly end, when the socket is closed.
RESET = b"\1\0\0\0" + bytes(4)


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


@pytest.mark.parametrize("sender_hashes", [False, True])
@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (0, 0),
        (1, 0),
        (1, 1),
        (CHUNK, 0),
        (CHUNK + 1, 1),
        (3 * CHUNK - 1, 0),
        (5 * CHUNK + 17, CHUNK + 3),
    ],
)
async def test_a_file_arrives_whole_from_any_offset(
    open_file: Callable[..., int], size: int, offset: int, sender_hashes: bool
) -> None:
    """Resumed or not, both ends know the hash of the whole file afterwards."""
    whole = pattern(size)
    source, target = open_file("source", whole), open_file("target", whole[:offset])
    sent, received = Progress(), Progress()
    ours, theirs = blake3(), blake3()
    await hash_prefix(target, offset, theirs)
    if sender_hashes:
        await hash_prefix(source, offset, ours)

    async def sending() -> None:
        hasher = ours if sender_hashes else None
        left = size - offset
        await send(a, source, offset=offset, length=left, hasher=hasher, progress=sent)
        await a.aclose()

    async with connection() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(sending)
        left = size - offset
        await receive(b, target, offset=offset, length=left, hasher=theirs, progress=received)
    assert content(target) == whole
    assert theirs.digest() == blake3(whole).digest()
    if sender_hashes:
        assert ours.digest() == blake3(whole).digest()
    assert (sent.offset, received.offset) == (size, size)


async def test_only_the_part_that_was_asked_for_is_sent(open_file: Callable[..., int]) -> None:
    """A file that has grown since the offer is sent as long as it was offered."""
    source = open_file("source", b"0123456789")
    for hasher in (None, blake3()):
        async with connection() as (a, b):
            await send(a, source, offset=2, length=5, hasher=hasher, progress=Progress())
            await a.aclose()
            assert await b.receive_some(100) == b"23456"
            assert await b.receive_some(100) == b""


async def test_a_source_on_a_file_system_without_sendfile_is_copied(
    open_file: Callable[..., int],
) -> None:
    """Linux 5.10 and later do not send from most of /proc, for one."""
    fd = os.open("/proc/self/environ", os.O_RDONLY)
    try:
        expected = content(fd)
        assert expected
        async with connection() as (a, b):
            length = len(expected)
            await send(a, fd, offset=0, length=length, hasher=None, progress=Progress())
            await a.aclose()
            arrived = b""
            while data := await b.receive_some(CHUNK):
                arrived += data
    finally:
        os.close(fd)
    assert arrived == expected


async def test_what_the_receiver_says_does_not_destroy_the_tail(
    open_file: Callable[..., int],
) -> None:
    """A socket that is closed with bytes unread is reset, and loses what is on its way."""
    whole = pattern(100_000)
    source = open_file("source", whole)
    async with connection() as (a, b):
        await b.send_all(b"thanks")
        await send(a, source, offset=0, length=len(whole), hasher=None, progress=Progress())
        await a.aclose()
        arrived = b""
        while data := await b.receive_some(CHUNK):
            arrived += data
    assert arrived == whole


@pytest.mark.parametrize("reset", [False, True])
async def test_a_sender_that_hangs_up_early_leaves_what_it_sent(
    open_file: Callable[..., int], reset: bool
) -> None:
    whole = pattern(10_000)
    target = open_file("target")
    progress, hasher = Progress(), blake3()
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            await a.send_all(whole[:4_000])
            await until(lambda: progress.offset == 4_000)
            if reset:
                a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            await a.aclose()

        nursery.start_soon(sending)
        with pytest.raises(TruncatedError, match="after 4,000 of 10,000 bytes") as caught:
            await receive(b, target, offset=0, length=10_000, hasher=hasher, progress=progress)
    assert ("reset" in str(caught.value)) == reset
    assert caught.value.type is ErrorType.WAIT
    assert content(target) == whole[:4_000]
    assert hasher.digest() == blake3(whole[:4_000]).digest()


@pytest.mark.parametrize("hasher", [None, blake3()])
async def test_a_receiver_that_hangs_up_ends_the_sending(
    open_file: Callable[..., int], hasher: blake3 | None
) -> None:
    source = open_file("source")
    os.truncate(source, 1 << 30)
    progress = Progress()
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def receiving() -> None:
            await b.receive_some(1000)
            await b.aclose()

        nursery.start_soon(receiving)
        with pytest.raises(TruncatedError, match="the receiver hung up after"):
            await send(a, source, offset=0, length=1 << 30, hasher=hasher, progress=progress)
    assert 1000 <= progress.offset < 1 << 30


@pytest.mark.parametrize("size", [0, 4])
async def test_more_bytes_than_offered_are_found_out(
    open_file: Callable[..., int], size: int
) -> None:
    target = open_file("target")
    async with connection() as (a, b):
        await a.send_all(b"FILE and more")
        await a.aclose()
        with pytest.raises(IntegrityError, match="sent more than"):
            await receive(b, target, offset=0, length=size, hasher=None, progress=Progress())
    assert content(target) == b"FILE"[:size]


async def test_more_bytes_are_found_out_when_they_come_later(
    open_file: Callable[..., int],
) -> None:
    target, progress = open_file("target"), Progress()
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            await a.send_all(b"FILE")
            await until(lambda: progress.offset == 4)
            await a.send_all(b"!")

        nursery.start_soon(sending)
        with pytest.raises(IntegrityError):
            await receive(
                b,
                target,
                offset=0,
                length=4,
                hasher=None,
                progress=progress,
                surplus_timeout=60,
            )


@pytest.mark.parametrize("reset", [False, True])
async def test_the_end_may_come_in_any_way_or_not_at_all(
    open_file: Callable[..., int], reset: bool
) -> None:
    """XMPPFramework and QXmpp wait for us to close; others reset."""
    target, progress = open_file("target"), Progress()
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            await a.send_all(b"FILE")
            await until(lambda: progress.offset == 4)
            if reset:
                a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                await a.aclose()

        nursery.start_soon(sending)
        await receive(
            b,
            target,
            offset=0,
            length=4,
            hasher=None,
            progress=progress,
            surplus_timeout=60 if reset else 0.01,
        )
    assert content(target) == b"FILE"


async def test_a_sender_that_falls_silent_is_given_up(open_file: Callable[..., int]) -> None:
    target, progress = open_file("target"), Progress()
    async with connection() as (a, b):
        await a.send_all(b"FILE")
        with pytest.raises(StalledError, match=r"for 0\.05 seconds"):
            await receive(
                b,
                target,
                offset=0,
                length=9,
                hasher=None,
                progress=progress,
                idle_timeout=0.05,
            )
    assert content(target) == b"FILE"
    assert progress.offset == 4


@pytest.mark.parametrize("hasher", [None, blake3()])
async def test_a_receiver_that_takes_nothing_is_given_up(
    open_file: Callable[..., int], hasher: blake3 | None
) -> None:
    source, progress = open_file("source"), Progress()
    os.truncate(source, 1 << 30)
    async with connection() as (a, _):
        with pytest.raises(StalledError):
            await send(
                a,
                source,
                offset=0,
                length=1 << 30,
                hasher=hasher,
                progress=progress,
                idle_timeout=0.05,
            )
    assert 0 < progress.offset < 1 << 30


@pytest.mark.parametrize("hasher", [None, blake3()])
async def test_a_source_that_shrinks_is_told(
    open_file: Callable[..., int], hasher: blake3 | None
) -> None:
    source = open_file("source", b"0123456789")
    async with connection() as (a, _):
        with pytest.raises(ChangedError, match="10 bytes instead of 20"):
            await send(a, source, offset=0, length=20, hasher=hasher, progress=Progress())
    with pytest.raises(ChangedError):
        await hash_prefix(source, 20, blake3())


async def test_a_full_disk_is_waited_for() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        async with connection() as (a, b):
            await a.send_all(b"FILE")
            with pytest.raises(TransferError, match="No space left") as caught:
                await receive(b, fd, offset=0, length=4, hasher=None, progress=Progress())
    finally:
        os.close(fd)
    assert caught.value.type is ErrorType.WAIT
    assert "make room" in caught.value.hint


async def test_a_file_too_big_for_its_file_system_is_not_tried_again(
    open_file: Callable[..., int],
) -> None:
    """What fits is written and counted; the rest needs a person."""
    target, progress, hasher = open_file("target"), Progress(), blake3()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
    try:
        async with connection() as (a, b):
            await a.send_all(b"0123456789")
            with pytest.raises(TransferError, match="too large") as caught:
                await receive(b, target, offset=0, length=10, hasher=hasher, progress=progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.type is ErrorType.CANCEL
    assert content(target) == b"012345"
    assert progress.offset == 6
    assert hasher.digest() == blake3(b"012345").digest()


@pytest.mark.parametrize("hasher", [None, blake3()])
async def test_a_file_that_cannot_be_read_is_told(
    tmp_path: Path, hasher: blake3 | None
) -> None:
    fd = os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
    try:
        async with connection() as (a, _):
            with pytest.raises(TransferError, match="cannot be read: Bad file descriptor"):
                await send(a, fd, offset=0, length=1, hasher=hasher, progress=Progress())
    finally:
        os.close(fd)


async def test_a_stream_that_is_closed_already_is_told(open_file: Callable[..., int]) -> None:
    source = open_file("source", b"F")
    async with connection() as (a, _):
        await a.aclose()
        with pytest.raises(TransferError, match="cannot be used") as caught:
            await send(a, source, offset=0, length=1, hasher=None, progress=Progress())
    assert "LimitNOFILE" in caught.value.hint


async def test_a_negative_length_is_our_own_mistake(open_file: Callable[..., int]) -> None:
    source = open_file("source", b"F")
    async with connection() as (a, b):
        for function in (send, receive):
            with pytest.raises(ValueError, match="-1 bytes"):
                await function(a, source, offset=1, length=-1, hasher=None, progress=Progress())
        await b.aclose()


async def test_a_cancelled_receiver_has_on_disk_what_it_counted(
    open_file: Callable[..., int],
) -> None:
    """Even while more pours in: the thread stops at once, and is not left behind."""
    target, progress, hasher = open_file("target"), Progress(), blake3()
    block = pattern(CHUNK)
    async with connection() as (a, b), trio.open_nursery() as nursery:

        async def sending() -> None:
            with suppress(trio.BrokenResourceError):  # how the cancelled receiver looks
                while True:
                    await a.send_all(block)

        nursery.start_soon(sending)
        with trio.CancelScope() as scope:

            async def cancelling() -> None:
                await until(lambda: progress.offset > 3 * CHUNK)
                scope.cancel()

            nursery.start_soon(cancelling)
            await receive(b, target, offset=0, length=1 << 40, hasher=hasher, progress=progress)
        assert scope.cancelled_caught
        await b.aclose()
    written = os.fstat(target).st_size
    assert written == progress.offset
    assert hasher.digest() == blake3(content(target)).digest()


@pytest.mark.parametrize("hasher", [None, blake3()])
async def test_a_cancelled_sender_that_waits_is_woken(
    open_file: Callable[..., int], hasher: blake3 | None
) -> None:
    source, progress = open_file("source"), Progress()
    os.truncate(source, 1 << 30)
    async with connection() as (a, _):
        with trio.move_on_after(0.05) as scope:
            await send(a, source, offset=0, length=1 << 30, hasher=hasher, progress=progress)
    assert scope.cancelled_caught
    assert 0 < progress.offset < 1 << 30


async def test_bytestreams_from_an_address_that_has_gone_are_cut(
    open_file: Callable[..., int],
) -> None:
    """In both directions; what arrived stays. The others do not notice."""
    source, target, progress = open_file("source"), open_file("target"), Progress()
    os.truncate(source, 1 << 30)
    assert pump.cut_lost(lambda host: False) == 0

    async def sending(stream: trio.SocketStream) -> None:
        with pytest.raises(TruncatedError):
            await send(
                stream, source, offset=0, length=1 << 30, hasher=None, progress=Progress()
            )

    async def receiving(stream: trio.SocketStream) -> None:
        with pytest.raises(TruncatedError):
            await receive(stream, target, offset=0, length=9, hasher=None, progress=progress)

    async with connection() as (a, _), connection() as (b, c), trio.open_nursery() as nursery:
        nursery.start_soon(sending, a)
        nursery.start_soon(receiving, b)
        await c.send_all(b"FILE")
        await until(lambda: progress.offset == 4)
        hosts: list[str] = []

        def ours(host: str) -> bool:
            hosts.append(host)
            return True

        assert pump.cut_lost(ours) == 0
        assert hosts == ["127.0.0.1"] * 2
        assert pump.cut_lost(lambda host: False) == 2
    assert content(target) == b"FILE"
    assert pump.cut_lost(lambda host: False) == 0


async def test_what_goes_through_the_server_hangs_on_no_address(
    open_file: Callable[..., int],
) -> None:
    ours, theirs = trio.socket.socketpair()
    target, progress = open_file("target"), Progress()
    async with (
        trio.SocketStream(ours) as stream,
        trio.SocketStream(theirs) as peer,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(
            lambda: receive(stream, target, offset=0, length=4, hasher=None, progress=progress)
        )
        await wait_all_tasks_blocked()
        assert pump.cut_lost(lambda host: False) == 0
        await peer.send_all(b"FILE")
    assert content(target) == b"FILE"


async def test_hashing_can_be_cancelled(open_file: Callable[..., int]) -> None:
    source, hasher = open_file("source"), blake3()
    os.truncate(source, 1 << 42)
    with trio.move_on_after(0.05) as scope:
        await hash_prefix(source, 1 << 42, hasher)
    assert scope.cancelled_caught


@pytest.fixture
async def busy_disk() -> AsyncIterator[None]:
    """All that may read much is at it, for this peer and for all others."""
    blocked = threading.Event()
    async with trio.open_nursery() as nursery:
        for number in range(pump.HASH_THREADS):
            peer = (SLOW, FAST)[number % 2]
            nursery.start_soon(pump.threads("hash").run, blocked.wait, peer)
        await wait_all_tasks_blocked()
        assert pump.threads("hash").limiter.available_tokens == 0
        try:
            yield
        finally:
            blocked.set()


async def test_who_has_little_to_hash_waits_for_nobody(
    busy_disk: None, open_file: Callable[..., int], tmp_path: Path
) -> None:
    """After a restart huge files are proved for hours; small ones and new ones come at once."""
    whole = pattern(300_000)
    source = open_file("source", whole)
    key = key_of("a@b", "f", "p", len(whole), 1)
    for start in (0, 250_000, 300_000):
        with trio.fail_after(20), closing(PartialFile(tmp_path, key, len(whole))) as partial:
            assert await prove(partial, SLOW) == start
            hasher = blake3()
            await hash_prefix(source, start, hasher, SLOW)
            assert hasher.digest() == partial.blocks.digest()
            end = 300_000 if start else 250_000
            os.pwrite(partial.fd, whole[start:end], start)
            partial.blocks.update(memoryview(whole[start:end]))


async def test_who_has_much_to_hash_waits_for_others_that_do(
    busy_disk: None, open_file: Callable[..., int]
) -> None:
    source = open_file("source")
    os.truncate(source, pump.LITTLE + 1)
    with trio.move_on_after(0.05) as scope:
        await hash_prefix(source, pump.LITTLE + 1, blake3(), SLOW)
    assert scope.cancelled_caught
    with trio.fail_after(20):
        await hash_prefix(source, pump.LITTLE, blake3(), SLOW)


async def test_no_more_threads_move_data_than_there_are(open_file: Callable[..., int]) -> None:
    """The next waits for its turn, and can be cancelled meanwhile; who sends does not wait."""
    source, target = open_file("source", b"FILE"), open_file("target")
    limiter = pump.threads("in").limiter
    assert limiter.total_tokens == pump.IN_THREADS == 32
    async with trio.open_nursery() as nursery:
        held = [object() for _ in range(pump.IN_THREADS)]
        for each in held:
            limiter.acquire_on_behalf_of_nowait(each)
        async with connection() as (a, b):
            await send(a, source, offset=0, length=4, hasher=None, progress=Progress())
            with trio.move_on_after(0.05) as scope:
                await receive(b, target, offset=0, length=4, hasher=None, progress=Progress())
            assert scope.cancelled_caught
        for each in held:
            limiter.release_on_behalf_of(each)
        nursery.cancel_scope.cancel()
    assert content(target) == b""
    assert limiter.borrowed_tokens == 0


async def test_peer_whose_transfers_never_end_has_only_its_share(
    open_file: Callable[..., int],
) -> None:
    """Far more of its streams than threads carry nothing; another peer's file comes at once."""
    target = open_file("target")
    share = pump.PEER_THREADS
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for number in range(pump.IN_THREADS + share):
            _, stream = await stack.enter_async_context(connection())
            file = open_file(f"slow{number}")

            async def silent(stream: trio.SocketStream = stream, file: int = file) -> None:
                progress = Progress()
                await receive(
                    stream, file, offset=0, length=1, hasher=None, progress=progress, peer=SLOW
                )

            nursery.start_soon(silent)
        await wait_all_tasks_blocked()
        assert pump.threads("in").limiter.borrowed_tokens == share < pump.IN_THREADS
        a, b = await stack.enter_async_context(connection())
        await a.send_all(b"FILE")
        await a.aclose()
        progress = Progress()
        with trio.fail_after(20):
            await receive(
                b, target, offset=0, length=4, hasher=None, progress=progress, peer=FAST
            )
            # What must be hashed first waits for none of them, not even the same peer's.
            await hash_prefix(target, 4, blake3(), SLOW)
        nursery.cancel_scope.cancel()
    assert content(target) == b"FILE"


def test_short_transfers_are_admitted_as_many_as_have_a_thread_soon() -> None:
    admission = pump.Admission()
    for number in range(pump.PEER_THREADS * pump.MAX_QUEUED):
        assert admission.has_share(SLOW, 0.0, short=True)
        admission.begin(number, SLOW, 0.0, short=True)
    assert not admission.has_share(SLOW, 0.0, short=True)
    for number in range(pump.PEER_THREADS, pump.PEER_THREADS * pump.MAX_QUEUED):
        admission.end(number)
    assert admission.has_share(SLOW, pump.SOON - 1, short=True)
    # By now those that are left are slow ones; of their threads none is free soon.
    assert not admission.has_share(SLOW, pump.SOON, short=True)
    assert admission.has_share(FAST, pump.SOON, short=True)
    assert admission.has_room(pump.SOON, short=True)
    admission.end(0)
    admission.end(0)
    for number in range(100, 100 + pump.MAX_QUEUED):
        assert admission.has_share(SLOW, pump.SOON, short=True)
        admission.begin(number, SLOW, pump.SOON, short=True)
    assert not admission.has_share(SLOW, pump.SOON, short=True)


def test_huge_transfers_are_admitted_as_many_as_there_are_threads() -> None:
    """Whatever waits behind one of them, waits longer than its sender does."""
    admission = pump.Admission()
    peers = [JID.parse(f"p{number}@example.org") for number in range(12)]
    accepted = 0
    for peer in peers * pump.MAX_QUEUED:
        if admission.has_share(peer, 0.0, short=False) and admission.has_room(0.0, short=False):
            admission.begin(accepted, peer, 0.0, short=False)
            accepted += 1
    assert accepted == pump.IN_THREADS
    assert not admission.has_room(0.0, short=True)
    # One that takes the place of another needs no further thread.
    assert admission.has_room(0.0, short=False, replaced=0)
    assert not admission.has_room(0.0, short=False)
    admission.end(0)
    # Nor is there one that waits for those that may be short.
    admission.begin(0, SLOW, 0.0, short=True)
    assert not admission.has_room(0.0, short=False)
    assert admission.has_room(0.0, short=True)


def test_share_of_one_peer_is_all_that_it_takes_from_the_others() -> None:
    """Who is never refused for its own share waits in its own queue, however long that is."""
    for short, now in itertools.product((True, False), (0.0, pump.SOON)):
        admission = pump.Admission()
        for number in range(2 * pump.IN_THREADS):
            admission.begin(number, SLOW, 0.0, short=short)
        assert not admission.has_share(SLOW, now, short=False)
        for number in range(pump.IN_THREADS - pump.PEER_THREADS):
            assert admission.has_room(now, short=False)
            assert admission.has_room(now, short=True)
            peer = JID.parse(f"p{number}@example.org")
            assert admission.has_share(peer, now, short=False)
            admission.begin(peer, peer, now, short=False)
        assert not admission.has_room(now, short=False)


def test_all_threads_together_have_their_limit_as_well() -> None:
    admission = pump.Admission()
    for number in range(pump.IN_THREADS):
        admission.begin(number, JID.parse(f"p{number}@example.org"), 0.0, short=True)
    assert admission.has_room(0.0, short=True)
    assert not admission.has_room(pump.SOON, short=True)
    assert admission.has_share(FAST, pump.SOON, short=True)


def test_patience_grows_with_what_is_hashed_first_and_not_without_end() -> None:
    assert pump.hashing_time(0) == 0.0
    assert pump.hashing_time(3_600_000_000) == 720.0
    assert pump.hashing_time(1 << 60) == pump.MAX_HASHING


async def test_cancelling_at_any_step_leaves_no_socket_open(
    open_file: Callable[..., int],
) -> None:
    source, target = open_file("source", pattern(1000)), open_file("target")
    step, cancelled = 0, True
    while cancelled:
        step += 1
        async with connection() as (a, b):
            before = open_sockets()

            async def whole(a: trio.SocketStream = a, b: trio.SocketStream = b) -> None:
                hasher = blake3()
                await send(a, source, offset=0, length=1000, hasher=hasher, progress=Progress())
                await a.aclose()
                await receive(
                    b, target, offset=0, length=1000, hasher=None, progress=Progress()
                )

            cancelled = await cancelled_at(step, whole)
            await a.aclose()
            assert open_sockets() == before - 1, f"cancelled at step {step}"
            assert pump.threads("in").limiter.borrowed_tokens == 0
            assert pump.threads("out").limiter.borrowed_tokens == 0
    assert step > 5
    assert content(target) == pattern(1000)


async def test_a_bug_in_the_thread_is_not_hidden(open_file: Callable[..., int]) -> None:
    class Broken:
        def update(self, data: memoryview, /) -> object:
            raise ZeroDivisionError

    source = open_file("source", b"F")
    with pytest.raises(ZeroDivisionError):
        await hash_prefix(source, 1, Broken())
    assert not issubclass(ZeroDivisionError, SyncdError)


async def test_several_hashers_take_in_the_same(open_file: Callable[..., int]) -> None:
    hashers = blake3(), hashlib.md5()
    await hash_prefix(open_file("source", pattern(CHUNK + 5)), CHUNK + 5, pump.Hashers(hashers))
    assert hashers[0].digest() == blake3(pattern(CHUNK + 5)).digest()
    assert hashers[1].digest() == hashlib.md5(pattern(CHUNK + 5)).digest()


# Going on


async def test_what_has_arrived_is_proved_and_gone_on_from(
    tmp_path: Path, open_file: Callable[..., int]
) -> None:
    whole = pattern(300_000)
    source = open_file("source", whole)
    key = key_of("a@b", "f", "p", len(whole), 1)
    for cut in (100_000, 250_000, 300_000):
        with closing(PartialFile(tmp_path, key, len(whole))) as partial:
            start = await prove(partial)
            assert start == partial.offset == {100_000: 0, 250_000: 100_000}.get(cut, 250_000)
            progress = Progress()
            async with connection() as (a, b):
                await send(
                    a,
                    source,
                    offset=start,
                    length=cut - start,
                    hasher=None,
                    progress=Progress(),
                )
                await a.aclose()
                with pytest.raises(TruncatedError) if cut < 300_000 else nullcontext():
                    await receive(
                        b,
                        partial.fd,
                        offset=start,
                        length=len(whole) - start,
                        hasher=partial.blocks,
                        progress=progress,
                    )
            assert progress.offset == cut
            assert partial.blocks.digest() == blake3(whole[:cut]).digest()
    assert (tmp_path / ".syncd" / key).read_bytes() == whole


async def test_proving_can_be_cancelled(tmp_path: Path) -> None:
    class Huge(PartialFile):
        """As one of terabytes, whose blocks are all there."""

        def prove(self, stopped: Callable[[], bool] = bool) -> int:
            while not stopped():
                os.pread(self.fd, 1, 0)
            return 0

    with closing(Huge(tmp_path, key_of("a@b", "f", "p", 1, 1), 1)) as partial:
        partial.offset = 1 << 42
        with trio.move_on_after(0.05) as scope:
            await prove(partial)
        assert scope.cancelled_caught
    assert pump.threads("hash").limiter.borrowed_tokens == 0


RECEIVER = """
import socket, sys, trio
from pathlib import Path
from syncd.disk import blocks
from syncd.disk.partial import PartialFile
from syncd.transfer import pump

async def main(root, key, size, port):
    # Each attempt is short here, and the moment in which none is worth a note is most of it.
    blocks.FIRST_MOMENT = 0.0
    partial = PartialFile(root, key, size)
    claimed = partial.offset
    start = await pump.prove(partial)
    print(claimed, start, flush=True)
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await pump.receive(
        stream, partial.fd, offset=start, length=size - start, hasher=partial.blocks,
        progress=pump.Progress(),
    )
    partial.seal(None)
    print(partial.blocks.digest().hex(), flush=True)

trio.run(main, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
"""


def until_size(path: Path, size: int) -> None:
    looking_until(lambda: path.stat().st_size == size, f"{size} bytes")


def test_receiver_that_is_killed_loses_next_to_nothing(tmp_path: Path) -> None:
    """A real one, with -9, again and again until the file is there."""
    size = 8_000_000
    whole = pattern(size)
    key = key_of("a@b", "f", "p", size, 1)
    part = tmp_path / ".syncd" / key
    dice = random.Random(4)
    ends = [*sorted(dice.randrange(size) for _ in range(6)), size]
    start = 0
    for end in ends:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
            with subprocess.Popen(
                [sys.executable, "-c", RECEIVER, str(tmp_path), key, str(size), port],
                stdout=subprocess.PIPE,
                text=True,
            ) as receiver:
                assert receiver.stdout is not None
                claimed, proved = map(int, receiver.stdout.readline().split())
                # What it claimed before looking was right, and what was lost is less than a
                # block, and what one read of it had put on the disk before the note.
                assert claimed == proved
                assert start - MIN_BLOCK - CHUNK < proved <= start
                with server.accept()[0] as wire:
                    wire.sendall(whole[proved:end])
                    if end == size:
                        digest = receiver.stdout.readline().strip()
                    else:
                        until_size(part, end)
                        receiver.kill()
        start = end
    assert digest == blake3(whole).hexdigest()
    assert part.read_bytes() == whole


def test_progress_shows_where_it_is() -> None:
    assert repr(Progress(5)) == "<Progress 5>"
