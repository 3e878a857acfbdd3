"""C-13, C-15: the SOCKS5 listener is open to the world, and a transfer does not notice.

Only live sids, five seconds and some 300 bytes for a handshake, one winner for each address,
and never more sockets than are counted: shown beside a transfer that runs meanwhile.
"""

from __future__ import annotations

import contextlib
import resource
from typing import TYPE_CHECKING

import blake3
import pytest
import trio
import trio.testing

from syncd.bytestreams import ibb, s5b, sockets
from syncd.transfer import si
from tests.support.memory import resident
from tests.support.peers import ALICE, BOB, Peers, open_peers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

MIB = 1 << 20  # bytes
LARGE = 8 * MIB
FLOOD = 10_000  # connections
# How many of a flood are under way at a time, so that it is the listener that closes them.
AT_ONCE = 200  # connections

GREETING = b"\5\1\0"
WRONG = b"\5\1\0\3\x28" + b"0" * 40 + b"\0\0"
HOSTILE = {
    "silence": b"",
    "one byte": b"\5",
    "wrong hash": GREETING + WRONG,
    "half a request": GREETING + WRONG[:20],
    "endless methods": b"\5\xff" + b"\2" * 255 + b"\5" * 5_000,
    "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    "noise": bytes(range(256)) * 4,
}


def content(size: int) -> bytes:
    """Bytes that are the same nowhere else in the file."""
    return blake3.blake3(b"%d" % size).digest(length=size)


async def attack(port: int, said: bytes, *, patience: float) -> int:
    """Connect, say something, and wait to be closed; how many bytes came."""
    heard = 0
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            with trio.move_on_after(patience):
                await stream.send_all(said)
                while data := await stream.receive_some(4_096):
                    heard += len(data)
    return heard


async def flood(port: int, count: int, said: list[bytes], patience: float) -> list[int]:
    """Many connections, so many at a time; how much each of them heard."""
    heard: list[int] = []
    numbers = iter(range(count))

    async def some() -> None:
        for number in numbers:
            count = await attack(port, said[number % len(said)], patience=patience)
            heard.append(count)

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(some)
    return heard


async def beside_a_transfer(
    tmp_path: Path, hostility: Callable[[Peers], Awaitable[None]]
) -> dict[str, bytes]:
    """Hold a transfer in its middle, do something, and let it go on; what arrived."""
    async with open_peers(tmp_path) as peers:
        peers.relay.hold_at(2 * MIB)
        source = peers.write("a", content(LARGE))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peers.send, source)
            await peers.relay.reached.wait()
            await hostility(peers)
            peers.relay.resume.set()
        # It was this very transfer, over this very connection.
        assert peers.server.tags().count(s5b.TAG) == 1
        assert ibb.DATA not in peers.server.tags()
        return peers.received()


@pytest.mark.parametrize("kind", HOSTILE)
async def test_c13_nonsense_leaves_a_transfer_alone(tmp_path: Path, kind: str) -> None:
    async def hostility(peers: Peers) -> None:
        heard = await flood(peers.listener.port, 100, [HOSTILE[kind]], 0.1)
        # A method, and a refusal; never what somebody else's file holds.
        assert max(heard) <= 2 + 47

    assert await beside_a_transfer(tmp_path, hostility) == {"a": content(LARGE)}


async def test_c15_a_flood_leaves_a_transfer_alone(tmp_path: Path) -> None:
    """Thousands of connections of all kinds; memory and descriptors stay bounded."""
    most = 0

    async def hostility(peers: Peers) -> None:
        nonlocal most
        most = 0

        async def look() -> None:
            nonlocal most
            while True:
                most = max(most, len(peers.listener._half_open))
                await trio.sleep(0.002)

        await flood(peers.listener.port, AT_ONCE, list(HOSTILE.values()), 0.05)
        before = resident()
        async with trio.open_nursery() as looking:
            looking.start_soon(look)
            await flood(peers.listener.port, FLOOD, list(HOSTILE.values()), 0.05)
            looking.cancel_scope.cancel()
        assert resident() - before < 20 * MIB

    assert await beside_a_transfer(tmp_path, hostility) == {"a": content(LARGE)}
    assert 0 < most <= sockets.MAX_HALF_OPEN


