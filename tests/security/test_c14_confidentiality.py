"""C-14: whoever carries a sealed file sees none of it, on any way.

What a packet capture would hold is copied where the bytes pass: behind the listener for a
direct connection (a proxy carries the very same bytes), and in every stanza for the way through
the server. A marker that stands in each of the file's blocks is then looked for.
"""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.errors import TransferError
from syncd.transfer import si
from syncd.transfer.sender import Target
from syncd.xmpp.xml import serialise
from tests.support.peers import BOB, Peers, open_peers

if TYPE_CHECKING:
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.xmpp.stanza import Iq

MARKER = b"-- nobody but bob may read this line, not even a part of it --\n"
MIB = 1 << 20  # bytes
# As much of it as would be no accident: 2^-64 for each place.
PART = 8  # bytes


def marked(size: int) -> bytes:
    return (MARKER * (size // len(MARKER) + 1))[:size]


def parts() -> list[bytes]:
    """Every piece of the marker, plain and as base64 would write it."""
    pieces = [MARKER[start : start + PART] for start in range(len(MARKER) - PART)]
    written = [base64.b64encode(MARKER[start:])[:12] for start in range(len(MARKER) - 12)]
    return pieces + written


def seen(captured: bytes) -> list[bytes]:
    return [part for part in parts() if part in captured]


def stanzas(peers: Peers) -> bytes:
    """All that the server has carried, requests and answers."""
    return b"\n".join(
        serialise(element)
        for exchange in peers.server.exchanges
        for element in (exchange.payload, *exchange.answers)
    )


def blocks(peers: Peers) -> bytes:
    """The bytes that went through the server."""
    found = [each.payload.text for each in peers.server.exchanges if each.tag == ibb.DATA]
    return b"".join(base64.b64decode(text or "") for text in found)


async def test_c14_a_capture_of_a_sealed_stream_holds_nothing_of_the_file(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        captured = peers.relay.listen_in()
        assert (await peers.send(peers.write("a", marked(4 * MIB)))).sealed
        assert peers.received() == {"a": marked(4 * MIB)}
        assert len(captured) > 4 * MIB
        assert seen(bytes(captured)) == []
        assert seen(stanzas(peers)) == []
        # It looks like noise: what repeats in the file repeats nowhere.
        assert len(zlib.compress(bytes(captured))) > len(captured)


async def test_c14_a_plain_stream_would_have_been_seen(tmp_path: Path) -> None:
    """What this capture is worth."""
    async with open_peers(tmp_path) as peers:
        captured = peers.relay.listen_in()
        assert not (await peers.send(peers.write("a", marked(MIB)))).sealed
        assert len(seen(bytes(captured))) == len(MARKER) - PART


async def test_c14_the_server_that_carries_the_bytes_sees_none_of_them(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        target = Target(jid=BOB, is_syncd=True, can_seal=True)
        source = peers.write("a", marked(200_000))
        assert (await peers.make_sender(None).send(source, target)).sealed
        assert peers.received() == {"a": marked(200_000)}
        assert len(blocks(peers)) > 200_000
        assert seen(blocks(peers)) == seen(stanzas(peers)) == []


async def test_c14_what_was_cut_and_goes_on_shows_nothing_either(tmp_path: Path) -> None:
    """Two streams of one file have two keys; what is alike in them cannot be compared."""
    async with open_peers(tmp_path, sealed=True) as peers:
        captured = peers.relay.listen_in()
        source = peers.write("a", marked(4 * MIB))
        peers.relay.cut_at(MIB)
        with pytest.raises(TransferError):
            await peers.send(source)
        await peers.settled()
        peers.relay.cut_at(None)
        assert (await peers.send(source)).sealed
        assert peers.received() == {"a": marked(4 * MIB)}
        assert seen(bytes(captured)) == []


async def test_c13_an_impostor_gets_nothing_that_he_can_read(tmp_path: Path) -> None:
    """Who knows JIDs and sid, and is taken for the target: the last who came wins."""
    async with open_peers(tmp_path, sealed=True) as peers:
        stolen = bytearray()
        target_waits = trio.Event()
        stealing = trio.Event()

        async def steal() -> None:
            await target_waits.wait()
            [address] = peers.listener._expected
            request = b"\5\1\0\3\x28" + address.encode() + b"\0\0"
            thief = await trio.open_tcp_stream("127.0.0.1", peers.listener.port)
            async with thief:
                await thief.send_all(b"\5\1\0" + request)
                greeting = 2 + 47
                while data := await thief.receive_some(65_536):
                    stolen.extend(data)
                    if len(stolen) >= greeting:
                        stealing.set()

        real = peers.receiver.on_bytestream

        async def held(iq: Iq) -> Element:
            answer = await real(iq)
            target_waits.set()
            await stealing.wait()
            return answer

        handlers = dict(peers.server._handlers[BOB])
        peers.server.attach(BOB, handlers | {s5b.TAG: held})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(steal)
            try:
                await peers.send(peers.write("a", marked(MIB)))
            except TransferError:
                peers.server.attach(BOB, handlers)
                await peers.settled()
                # Nothing that is not genuine was delivered; and the next attempt succeeds.
                assert peers.received() == {}
                assert (await peers.send(peers.found("a"))).sealed
        assert peers.received() == {"a": marked(MIB)}
        assert len(stolen) > 2 + 47
        assert seen(bytes(stolen)) == []
        assert si.FINISH in peers.server.tags()
