"""C-14: whoever carries a sealed file sees none of it, on any way.

What a packet capture would hold is copied where the bytes pass: behind the listener for a
direct connection (a proxy carries the very same bytes), and in every stanza for the way through
the server. A marker that stands in each of the file's blocks is then looked for.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from typing import TYPE_CHECKING

import blake3
import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.errors import TransferError
from syncd.transfer import si
from syncd.transfer.sender import Target
from syncd.trust.handshake import Answer, Offer, Terms
from syncd.trust.signing import digest, statement, verify
from syncd.xmpp.xml import serialise
from tests.support.peers import ALICE, BOB, FOLDER, LONG_AGO, Fault, Peers, open_peers

if TYPE_CHECKING:
    from collections.abc import Iterator
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
        await peers.send_until_cut(source, MIB)
        peers.relay.cut_at(None)
        assert (await peers.send(source)).sealed
        assert peers.received() == {"a": marked(4 * MIB)}
        assert seen(bytes(captured)) == []


# What a server could try out: whether a file that it has, or guesses, is the one that is sent.

GUESS = b"The PIN is 1234.\n"


def hashes(data: bytes) -> list[bytes]:
    """What a file is known by, here and elsewhere."""
    return [
        blake3.blake3(data).digest(),
        *(hashlib.new(name, data).digest() for name in ("md5", "sha1", "sha256", "sha512")),
    ]


def confirmed_by_text(peers: Peers, data: bytes) -> list[str]:
    """The stanzas that have one of its hashes in them, however it is written."""
    spellings = [
        spelling
        for found in hashes(data)
        for spelling in (
            found,
            found.hex().encode(),
            found.hex().upper().encode(),
            base64.b64encode(found).rstrip(b"="),
            base64.b32encode(found).rstrip(b"="),
        )
    ]
    found = []
    for exchange in peers.server.exchanges:
        for element in (exchange.payload, *exchange.answers):
            # The attributes' bytes, too: a hash might stand in front of or behind others.
            texts = [serialise(element)]
            for part in element.iter():
                texts += map(decoded, part.attrib.values())
            if any(spelling in text for spelling in spellings for text in texts):
                found.append(f"{exchange.tag} {element.tag}")
    return found


def decoded(text: str) -> bytes:
    """What it says if it is base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def ends(peers: Peers) -> list[Element]:
    """All finishes and receipts, in order."""
    return [
        element
        for exchange in peers.server.exchanges
        if exchange.tag == si.FINISH
        for element in (exchange.payload, *(answer[0] for answer in exchange.answers))
    ]


def agreements(peers: Peers) -> Iterator[Answer]:
    """All that was agreed, as a server reads it out of the stanzas."""
    for exchange in peers.server.exchanges:
        if exchange.tag == si.SI:
            offer = si.read_offer(exchange.payload)
            answer = si.read_answer(exchange.answers[0][0], offer)
            assert offer.seal is not None
            assert offer.sync is not None
            assert answer.seal is not None
            terms = Terms(
                sid=offer.sid,
                sender=str(ALICE),
                receiver=str(BOB),
                profile=si.NS_FILE,
                folder=FOLDER,
                path=offer.sync.path,
                size=offer.size or 0,
                mtime_ns=LONG_AGO,
            )
            yield Answer.read(answer.seal, Offer.read(offer.seal, terms), answer.offset)


def confirmed_by_signature(peers: Peers, data: bytes, salt: bytes = b"") -> list[str]:
    """The signatures that somebody finds good who puts a guess where the content belongs."""
    signatures = [
        (element.tag, decoded(element.get("signature", ""))) for element in ends(peers)
    ]
    found = []
    for answer in agreements(peers):
        terms = answer.offer.terms
        about = answer.transcript, terms.sid, terms.sender, terms.receiver, terms.size
        content = blake3.blake3(data).digest()
        guesses = [
            digest("commitment", answer.transcript, terms.size, content, each)
            for each in (salt, bytes(32))
        ]
        for guess in (*hashes(data), *guesses):
            for label in ("finish", "receipt", "beside"):
                said = statement(label, *about, guess)
                for tag, signature in signatures:
                    if any(
                        verify(key, signature, said)
                        for key in (answer.offer.identity, answer.identity)
                    ):
                        found.append(tag)
    return found


@pytest.mark.parametrize("case", ["sent", "lost receipt", "there already", "beside", "empty"])
async def test_c14_no_stanza_of_a_sealed_file_confirms_a_guess(
    tmp_path: Path, case: str
) -> None:
    data = b"" if case == "empty" else GUESS
    async with open_peers(tmp_path, sealed=True) as peers:
        source = peers.write("a", data)
        if case == "beside":
            (peers.folder / "a").write_bytes(b"another")
        if case == "lost receipt":
            peers.server.inject(si.FINISH, Fault.LOSE_ANSWER)
        if case == "there already":
            await peers.send(source)
            await peers.restart_receiver()
        assert (await peers.send(source)).sealed
        assert data in peers.received().values()
        assert {each.tag for each in ends(peers)} == {si.FINISH, si.RECEIPT}
        assert confirmed_by_text(peers, data) == []
        assert confirmed_by_signature(peers, data) == []
        # Who knows the salt can: so it is the right thing that was tried.
        seal = peers.incoming[-1].seal
        assert seal is not None
        assert seal.content is not None
        assert set(confirmed_by_signature(peers, data, seal.content.salt)) == {si.RECEIPT}


async def test_c14_a_guess_would_have_been_confirmed_of_a_plain_file(tmp_path: Path) -> None:
    """What the search for it is worth."""
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("a", GUESS))
        assert confirmed_by_text(peers, GUESS) == [
            f"{si.FINISH} {si.FINISH}",
            f"{si.FINISH} {{jabber:client}}iq",
        ]


async def test_c14_finish_and_receipt_of_one_file_are_alike_in_nothing(tmp_path: Path) -> None:
    """Nor can it be seen that two files are the same, or that they are not."""
    async with open_peers(tmp_path, sealed=True) as peers:
        for name, data in (("a", GUESS), ("b", GUESS), ("c", GUESS.replace(b"1", b"9"))):
            await peers.send(peers.write(name, data))
        found = [
            (element.tag, name, text)
            for element in ends(peers)
            for name, text in element.items()
            if name not in ("sid", "size")
        ]
        assert len({text for _, _, text in found}) == len(found) == 3 * 3
        assert len({(tag, name, len(text)) for tag, name, text in found}) == 3


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