async def test_c15_a_transfer_begins_in_the_middle_of_a_flood(tmp_path: Path) -> None:
    """Who is real is through after two round trips, before he is the oldest of 64."""
    async with open_peers(tmp_path) as peers:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, peers.listener.port, FLOOD, list(HOSTILE.values()), 0.05)
            for number in range(5):
                data = content(number * 100_000)
                assert (await peers.send(peers.write(str(number), data))).confirmed
            nursery.cancel_scope.cancel()
        assert peers.received() == {str(n): content(n * 100_000) for n in range(5)}


async def test_c22_a_slow_handshake_ends_by_our_clock(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Slowloris: a byte now and then gains no time beyond the five seconds."""
    listener = sockets.Listener("127.0.0.1", 1)
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    started = trio.current_time()

    async def drip() -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            for byte in GREETING + WRONG[:-1]:
                await ours.send_all(bytes([byte]))
                await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        await listener._serve(theirs)
        assert autojump_clock.current_time() - started == sockets.HANDSHAKE_TIMEOUT
        nursery.cancel_scope.cancel()
    await ours.aclose()
    assert listener._half_open == {}


async def test_c13_who_knows_everything_and_comes_first_gets_nothing(tmp_path: Path) -> None:
    """The server and the peer's other clients know sid and addresses, and so the hash."""
    async with open_peers(tmp_path) as peers:
        held = trio.Event()
        peers.server.inject(s5b.TAG, held)
        stolen = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peers.send, peers.write("a", content(MIB)))
            await peers.server.asked(s5b.TAG)
            thief = await impostor(peers)
            held.set()
            async with thief:
                # The target came later; who waits is closed, and has heard but the handshake.
                while data := await thief.receive_some(65_536):
                    stolen += data
        assert stolen == b""
        assert peers.received() == {"a": content(MIB)}


async def test_c13_who_takes_all_places_delays_the_file_and_no_more(tmp_path: Path) -> None:
    """Then the bytes find another way; none of them is seen."""
    async with open_peers(tmp_path, sealed=True) as peers:
        held = trio.Event()
        peers.server.inject(s5b.TAG, held)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peers.send, peers.write("a", content(MIB)))
            await peers.server.asked(s5b.TAG)
            thieves = [await impostor(peers) for _ in range(sockets.MAX_PER_SLOT)]
            held.set()
        for thief in thieves:
            async with thief:
                assert await thief.receive_some(1) == b""
        assert peers.received() == {"a": content(MIB)}
        assert ibb.DATA in peers.server.tags()


async def impostor(peers: Peers) -> trio.SocketStream:
    """Connect as the target would, knowing what only stanzas tell."""
    [address] = peers.listener._expected
    host = s5b.Streamhost(ALICE, "127.0.0.1", peers.listener.port)
    return await sockets.connect_streamhost(host, address)


async def test_c13_nobody_is_expected_before_and_behind_a_transfer(tmp_path: Path) -> None:
    """An address is of use while its offer lives, and not once more."""
    async with open_peers(tmp_path) as peers:
        assert (await peers.send(peers.write("a", content(MIB)))).confirmed
        [exchange] = [each for each in peers.server.exchanges if each.tag == si.SI]
        sid = si.read_offer(exchange.payload).sid
        assert peers.listener._expected == {}
        request = WRONG.replace(b"0" * 40, s5b.dstaddr(sid, ALICE, BOB).encode())
        for _ in range(2):
            assert await attack(peers.listener.port, GREETING + request, patience=1) == 2 + 47


def test_c15_the_caps_fit_into_the_least_of_limits() -> None:
    """1024 descriptors are what every system gives; the listener's share is small."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert min(soft, 1024) >= 4 * (sockets.MAX_HALF_OPEN + sockets.MAX_PER_SLOT)
