from __future__ import annotations

import base64
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Literal
from xml.etree.ElementTree import Element

import blake3
import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.errors import DeclinedError, ErrorType, IntegrityError, SyncdError, TransferError
from syncd.transfer import si
from syncd.transfer.sender import Sent, Target
from syncd.trust.pins import Pin, Policy
from syncd.trust.signing import Identity, write_base64
from syncd.xmpp.stanza import read_error
from tests.support.peers import ALICE, BOB, Exchange, Fault, Peers, open_peers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from syncd.transfer.incoming import Arriving
    from syncd.xmpp.jid import JID
    from syncd.xmpp.stanza import Iq

MIB = 1 << 20  # bytes


def content(size: int) -> bytes:
    """Bytes that are the same nowhere else in the file."""
    return blake3.blake3(b"%d" % size).digest(length=size)


def sealed(data: bytes) -> Sent:
    return Sent(confirmed=True, digest=blake3.blake3(data).digest(), sealed=True)


# Sealed transfers are as whole as plain ones


@pytest.mark.parametrize("size", [0, 1, 65_536, 5 * MIB])
async def test_sealed_file_arrives_whole(tmp_path: Path, size: int) -> None:
    data = content(size)
    async with open_peers(tmp_path, sealed=True) as peers:
        assert await peers.send(peers.write("a/b", data)) == sealed(data)
        assert peers.received() == {"a/b": data}


async def test_nothing_of_the_file_is_seen_on_the_way(tmp_path: Path) -> None:
    """Not even that a file of zeros holds zeros; and more bytes pass than it has."""
    data = bytes(2 * MIB)
    async with open_peers(tmp_path, sealed=True) as peers:
        seen = peers.relay.listen_in()
        await peers.send(peers.write("a", data))
        assert peers.relay.passed > len(data)
        assert bytes(64) not in seen


async def test_sealed_file_goes_through_the_server_as_well(tmp_path: Path) -> None:
    data = content(300_000)
    async with open_peers(tmp_path, sealed=True) as peers:
        only_inband = peers.make_sender(None)
        target = Target(jid=BOB, is_syncd=True, can_seal=True)
        assert await only_inband.send(peers.write("a", data), target) == sealed(data)
        assert peers.received() == {"a": data}
        assert ibb.DATA in peers.server.tags()
        assert s5b.TAG not in peers.server.tags()


async def test_sealed_file_that_was_cut_goes_on_under_a_key_of_its_own(tmp_path: Path) -> None:
    data = content(8 * MIB)
    async with open_peers(tmp_path, sealed=True) as peers:
        source = peers.write("a", data)
        peers.relay.cut_at(3 * MIB)
        with pytest.raises(TransferError):
            await peers.send(source)
        await peers.settled()
        peers.relay.cut_at(None)
        assert await peers.send(source) == sealed(data)
        assert peers.received() == {"a": data}
        keys = {answer.seal["key"] for answer in answers(peers) if answer.seal}
        assert len(keys) == 2
        [first, second] = [answer.offset for answer in answers(peers)]
        # What was authenticated is kept: whole segments, less than one of them lost.
        assert first == 0
        assert 3 * MIB - 3 * 65_552 <= second <= 3 * MIB


async def test_sealed_file_that_was_cut_goes_on_by_another_way(tmp_path: Path) -> None:
    data = content(8 * MIB)
    async with open_peers(tmp_path, sealed=True) as peers:
        source = peers.write("a", data)
        peers.relay.cut_at(7 * MIB)
        with pytest.raises(TransferError):
            await peers.send(source)
        await peers.settled()
        target = Target(jid=BOB, is_syncd=True, can_seal=True)
        assert await peers.make_sender(None).send(source, target) == sealed(data)
        assert peers.received() == {"a": data}
        assert [each.progress.method for each in peers.incoming] == ["direct", "ibb"]
        assert answers(peers)[1].offset > 6 * MIB


async def test_receipt_that_is_lost_is_the_same_when_it_is_asked_for_again(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.server.inject(si.FINISH, Fault.LOSE_ANSWER, Fault.LOSE_ANSWER)
        assert await peers.send(peers.write("a", b"content")) == sealed(b"content")
        asked = finishes(peers)
        assert len(asked) == 3
        assert len({each.payload.get("sealed") for each in asked}) == 1
        assert len({each.answers[-1][0].get("signature") for each in asked}) == 1


async def test_finish_that_comes_twice_at_once_is_answered_twice(tmp_path: Path) -> None:
    """What it has sealed is opened once, for then the key to it is gone."""
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.server.inject(si.FINISH, Fault.TWICE)
        assert await peers.send(peers.write("a", b"content")) == sealed(b"content")
        await peers.server.idle()
        [one, other] = finishes(peers)
        assert one.answers[0][0].attrib == other.answers[0][0].attrib


async def test_file_that_is_there_already_is_confirmed_with_a_signature(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        source = peers.write("a", b"content")
        await peers.send(source)
        await peers.restart_receiver()
        assert await peers.send(source) == sealed(b"content")
        assert peers.server.tags().count(s5b.TAG) == 1


def finishes(peers: Peers) -> list[Exchange]:
    """All questions for a receipt that got to a handler."""
    return [each for each in peers.server.exchanges if each.tag == si.FINISH]


def answers(peers: Peers) -> list[si.Answer]:
    found = []
    for exchange in peers.server.exchanges:
        if exchange.tag == si.SI:
            [answer] = exchange.answers
            found.append(si.read_answer(answer[0], si.read_offer(exchange.payload)))
    return found


# Who is in between changes nothing unnoticed


@pytest.mark.parametrize("position", [0, 200, 1_300, 70_000, MIB - 1])
async def test_byte_that_is_changed_on_the_way_delivers_nothing(
    tmp_path: Path, position: int
) -> None:
    data = content(MIB)
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.relay.flip_at(position)
        with pytest.raises(TransferError):
            await peers.send(peers.write("a", data))
        await peers.settled()
        assert (peers.received(), peers.arrived) == ({}, [])
        # Nor is a wrong byte kept to go on from.
        for partial in peers.partials():
            assert data.startswith(partial.read_bytes())


@pytest.mark.parametrize("attribute", ["identity", "kems", "signature"])
async def test_offer_that_was_changed_on_the_way_is_refused(
    tmp_path: Path, attribute: str
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.server.change(si.SI, lambda si_element: spoil(si_element, attribute))
        with pytest.raises(TransferError):
            await peers.send(peers.write("a", b"x"))
        assert peers.pins == {}
        assert peers.partials() == []


@pytest.mark.parametrize("what", ["path", "folder", "mtime-ns"])
async def test_terms_that_were_changed_on_the_way_are_refused(
    tmp_path: Path, what: str
) -> None:
    """A server cannot send a file to another name, or make it look younger."""
    values = {"path": "b", "folder": "", "mtime-ns": "1"}

    def change(element: Element) -> None:
        sync = element.find(si.SYNC)
        assert sync is not None
        if what == "folder":
            element.remove(sync)
        else:
            sync.set(what, values[what])

    async with open_peers(tmp_path, sealed=True) as peers:
        peers.server.change(si.SI, change)
        with pytest.raises(TransferError, match="changed on its way"):
            await peers.send(peers.write("a", b"x"))
        assert (peers.received(), peers.pins) == ({}, {})


async def test_server_cannot_say_that_a_file_has_arrived(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.server.change(si.FINISH, lambda finish: finish.set("signature", "A" * 86 + "=="))
        with pytest.raises(TransferError, match="signed"):
            await peers.send(peers.write("a", b"x"))
        await peers.settled()
        assert peers.received() == {}


async def test_server_cannot_choose_the_name_of_a_file_for_the_inbox(tmp_path: Path) -> None:
    """The name that stands in the offer for other clients is not among what is signed."""

    def rename(element: Element) -> None:
        file = element.find(si.FILE)
        assert file is not None
        file.set("name", "authorized_keys")

    async with open_peers(tmp_path, sealed=True) as peers:
        source = replace(peers.write("notes.txt", b"x"), folder="")
        peers.server.change(si.SI, rename)
        assert (await peers.send(source)).sealed
        assert peers.received() == {"notes.txt": b"x"}


async def test_forged_beginning_from_a_plain_transfer_does_not_pass_for_a_part_of_the_file(
    tmp_path: Path,
) -> None:
    data = content(2 * MIB)
    async with open_peers(tmp_path, sealed=True) as peers:
        source = peers.write("a", data)
        peers.relay.flip_at(1_000)
        peers.relay.cut_at(MIB)
        plain = Target(jid=BOB, is_syncd=True, can_seal=False)
        with pytest.raises(TransferError):
            await peers.sender.send(source, plain)
        await peers.settled()
        peers.relay.flip_at(1 << 40)
        peers.relay.cut_at(None)
        with pytest.raises(TransferError, match="not what was sent"):
            await peers.send(source)
        await peers.settled()
        assert peers.received() == {}
        assert answers(peers)[-1].offset > 0
        assert await peers.send(source) == sealed(data)
        assert peers.received() == {"a": data}


async def test_nothing_is_sealed_that_nobody_would_sign_for_at_the_end(tmp_path: Path) -> None:
    """Without <sync/> there is no receipt, nor the hash of a part that came earlier."""
    async with open_peers(tmp_path, sealed=True) as peers:
        target = Target(jid=BOB, is_syncd=False, can_seal=True)
        with pytest.raises(TransferError, match="between two syncds"):
            await peers.sender.send(peers.write("a", b"x"), target)
        assert peers.pins == {}


# What the file is, is for both ends alone


HASH = {"blake3": write_base64(blake3.blake3(b"content").digest())}


def clear(finish: Element) -> None:
    """A server that knows the file anyway says which it is."""
    for name in ("sealed", "signature"):
        del finish.attrib[name]
    finish.attrib.update(HASH)


def hide(finish: Element) -> None:
    del finish.attrib["blake3"]
    finish.set("sealed", write_base64(bytes(1_200)))
    finish.set("signature", write_base64(bytes(64)))


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("is_sealed", "change", "reason"),
    [
        (True, clear, "in the clear for bytes that were sealed"),
        (False, hide, "for bytes that were not sealed"),
    ],
)
async def test_finish_of_the_other_kind_than_its_transfer_is_refused(
    tmp_path: Path,
    is_sealed: bool,
    change: Callable[[Element], None],
    reason: str,
    there: bool,
) -> None:
    """Whether the bytes come, or all lies there already."""
    async with open_peers(tmp_path, sealed=is_sealed) as peers:
        source = peers.write("a", b"content")
        if there:
            await peers.send(source)
            await peers.restart_receiver()
        before = len(peers.arrived)
        peers.server.change(si.FINISH, change)
        with pytest.raises(TransferError, match=reason):
            await peers.send(source)
        await peers.settled()
        error = read_error(finishes(peers)[-1].answers[0])
        assert (error.type, error.condition) == (ErrorType.MODIFY, "bad-request")
        assert len(peers.arrived) == before
        assert list(peers.received()) == (["a"] if there else [])


def flipped(text: str) -> str:
    """The same bytes but for one bit."""
    data = base64.b64decode(text)
    return write_base64(data[:20] + bytes([data[20] ^ 1]) + data[21:])


@pytest.mark.parametrize(
    "change",
    [
        lambda own, _: own | {"sealed": flipped(own["sealed"])},
        lambda own, _: own | {"signature": flipped(own["signature"])},
        lambda own, other: own | {"sealed": other["sealed"]},
        lambda own, other: own | {"signature": other["signature"]},
        lambda own, other: other | {"sid": own["sid"], "size": own["size"]},
        lambda own, _: own | {"size": "6"},
        lambda own, _: own | {"sealed": own["signature"]},
        lambda own, _: own | {"sealed": write_base64(bytes(112))},
    ],
    ids=[
        "sealed, a bit",
        "signature, a bit",
        "sealed for another",
        "signature of another",
        "all of another",
        "size",
        "no such length",
        "length of the other kem",
    ],
)
async def test_finish_that_was_changed_on_the_way_delivers_nothing(
    tmp_path: Path, change: Callable[[dict[str, str], dict[str, str]], dict[str, str]]
) -> None:
    """The other is one of the same file, in a transfer that was right."""
    async with open_peers(tmp_path, sealed=True) as peers:
        await peers.send(peers.write("b", b"content"))
        other = finishes(peers)[0].payload.attrib

        def changing(finish: Element) -> None:
            finish.attrib.update(change(dict(finish.attrib), other))

        peers.server.change(si.FINISH, changing)
        with pytest.raises(TransferError):
            await peers.send(peers.write("a", b"content"))
        await peers.stop_receiver()
        assert peers.received() == {"b": b"content"}
        assert len(peers.arrived) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda own, _: own | {"signature": flipped(own["signature"])}, "not signed"),
        (lambda own, other: own | {"signature": other["signature"]}, "not signed"),
        (lambda own, _: own | {"beside": "true"}, "not signed"),
        (lambda own, _: own | {"signature": "AAAA"}, "not understood"),
        (lambda own, _: own | {"size": "6"}, "something else"),
        (lambda own, other: own | {"sid": other["sid"]}, "something else"),
        (lambda own, _: {"sid": own["sid"], "size": own["size"], **HASH}, "something else"),
        (lambda own, _: own | HASH, "malformed"),
        (lambda own, _: {"sid": own["sid"], "size": own["size"]}, "malformed"),
    ],
    ids=[
        "signature, a bit",
        "signature of another",
        "beside",
        "no signature",
        "size",
        "sid",
        "the hash instead",
        "the hash as well",
        "nothing",
    ],
)
async def test_receipt_that_was_changed_on_the_way_confirms_nothing(
    tmp_path: Path,
    change: Callable[[dict[str, str], dict[str, str]], dict[str, str]],
    reason: str,
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        await peers.send(peers.write("b", b"content"))
        other = finishes(peers)[0].answers[0][0].attrib

        async def on_finish(iq: Iq) -> Element:
            receipt = await peers.receiver.on_finish(iq)
            return Element(receipt.tag, change(dict(receipt.attrib), other))

        peers.server.attach(BOB, {**peers.server._handlers[BOB], si.FINISH: on_finish})
        with pytest.raises(SyncdError, match=reason):
            await peers.send(peers.write("a", b"content"))


@pytest.mark.parametrize("field", ["digest", "salt"])
async def test_receipt_for_another_content_confirms_nothing(
    tmp_path: Path, field: Literal["digest", "salt"]
) -> None:
    """Although the right receiver has signed it, in the right transfer."""
    async with open_peers(tmp_path, sealed=True) as peers:

        async def mistake(_: Arriving) -> None:
            seal = peers.incoming[0].seal
            assert seal is not None
            assert seal.content is not None
            other = bytes(32)
            seal.content = (
                replace(seal.content, digest=other)
                if field == "digest"
                else replace(seal.content, salt=other)
            )

        peers.on_arriving = mistake
        with pytest.raises(IntegrityError, match="the receipt was not signed"):
            await peers.send(peers.write("a", b"content"))


def spoil(element: Element, attribute: str) -> None:
    seal = element.find(si.SEAL)
    assert seal is not None
    value = seal.get(attribute, "")
    seal.set(attribute, ("B" if value[0] == "A" else "A") + value[1:])


# Keys


async def test_first_key_is_pinned_at_both_ends(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        await peers.send(peers.write("a", b"x"))
        assert {own: pin.trust for own, pin in peers.pins.items()} == {
            (ALICE.bare, BOB.bare): "unverified",
            (BOB.bare, ALICE.bare): "unverified",
        }


async def test_changed_key_of_the_sender_stops_the_receiver(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        await peers.send(peers.write("a", b"x"))
        peers.seals[ALICE.bare] = peers.make_seals(ALICE.bare)
        peers.sender = peers.make_sender(peers.listener)
        with pytest.raises(DeclinedError, match="another key than before"):
            await peers.send(peers.write("b", b"y"))
        assert peers.received() == {"a": b"x"}


async def test_changed_key_of_the_receiver_stops_the_sender(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        await peers.send(peers.write("a", b"x"))
        peers.seals[BOB.bare] = peers.make_seals(BOB.bare)
        await peers.restart_receiver()
        with pytest.raises(TransferError, match="another key than before") as caught:
            await peers.send(peers.write("b", b"y"))
        assert caught.value.type == ErrorType.AUTH
        assert "syncctl peer reset-key bob@example.org" in caught.value.hint
        assert s5b.TAG not in peers.server.tags()[3:]


async def test_key_that_the_old_one_has_signed_takes_its_place(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        old = Identity.generate()
        peers.seals[ALICE.bare] = peers.make_seals(ALICE.bare, old)
        peers.sender = peers.make_sender(peers.listener)
        await peers.send(peers.write("a", b"x"))
        new = old.succeeded_by(secrets.token_bytes(32))
        peers.seals[ALICE.bare] = peers.make_seals(ALICE.bare, new)
        peers.sender = peers.make_sender(peers.listener)
        assert (await peers.send(peers.write("b", b"y"))).sealed
        assert peers.pins[BOB.bare, ALICE.bare].key == new.public


async def test_of_two_first_keys_at_once_the_later_one_stops(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        offer = si.Offer(
            sid="s",
            name="a",
            size=1,
            methods=(si.IBB,),
            sync=si.Sync(folder="photos", path="a", mtime_ns=1),
        )
        outcomes: list[str] = []

        async def show() -> None:
            other = peers.make_seals(ALICE.bare)
            signed = await other.offer(offer, ALICE, BOB, can_seal=True)
            assert signed is not None
            try:
                shown = replace(offer, seal=signed.attributes())
                await peers.seals[BOB.bare].take_offer(shown, ALICE, BOB)
            except TransferError as error:
                outcomes.append("another key" if "another key" in str(error) else str(error))
            else:
                outcomes.append("taken")

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(show)
        assert sorted(outcomes) == ["another key", "taken"]


async def test_own_key_that_is_replaced_between_offer_and_answer_costs_one_try(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        old = Identity.generate()
        seals = peers.seals[ALICE.bare] = peers.make_seals(ALICE.bare, old)
        peers.sender = peers.make_sender(peers.listener)
        source, hold = peers.write("a", b"x"), trio.Event()
        peers.server.inject(si.SI, hold)

        async def replace_key() -> None:
            await peers.server.asked(si.SI)
            seals.replace_identity(old.succeeded_by(secrets.token_bytes(32)))
            hold.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(replace_key)
            with pytest.raises(TransferError, match="our own key was replaced") as caught:
                await peers.send(source)
        assert caught.value.type == ErrorType.WAIT
        assert await peers.send(source) == sealed(b"x")


async def test_ephemeral_key_is_forgotten_with_the_finish(tmp_path: Path) -> None:
    """Before the file gets its name, and however long that takes."""
    known: list[bool] = []

    async def on_arriving(_: Arriving) -> None:
        known.append(has_key(peers))

    async with open_peers(tmp_path, sealed=True) as peers:
        peers.on_arriving = on_arriving
        peers.server.change(si.FINISH, lambda _: known.append(has_key(peers)))
        assert await peers.send(peers.write("a", b"x")) == sealed(b"x")
        assert known == [True, False]


def has_key(peers: Peers) -> bool:
    """Whether the receiver could still open what is sealed for its one transfer."""
    [incoming] = peers.incoming
    assert incoming.seal is not None
    return incoming.seal.ephemeral is not None


@pytest.mark.parametrize("cut", [200, MIB])
async def test_ephemeral_key_is_forgotten_when_a_transfer_fails(
    tmp_path: Path, cut: int
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.relay.cut_at(cut)
        with pytest.raises(TransferError):
            await peers.send(peers.write("a", content(2 * MIB)))
        await peers.settled()
        assert not has_key(peers)


async def test_ephemeral_key_is_forgotten_when_the_finish_never_comes(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        source, held = peers.write("a", b"x"), trio.Event()
        peers.server.inject(si.FINISH, held)

        async def stop() -> None:
            await peers.server.asked(si.FINISH)
            assert has_key(peers)
            await peers.stop_receiver()
            assert not has_key(peers)
            held.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            with pytest.raises(TransferError, match="given this transfer up"):
                await peers.send(source)
        await peers.restart_receiver()


# A person decides while a transfer runs


@pytest.mark.parametrize("own", [ALICE, BOB])
async def test_transfer_ends_when_somebody_decides_against_its_peer(
    tmp_path: Path, own: JID
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.relay.hold_at(MIB)
        other = BOB if own == ALICE else ALICE

        async def decide() -> None:
            await peers.relay.reached.wait()
            peers.seals[own.bare].end(other.bare)
            peers.relay.resume.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(decide)
            with pytest.raises(TransferError):
                await peers.send(peers.write("a", content(4 * MIB)))
        await peers.settled()
        assert peers.received() == {}
        assert peers.relay.passed < 4 * MIB


@pytest.mark.parametrize(
    ("decide", "reason"),
    [
        (lambda pin: replace(pin, blocked=True), "is blocked"),
        (lambda _: None, "was forgotten meanwhile, or replaced"),
        (lambda _: Pin(key=Identity.generate().public), "was forgotten meanwhile, or replaced"),
    ],
)
async def test_file_gets_no_name_if_its_sender_is_not_trusted_any_more(
    tmp_path: Path, decide: Callable[[Pin], Pin | None], reason: str
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        hold = trio.Event()
        peers.server.inject(si.FINISH, hold)

        async def change_the_pin() -> None:
            await peers.server.asked(si.FINISH)
            now = decide(peers.pins.pop((BOB.bare, ALICE.bare)))
            if now is not None:
                peers.pins[BOB.bare, ALICE.bare] = now
            hold.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change_the_pin)
            with pytest.raises(TransferError, match=reason):
                await peers.send(peers.write("a", b"x"))
        await peers.settled()
        assert peers.received() == {}


# Plain only where that is wanted


async def test_peer_that_never_showed_a_key_gets_plain_bytes_if_that_is_allowed(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        plain = Target(jid=BOB, is_syncd=True, can_seal=False)
        sent = await peers.sender.send(peers.write("a", b"x"), plain)
        assert (sent.confirmed, sent.sealed) == (True, False)


async def test_peer_that_has_shown_a_key_never_gets_plain_bytes_again(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        await peers.send(peers.write("a", b"x"))
        asked = len(peers.server.tags())
        for is_syncd in (True, False):
            plain = Target(jid=BOB, is_syncd=is_syncd, can_seal=False)
            with pytest.raises(TransferError, match="has encrypted before") as caught:
                await peers.sender.send(peers.write("b", b"y"), plain)
            # It may be another client of theirs: the file waits for the syncd.
            assert caught.value.type == ErrorType.WAIT
        assert len(peers.server.tags()) == asked


async def test_plain_offer_of_a_peer_that_has_shown_a_key_is_refused(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        await peers.send(peers.write("a", b"x"))
        del peers.seals[ALICE.bare]
        peers.sender = peers.make_sender(peers.listener)
        with pytest.raises(DeclinedError, match="has encrypted before"):
            await peers.sender.send(peers.write("b", b"y"), Target(jid=BOB, is_syncd=True))
        assert peers.received() == {"a": b"x"}


async def test_answer_without_a_seal_to_a_sealed_offer_stops_the_sender_who_has_a_key(
    tmp_path: Path,
) -> None:
    """A server takes the seal out of the offer; the receiver does not know us yet."""

    def strip(element: Element) -> None:
        seal = element.find(si.SEAL)
        assert seal is not None
        element.remove(seal)

    async with open_peers(tmp_path, sealed=True) as peers:
        key = Identity.generate().public
        peers.pins[ALICE.bare, BOB.bare] = Pin(key=key)
        peers.server.change(si.SI, strip)
        with pytest.raises(TransferError, match="has encrypted before"):
            await peers.send(peers.write("a", b"x"))
        assert peers.received() == {}


@pytest.mark.parametrize("can_seal", [False, True])
async def test_where_it_is_required_nothing_goes_out_plain(
    tmp_path: Path, can_seal: bool
) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.seals[ALICE.bare] = peers.make_seals(ALICE.bare, policy=Policy.REQUIRED)
        peers.sender = peers.make_sender(peers.listener)
        peers.seals[BOB.bare] = peers.make_seals(BOB.bare, policy=Policy.OFF)
        await peers.restart_receiver()
        target = Target(jid=BOB, is_syncd=True, can_seal=can_seal)
        with pytest.raises(TransferError, match="encryption is required"):
            await peers.sender.send(peers.write("a", b"x"), target)
        assert peers.relay.passed == 0


async def test_where_it_is_required_nothing_comes_in_plain(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.seals[BOB.bare] = peers.make_seals(BOB.bare, policy=Policy.REQUIRED)
        await peers.restart_receiver()
        plain = Target(jid=BOB, is_syncd=True, can_seal=False)
        with pytest.raises(DeclinedError, match="encryption is required"):
            await peers.sender.send(peers.write("a", b"x"), plain)
        assert (peers.received(), peers.partials()) == ({}, [])


async def test_blocked_peer_gets_nothing_and_sends_nothing(tmp_path: Path) -> None:
    async with open_peers(tmp_path, sealed=True) as peers:
        peers.pins[ALICE.bare, BOB.bare] = Pin(key=None, blocked=True)
        with pytest.raises(DeclinedError, match="blocked"):
            await peers.send(peers.write("a", b"x"))
        peers.pins = {(BOB.bare, ALICE.bare): Pin(key=None, blocked=True)}
        with pytest.raises(DeclinedError, match="blocked"):
            await peers.send(peers.write("a", b"x"))
        assert peers.received() == {}
