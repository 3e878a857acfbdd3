from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import blake3
import pytest
import trio
import trio.testing

from syncd.bytestreams import ibb, s5b
from syncd.disk import beneath
from syncd.disk.partial import Identity, PartialFile, key_of
from syncd.errors import (
    BytestreamError,
    DeclinedError,
    ErrorType,
    OfflineError,
    StanzaError,
    SyncdError,
    TransferError,
)
from syncd.transfer import pump, receiver, si, taking
from syncd.transfer.sender import Sent, Source, Target
from syncd.wiring.allowances import Allowances, Terms
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import Iq, make_iq
from syncd.xmpp.xml import is_writable, make
from tests.support.disk import make_room, small_disk
from tests.support.hostile import HARMLESS, REFUSED
from tests.support.peers import (
    ALICE,
    BOB,
    FOLDER,
    LONG_AGO,
    MALLORY,
    Fault,
    Peers,
    open_files,
    open_peers,
    snapshot,
)
from tests.support.steps import cancelled_at, cancelling

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from xml.etree.ElementTree import Element

    from syncd.transfer.incoming import Arriving

MIB = 1 << 20  # bytes
LARGE = 16 * MIB


def content(size: int) -> bytes:
    """Bytes that are the same nowhere else in the file."""
    return blake3.blake3(b"%d" % size).digest(length=size)


def digest(data: bytes) -> bytes:
    return blake3.blake3(data).digest()


def an_offer(
    *, path: str | None = "a", name: str = "a", size: int | None = 1, sid: str = ""
) -> si.Offer:
    """An offer of a syncd, or of a plain client if there is no path."""
    sync = None if path is None else si.Sync(folder=FOLDER, path=path, mtime_ns=LONG_AGO)
    return si.Offer(
        sid=sid or secrets.token_hex(16),
        name=name,
        size=size,
        methods=(si.BYTESTREAMS,),
        ranged=path is not None,
        sync=sync,
    )


def streamhosts(peers: Peers) -> list[s5b.Streamhost]:
    return [s5b.Streamhost(ALICE, "127.0.0.1", peers.listener.port)]


async def open_by_hand(peers: Peers, sid: str, sender: JID = ALICE) -> trio.SocketStream:
    with peers.listener.expect(s5b.dstaddr(sid, sender, BOB)) as slot:
        await peers.ask(s5b.make_query(sid, streamhosts(peers)), sender=sender)
        return await slot.winner()


async def plain_send(peers: Peers, name: str, data: bytes, *, size: int | None = None) -> None:
    """Send as a client does that knows nothing of syncd."""
    offer = an_offer(path=None, name=name, size=len(data) if size is None else size)
    await peers.ask(si.make_offer(offer))
    stream = await open_by_hand(peers, offer.sid)
    await stream.send_all(data)
    await stream.aclose()
    await peers.settled()


async def refused(asking: Awaitable[object]) -> StanzaError:
    with pytest.raises(StanzaError) as caught:
        await asking
    return caught.value


def offsets(peers: Peers) -> list[int]:
    """Where each offer was answered to begin."""
    found = []
    for exchange in peers.server.exchanges:
        if exchange.tag == si.SI:
            offer, [answer] = si.read_offer(exchange.payload), exchange.answers
            found.append(si.read_answer(answer[0], offer).offset)
    return found


# Going on in the middle


async def test_transfer_that_was_cut_goes_on_where_it_was(tmp_path: Path) -> None:
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        await peers.send_until_cut(source, 5 * MIB)
        assert peers.received() == {}
        assert [path.stat().st_size for path in peers.partials()] == [5 * MIB]
        peers.relay.cut_at(None)
        assert await peers.send(source) == Sent(True, digest(data))
        assert offsets(peers) == [0, 5 * MIB]
        assert peers.relay.passed == LARGE
        assert peers.received() == {"a": data}
        assert peers.partials() == []


async def test_transfer_goes_on_after_a_restart_of_the_receiver(tmp_path: Path) -> None:
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        peers.relay.hold_at(5 * MIB)
        async with trio.open_nursery() as nursery:

            async def restart() -> None:
                await peers.relay.reached.wait()
                await peers.restart_receiver()
                peers.relay.resume.set()

            nursery.start_soon(restart)
            with pytest.raises(TransferError):
                await peers.send(source)
        peers.relay.hold_at(None)
        [partial] = peers.partials()
        kept = partial.stat().st_size
        assert 0 < kept <= 5 * MIB
        assert await peers.send(source) == Sent(True, digest(data))
        assert offsets(peers) == [0, kept]
        assert peers.received() == {"a": data}


async def test_many_cuts_lead_to_the_same_file(tmp_path: Path) -> None:
    data = content(100_000)
    cuts = [1, 1, 999, 65_536]
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        for cut in cuts:
            await peers.send_until_cut(source, cut)
        peers.relay.cut_at(None)
        await peers.send(source)
        assert offsets(peers) == [0, 1, 2, 1001, 66_537]
        assert peers.received() == {"a": data}


async def test_beginning_that_is_not_the_files_is_dropped(tmp_path: Path) -> None:
    """A disk that lies costs one transfer, never the file."""
    data = content(2 * MIB)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        await peers.send_until_cut(source, MIB)
        peers.relay.cut_at(None)
        [partial] = peers.partials()
        with partial.open("r+b") as file:
            file.write(b"not what was sent")
        with pytest.raises(TransferError, match="damaged") as caught:
            await peers.send(source)
        assert caught.value.type == ErrorType.WAIT
        await peers.settled()
        assert peers.received() == {}
        await peers.send(source)
        assert offsets(peers) == [0, MIB, 0]
        assert peers.received() == {"a": data}


async def test_byte_that_is_forged_on_the_way_is_found(tmp_path: Path) -> None:
    data = content(MIB)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        peers.relay.flip_at(MIB - 1)
        with pytest.raises(TransferError, match="not what was sent"):
            await peers.send(source)
        await peers.settled()
        assert (peers.received(), peers.partials(), peers.arrived) == ({}, [], [])


async def test_surplus_bytes_are_refused(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.relay.add(b"!")
        with pytest.raises(TransferError):
            await peers.send(peers.write("a", b"content"))
        await peers.settled()
        assert (peers.received(), peers.arrived) == ({}, [])


async def test_new_version_does_not_go_on_from_the_old_one(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.relay.cut_at(MIB)
        with pytest.raises(TransferError):
            await peers.send(peers.write("a", content(2 * MIB)))
        await peers.settled()
        peers.relay.cut_at(None)
        data = content(3 * MIB)
        await peers.send(peers.write("a", data))
        assert offsets(peers) == [0, 0]
        assert peers.received() == {"a": data}
        assert peers.partials() == []


async def test_file_that_is_offered_again_ends_its_former_transfer(tmp_path: Path) -> None:
    """The sender was restarted, and the receiver has not noticed: its socket is still open."""
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        peers.relay.hold_at(MIB)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def vanish() -> None:
                    await peers.relay.reached.wait()
                    scope.cancel()

                nursery.start_soon(vanish)
                await peers.send(source)
        [first] = peers.incoming
        while first.progress.offset < MIB:  # noqa: ASYNC110 - counted in its data thread
            await trio.sleep(0.001)
        assert not first.ended.is_set()
        peers.relay.hold_at(None)
        assert await peers.send(source) == Sent(True, digest(data))
        assert first.ended.is_set()
        assert offsets(peers) == [0, MIB]
        assert peers.received() == {"a": data}


@pytest.mark.parametrize(
    ("sids", "paths", "condition"),
    [
        ("11", "aa", "resource-constraint"),
        ("12", "aa", "resource-constraint"),
        ("11", "ab", "not-acceptable"),
    ],
)
async def test_file_that_is_offered_twice_at_once_is_taken_once(
    tmp_path: Path, sids: str, paths: str, condition: str
) -> None:
    """Two transfers must never write to one partial file, or be known by one sid."""
    async with open_peers(tmp_path) as peers:
        outcomes: list[str] = []

        async def ask(sid: str, path: str) -> None:
            try:
                answer = await peers.ask(si.make_offer(an_offer(sid=sid, path=path)))
            except StanzaError as error:
                outcomes.append(error.condition)
            else:
                outcomes.append(answer.type)

        async with trio.open_nursery() as nursery:
            for sid, path in zip(sids, paths, strict=True):
                nursery.start_soon(ask, sid, path)
        assert sorted(outcomes) == sorted([condition, "result"])
        assert len(peers.partials()) == 1


@pytest.mark.parametrize("resource", [ALICE.resource, "phone"])
async def test_two_files_of_one_name_from_plain_clients_at_once_both_arrive(
    tmp_path: Path, resource: str
) -> None:
    """Cameras count from one again; nothing of the first may be given up for the second."""
    files = [(ALICE, content(300_000)), (ALICE.with_resource(resource), content(400_000))]
    async with open_peers(tmp_path) as peers:
        streams = []
        for sender, data in files:
            offer = replace(an_offer(path=None, name="IMG_1.jpg", size=len(data)), ranged=True)
            await peers.ask(si.make_offer(offer), sender=sender)
            stream = await open_by_hand(peers, offer.sid, sender)
            await stream.send_all(data[:150_000])
            streams.append((stream, data))
        assert len(peers.partials()) == 2
        for stream, data in streams:
            await stream.send_all(data[150_000:])
            await stream.aclose()
        await peers.settled()
        assert set(peers.received().values()) == {data for _, data in files}
        assert peers.partials() == []


@pytest.mark.parametrize("online", [True, False])
async def test_another_syncd_of_the_same_account_waits_as_long_as_the_first_is_there(
    tmp_path: Path, online: bool
) -> None:
    """Would each end the other's transfer, neither would ever be through."""
    async with open_peers(tmp_path) as peers:
        if online:
            peers.there.add(ALICE)
        await peers.ask(si.make_offer(an_offer(size=MIB)))
        [first] = peers.incoming
        asking = peers.ask(
            si.make_offer(an_offer(size=MIB)), sender=ALICE.with_resource("phone")
        )
        if online:
            error = await refused(asking)
            assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        else:
            assert (await asking).type == "result"
        assert first.ended.is_set() is not online


@pytest.mark.parametrize("found", [False, True])
async def test_directory_counts_for_the_file_that_it_is_made_for(
    tmp_path: Path, found: bool
) -> None:
    """Four of one new tree at once: its ten directories and they themselves are 14."""
    tree = "/".join("0123456789")
    async with open_peers(tmp_path) as peers:
        peers.allowances = Allowances(trio.current_time, {ALICE.bare: Terms(max_files=44)})
        offers = [an_offer(path=f"{tree}/{number}", size=0) for number in range(4)]
        for offer in offers:
            await peers.ask(si.make_offer(offer))
        allowance = peers.allowances.of(ALICE.bare)
        with pytest.raises(StanzaError):
            allowance.reserve(0, known=True, entries=1)
        if found:
            peers.folder.joinpath(tree).mkdir(parents=True)  # by somebody else, meanwhile
        async with trio.open_nursery() as nursery:
            for offer in offers:
                finish = si.Finish(sid=offer.sid, size=0, digest=digest(b""))
                nursery.start_soon(peers.ask, si.make_finish(finish))
        await peers.settled()
        assert len(peers.received()) == 4
        made = 4 if found else 14
        with pytest.raises(StanzaError):
            allowance.reserve(0, known=True, entries=44 - made + 1)
        assert allowance.reserve(0, known=True, entries=44 - made) == 0


async def test_directories_count_although_their_file_did_not_come(tmp_path: Path) -> None:
    async def refuse(_: Arriving) -> None:
        raise TransferError("the journal is full")

    async with open_peers(tmp_path) as peers:
        peers.allowances = Allowances(trio.current_time, {ALICE.bare: Terms(max_files=5)})
        peers.on_arriving = refuse
        with pytest.raises(TransferError):
            await peers.send(peers.write("a/b/c", b""))
        await peers.settled()
        allowance = peers.allowances.of(ALICE.bare)
        with pytest.raises(StanzaError):
            allowance.reserve(0, known=True, entries=3 + 1)
        assert allowance.reserve(0, known=True, entries=3) == 0


# Being there already


async def test_file_that_came_before_the_restart_is_not_sent_again(tmp_path: Path) -> None:
    data = content(MIB)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        peers.server.inject(si.FINISH, *[Fault.LOSE_ANSWER] * 3)
        with pytest.raises(OfflineError):
            await peers.send(source)
        await peers.restart_receiver()
        assert await peers.send(source) == Sent(True, digest(data))
        assert offsets(peers) == [0, MIB]
        assert peers.server.tags().count(s5b.TAG) == 1
        assert peers.relay.passed == MIB
        assert len(peers.arrived) == 1


@pytest.mark.parametrize("sealed", [False, True])
async def test_copy_that_is_kept_beside_comes_once(tmp_path: Path, sealed: bool) -> None:
    """Its receipt was lost, and the receiver was restarted: the same offer finds the copy."""
    data = content(MIB)
    async with open_peers(tmp_path, sealed=sealed) as peers:
        (peers.folder / "a").write_bytes(b"ours")
        source = peers.write("a", data)
        peers.server.inject(si.FINISH, *[Fault.LOSE_ANSWER] * 3)
        with pytest.raises(OfflineError):
            await peers.send(source)
        await peers.restart_receiver()
        expected = Sent(True, digest(data), sealed=sealed, beside=True)
        assert await peers.send(source) == expected
        assert offsets(peers) == [0, MIB]
        assert sorted(peers.received().values()) == sorted([b"ours", data])


@pytest.mark.parametrize("taken_by", ["nobody", "us", "the same sender"])
async def test_lost_receipt_costs_nothing_of_the_inbox_either(
    tmp_path: Path, taken_by: str
) -> None:
    """As in a folder: neither bytes again, nor another copy."""
    data, taken = content(MIB), taken_by != "nobody"
    async with open_peers(tmp_path) as peers:
        if taken_by == "us":
            (peers.inbox / "a").write_bytes(b"ours")
        elif taken:
            await plain_send(peers, "a", b"ours")
        source = replace(peers.write("a", data), folder="")
        for _ in range(2):
            peers.server.inject(si.FINISH, *[Fault.LOSE_ANSWER] * 3)
            with pytest.raises(OfflineError):
                await peers.send(source)
            await peers.restart_receiver()
        assert await peers.send(source) == Sent(True, digest(data), beside=taken)
        assert offsets(peers)[-3:] == [0, MIB, MIB]
        assert peers.relay.passed == MIB
        assert sorted(peers.received().values()) == sorted([data, *[b"ours"] * taken])


async def test_inbox_keeps_every_file_of_one_name(tmp_path: Path) -> None:
    """Two that a syncd sends outside any folder share no more than the name."""
    async with open_peers(tmp_path) as peers:
        sources = []
        for data in (b"report", b"another report", b"a third"):
            source = replace(peers.write("a", data), folder="")
            sources.append((await peers.send(source)).beside)
        assert sources == [False, True, True]
        assert sorted(peers.received().values()) == [b"a third", b"another report", b"report"]


@pytest.mark.parametrize("change", ["copy deleted", "copy edited", "ours deleted"])
async def test_copy_that_is_gone_from_beside_comes_again(tmp_path: Path, change: str) -> None:
    async with open_peers(tmp_path) as peers:
        (peers.folder / "a").write_bytes(b"ours")
        source = peers.write("a", b"content")
        await peers.send(source)
        [copy] = peers.folder.glob("a.conflict-*")
        match change:
            case "copy deleted":
                copy.unlink()
            case "copy edited":
                copy.write_bytes(b"edit")
            case _:
                (peers.folder / "a").unlink()
        sent = await peers.send(source)
        assert offsets(peers) == [0, 0]
        assert sent.beside == (change != "ours deleted")
        if change == "ours deleted":
            assert (peers.folder / "a").read_bytes() == b"content"


async def test_other_content_than_the_copy_beside_is_found_out(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        (peers.folder / "a").write_bytes(b"ours")
        await peers.send(peers.write("a", b"content"))
        source = peers.write("a", b"CONTENT")
        with pytest.raises(TransferError):
            await peers.send(source)
        await peers.settled()
        assert (await peers.send(source)).beside
        assert {b"ours", b"CONTENT"} <= set(peers.received().values())


# Editing at both ends


def ours(peers: Peers, data: bytes, mtime_ns: int) -> Identity:
    """Put a file of his own into Bob's folder."""
    file = peers.folder / "a"
    file.write_bytes(data)
    os.utime(file, ns=(mtime_ns, mtime_ns))
    return Identity.of(file.stat())


async def test_edit_of_what_the_sender_had_from_us_takes_its_place(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.held["a"] = ours(peers, b"ours", LONG_AGO - 1)
        sent = await peers.send(peers.write("a", b"ours, edited"))
        assert not sent.beside
        assert peers.received() == {"a": b"ours, edited"}


@pytest.mark.parametrize("reason", ["edited here too", "older than ours", "never had ours"])
async def test_anything_else_is_kept_beside_ours(tmp_path: Path, reason: str) -> None:
    async with open_peers(tmp_path) as peers:
        held = ours(peers, b"ours", LONG_AGO + (reason == "older than ours"))
        if reason != "never had ours":
            peers.held["a"] = held
        if reason == "edited here too":
            ours(peers, b"other", LONG_AGO - 1)
        here = (peers.folder / "a").read_bytes()
        sent = await peers.send(peers.write("a", b"theirs"))
        assert sent.beside
        assert (peers.folder / "a").read_bytes() == here
        assert sorted(peers.received().values()) == sorted([here, b"theirs"])


async def test_what_the_sender_hears_of_too_late_is_no_reason_to_replace(
    tmp_path: Path,
) -> None:
    """Ours reached it after its offer, so that the offered version is no edit of ours."""
    async with open_peers(tmp_path) as peers:
        held = ours(peers, b"ours", LONG_AGO - 1)
        source = peers.write("a", content(MIB))
        peers.relay.hold_at(1)
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                await peers.relay.reached.wait()
                peers.held["a"] = held
                peers.relay.resume.set()

            nursery.start_soon(hear)
            assert (await peers.send(source)).beside
        assert (peers.folder / "a").read_bytes() == b"ours"


@pytest.mark.parametrize("change", ["edited", "deleted", "other sender"])
async def test_file_that_is_not_as_it_came_is_sent_again(tmp_path: Path, change: str) -> None:
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", b"content")
        await peers.send(source)
        match change:
            case "edited":
                (peers.folder / "a").write_bytes(b"our edit")
            case "deleted":
                (peers.folder / "a").unlink()
            case _:
                known = peers.journal[FOLDER, "a"]
                peers.journal[FOLDER, "a"] = replace(known, peer=MALLORY.bare)
        await peers.send(source)
        assert offsets(peers) == [0, 0]
        expected = {"edited": [b"content", b"our edit"]}.get(change, [b"content"])
        assert sorted(peers.received().values()) == expected


async def test_other_content_of_the_same_size_and_time_is_found_out(tmp_path: Path) -> None:
    """The first answer is a wrong "already here"; the hash says so, and the next is right."""
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("a", b"content"))
        source = peers.write("a", b"CONTENT")
        with pytest.raises(TransferError) as caught:
            await peers.send(source)
        assert caught.value.type == ErrorType.WAIT
        await peers.settled()
        assert peers.received() == {"a": b"content"}
        await peers.send(source)
        assert offsets(peers) == [0, 7, 0]
        assert peers.received() == {"a": b"CONTENT"}


# Who, and what


STRANGER = StanzaError(ErrorType.CANCEL, "forbidden", "not accepted from you here")


@pytest.mark.parametrize("path", ["a", None])
async def test_stranger_is_refused_and_leaves_no_trace(
    tmp_path: Path, path: str | None
) -> None:
    async with open_peers(tmp_path) as peers:
        before = snapshot(tmp_path)
        error = await refused(peers.ask(si.make_offer(an_offer(path=path)), sender=MALLORY))
        assert (error.type, error.condition, error.text) == (
            STRANGER.type,
            STRANGER.condition,
            STRANGER.text,
        )
        assert snapshot(tmp_path) == before
        assert peers.incoming == []


async def test_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        source = replace(peers.write("a", b"x"), folder="private")
        with pytest.raises(DeclinedError):
            await peers.send(source)
        assert peers.received() == {}


@pytest.mark.parametrize("sender", [JID.parse("alice@example.org"), JID.parse("example.org")])
@pytest.mark.parametrize(
    "payload",
    [
        si.make_offer(an_offer()),
        s5b.make_query("a0", []),
        si.make_finish(si.Finish(sid="a0", size=1, digest=bytes(32))),
    ],
    ids=["offer", "bytestream", "finish"],
)
async def test_only_a_full_address_can_transfer(
    tmp_path: Path, sender: JID, payload: Element
) -> None:
    async with open_peers(tmp_path) as peers:
        assert (await refused(peers.ask(payload, sender=sender))).condition == "forbidden"


@pytest.mark.parametrize("tag", [si.SI, s5b.TAG, si.FINISH])
async def test_transfers_are_asked_for_by_set(tmp_path: Path, tag: str) -> None:
    async with open_peers(tmp_path) as peers:
        assert (await refused(peers.ask(make(tag), kind="get"))).condition == "bad-request"


async def test_server_that_does_not_say_who_is_refused(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        payload = si.make_offer(an_offer())
        iq = Iq("set", "1", None, payload, make_iq("set", "1", None, payload))
        error = await refused(peers.receiver.on_offer(iq))
        assert error.condition == "forbidden"


async def test_offers_that_cannot_be_taken_say_why(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        before = snapshot(tmp_path)
        unknown = replace(an_offer(), methods=("jabber:iq:oob",))
        error = await refused(peers.ask(si.make_offer(unknown)))
        assert (error.condition, error.app) == (
            "bad-request",
            f"{{{si.NS_SI}}}no-valid-streams",
        )
        error = await refused(peers.ask(si.make_offer(an_offer(size=None))))
        assert (error.condition, error.text) == (
            "bad-request",
            "the size of the file is missing",
        )
        huge = an_offer(size=2**63 - 1)
        error = await refused(peers.ask(si.make_offer(huge)))
        assert (error.type, error.condition) == (ErrorType.CANCEL, "not-acceptable")
        (peers.folder / ".syncd").rmdir()
        assert snapshot(tmp_path) == before


async def test_gate_of_the_schema_is_passed_first(tmp_path: Path) -> None:
    """What our own reading would overlook is refused by it."""
    async with open_peers(tmp_path) as peers:
        offer = an_offer()
        await peers.ask(si.make_offer(offer))
        broken = si.make_offer(an_offer(path="b"))
        broken[0].append(make(si.RANGE, {"offset": "-1"}))
        assert (await refused(peers.ask(broken))).condition == "bad-request"
        query = s5b.make_query(offer.sid, [])
        query.append(make(f"{{{s5b.NS}}}unheard-of"))
        assert (await refused(peers.ask(query))).condition == "bad-request"
        finish = si.make_finish(si.Finish(sid=offer.sid, size=1, digest=bytes(32)))
        finish.append(make(f"{{{si.NS_SYNC}}}child"))
        assert (await refused(peers.ask(finish))).condition == "bad-request"


async def test_finish_that_is_malformed_harms_nobody(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        finish = si.make_finish(si.Finish(sid="a0", size=1, digest=bytes(32)))
        finish.set("blake3", "é" * 44)
        error = await refused(peers.ask(finish, sender=MALLORY))
        assert error.condition == "bad-request"
        assert (await peers.send(peers.write("a", b"x"))).confirmed


async def test_only_who_was_accepted_can_open_and_finish(tmp_path: Path) -> None:
    """Neither another account, nor another resource of the same, nor another sid."""
    async with open_peers(tmp_path) as peers:
        offer = an_offer()
        await peers.ask(si.make_offer(offer))
        for sender in (MALLORY, ALICE.with_resource("phone")):
            query = s5b.make_query(offer.sid, streamhosts(peers))
            assert (
                await refused(peers.ask(query, sender=sender))
            ).condition == "not-acceptable"
            finish = si.make_finish(si.Finish(sid=offer.sid, size=1, digest=bytes(32)))
            assert (
                await refused(peers.ask(finish, sender=sender))
            ).condition == "item-not-found"
        other = s5b.make_query("other", streamhosts(peers))
        assert (await refused(peers.ask(other))).condition == "not-acceptable"


async def test_receipt_is_told_only_to_its_sender(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("a", b"x"))
        [question] = [each for each in peers.server.exchanges if each.tag == si.FINISH]
        error = await refused(peers.ask(question.payload, sender=MALLORY))
        assert (error.type, error.condition) == (ErrorType.WAIT, "item-not-found")
        # The sender may have got another resource meanwhile.
        again = await peers.ask(question.payload, sender=ALICE.with_resource("phone"))
        assert si.read_receipt(again.payload) == si.read_finish(question.payload)


async def test_oldest_receipts_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "MAX_RECEIPTS", 2)
    async with open_peers(tmp_path) as peers:
        for number in range(3):
            await peers.send(peers.write(str(number), b""))
        first, *others = [each for each in peers.server.exchanges if each.tag == si.FINISH]
        assert (await refused(peers.ask(first.payload))).condition == "item-not-found"
        for other in others:
            assert (await peers.ask(other.payload)).type == "result"


# Limits


@pytest.mark.parametrize("path", ["b", None])
async def test_sid_that_is_in_use_is_refused(tmp_path: Path, path: str | None) -> None:
    async with open_peers(tmp_path) as peers:
        first = an_offer()
        await peers.ask(si.make_offer(first))
        error = await refused(peers.ask(si.make_offer(an_offer(path=path, sid=first.sid))))
        assert error.condition == "not-acceptable"
        # Another resource has sids of its own.
        second = si.make_offer(an_offer(path="c", sid=first.sid))
        assert (await peers.ask(second, sender=ALICE.with_resource("phone"))).type == "result"


async def test_sid_of_a_transfer_that_has_ended_may_come_again(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        for data in (b"first", b"second"):
            offer = an_offer(path=None, name=data.decode(), size=len(data), sid="1")
            await peers.ask(si.make_offer(offer))
            stream = await open_by_hand(peers, "1")
            await stream.send_all(data)
            await stream.aclose()
            await peers.settled()
        assert peers.received() == {"first": b"first", "second": b"second"}


@pytest.mark.parametrize(("per_peer", "in_all"), [(2, 9), (9, 2)])
async def test_no_more_transfers_than_can_be_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_peer: int, in_all: int
) -> None:
    monkeypatch.setattr(receiver, "MAX_PER_PEER", per_peer)
    monkeypatch.setattr(receiver, "MAX_OPEN", in_all)
    async with open_peers(tmp_path) as peers:
        for name in ("a", "b"):
            await peers.ask(si.make_offer(an_offer(path=None, name=name)))
        error = await refused(peers.ask(si.make_offer(an_offer(path=None, name="c"))))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        assert len(peers.partials()) == 2


async def test_offer_that_would_wait_for_slow_transfers_is_to_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted, it would wait for a thread longer than its sender does, who blames the way."""
    monkeypatch.setattr(pump, "PEER_THREADS", 2)
    async with open_peers(tmp_path) as peers:
        for name in ("a", "b"):
            await peers.ask(si.make_offer(an_offer(path=name)))
        # Taken for short ones as yet, as many small files are that come at once.
        await peers.ask(si.make_offer(an_offer(path="c")))
        monkeypatch.setattr(pump, "SOON", 0.0)
        error = await refused(peers.ask(si.make_offer(an_offer(path="d"))))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        assert len(peers.partials()) == 3
        # A plain client would not come again, and is in nobody's way but its own.
        await peers.ask(si.make_offer(an_offer(path=None, name="e")))
        monkeypatch.setattr(pump, "IN_THREADS", 2)
        error = await refused(peers.ask(si.make_offer(an_offer(path=None, name="f"))))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        await peers.restart_receiver()
        await peers.ask(si.make_offer(an_offer(path="d")))


async def test_huge_files_are_accepted_as_many_as_have_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones may wait for each other; behind a huge one nobody's patience is enough."""
    monkeypatch.setattr(pump, "PEER_THREADS", 2)
    async with open_peers(tmp_path) as peers:
        for name in ("a", "b"):
            await peers.ask(si.make_offer(an_offer(path=name, size=LARGE)))
        for size in (LARGE, 1):
            error = await refused(peers.ask(si.make_offer(an_offer(path="c", size=size))))
            assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        # One that is offered again needs no thread but that of its former transfer.
        former = peers.incoming[0]
        await peers.ask(si.make_offer(an_offer(path="a", size=LARGE)))
        assert former.ended.is_set()
        assert len(peers.partials()) == 2


async def test_offer_that_is_refused_does_not_end_the_former_transfer_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(LARGE)
    async with open_peers(tmp_path) as peers, trio.open_nursery() as nursery:
        source = peers.write("a", data)
        peers.relay.hold_at(MIB)
        nursery.start_soon(peers.send, source)
        await peers.relay.reached.wait()
        monkeypatch.setattr(pump, "IN_THREADS", 0)
        offer = an_offer(path="a", size=LARGE)
        error = await refused(peers.ask(si.make_offer(offer)))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        peers.relay.resume.set()
        await peers.settled()
        assert peers.received() == {"a": data}


async def test_new_file_does_not_wait_for_what_is_hashed(tmp_path: Path) -> None:
    """After a restart huge files are proved for hours; a new one has nothing to prove."""
    hashed = threading.Event()
    async with open_peers(tmp_path) as peers, trio.open_nursery() as nursery:
        for peer in [ALICE.bare] * pump.PEER_HASH_THREADS + [BOB.bare] * pump.PEER_HASH_THREADS:
            nursery.start_soon(pump.threads("hash").run, hashed.wait, peer)
        await trio.testing.wait_all_tasks_blocked()
        assert pump.threads("hash").limiter.available_tokens == 0
        try:
            assert (await peers.send(peers.write("a", b"new"))).confirmed
        finally:
            hashed.set()


async def test_offers_that_come_at_once_do_not_pass_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "MAX_OPEN", 3)
    async with open_peers(tmp_path) as peers:
        before = open_files()
        outcomes: list[str] = []

        async def ask(name: str) -> None:
            try:
                await peers.ask(si.make_offer(an_offer(path=None, name=name)))
            except StanzaError as error:
                outcomes.append(error.condition)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(ask, str(number))
        assert outcomes == ["resource-constraint"] * 7
        assert len(peers.partials()) == 3
        await peers.stop_receiver()
        assert open_files() == before


async def test_requests_for_one_transfer_have_a_limit(tmp_path: Path) -> None:
    """Six ask at once for a receipt that nobody can give yet; each gets an answer."""
    async with open_peers(tmp_path) as peers:
        offer = an_offer()
        await peers.ask(si.make_offer(offer))
        finish = si.make_finish(si.Finish(sid=offer.sid, size=1, digest=bytes(32)))
        conditions: list[str] = []

        async def ask() -> None:
            conditions.append((await refused(peers.ask(finish))).condition)

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert conditions == ["item-not-found"] * 2
            await peers.stop_receiver()
        assert conditions == ["item-not-found"] * 6


# Deadlines


async def test_bytestream_that_is_never_opened_ends_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking, "OPEN_TIMEOUT", 0.01)
    async with open_peers(tmp_path) as peers:
        offers = [an_offer(path=None), an_offer()]
        for offer in offers:
            await peers.ask(si.make_offer(offer))
        await trio.testing.wait_all_tasks_blocked()
        await peers.settled()
        for offer in offers:
            query = s5b.make_query(offer.sid, streamhosts(peers))
            assert (await refused(peers.ask(query))).condition == "not-acceptable"
        # Nothing came that could be gone on from: who offers and never sends leaves nothing.
        assert peers.leftovers() == []


async def test_transfer_that_is_never_finished_ends_and_keeps_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "FINISH_TIMEOUT", 0.01)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", b"content")
        held = trio.Event()
        peers.server.inject(si.FINISH, held)

        async def release() -> None:
            await peers.server.asked(si.FINISH)
            await peers.settled()
            held.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(release)
            with pytest.raises(TransferError, match="given this transfer up"):
                await peers.send(source)
        assert peers.received() == {}
        assert (await peers.send(source)).confirmed
        assert peers.relay.passed == len(b"content")


async def test_present_file_that_is_never_asked_about_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("a", b"content"))
        monkeypatch.setattr(receiver, "FINISH_TIMEOUT", 0.01)
        await peers.ask(si.make_offer(an_offer(size=7)))
        await trio.testing.wait_all_tasks_blocked()
        await peers.settled()
        assert len(peers.incoming) == 2
        assert peers.incoming[1].present is not None


# Streams that break, handlers that are cancelled


async def test_answer_that_is_lost_while_bytes_begin_costs_one_attempt(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", content(MIB))
        for tag, fault in (
            (si.SI, Fault.LOSE_ANSWER),
            (si.SI, Fault.LOSE_REQUEST),
            (s5b.TAG, Fault.LOSE_ANSWER),
            (s5b.TAG, Fault.LOSE_REQUEST),
        ):
            peers.server.inject(tag, fault)
            with pytest.raises(OfflineError):
                await peers.send(source)
        assert (await peers.send(source)).confirmed
        assert peers.received() == {"a": content(MIB)}


async def test_bytestream_that_is_opened_twice_does_no_harm(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.server.inject(s5b.TAG, Fault.TWICE)
        assert (await peers.send(peers.write("a", content(MIB)))).confirmed
        assert peers.received() == {"a": content(MIB)}
        await trio.testing.wait_all_tasks_blocked()
        answers = [each.answers for each in peers.server.exchanges if each.tag == s5b.TAG]
        assert sorted(answer.get("type", "") for [answer] in answers) == ["error", "result"]


def hold_the_journal(peers: Peers) -> tuple[trio.Event, trio.Event]:
    """Let the disk be busy when the next file comes; the events: it is, it may go on."""
    busy, go_on = trio.Event(), trio.Event()

    async def wait(_: Arriving) -> None:
        if not busy.is_set():
            busy.set()
            await go_on.wait()

    peers.on_arriving = wait
    return busy, go_on


async def test_question_that_is_cancelled_with_its_stream_does_not_stop_the_storing(
    tmp_path: Path,
) -> None:
    """The second question, on the next stream, waits for the same disk and gets the receipt."""
    async with open_peers(tmp_path) as peers:
        busy, go_on = hold_the_journal(peers)
        source = peers.write("a", b"content")

        async def outage() -> None:
            await busy.wait()
            peers.server.break_stream()
            await trio.testing.wait_all_tasks_blocked(0.02)
            go_on.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outage)
            assert (await peers.send(source)).confirmed
        assert peers.server.tags() == [si.SI, s5b.TAG, si.FINISH, si.FINISH]
        assert [each.broken for each in peers.server.exchanges] == [False, False, True, False]
        assert len(peers.arrived) == 1


async def test_transfer_that_is_ended_while_it_is_stored_still_answers(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        busy, _ = hold_the_journal(peers)
        source = peers.write("a", b"content")

        async def send_again() -> None:
            await busy.wait()
            assert (await peers.send(source)).confirmed

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_again)
            with pytest.raises(TransferError, match="given this transfer up"):
                await peers.send(source)
        assert peers.received() == {"a": b"content"}
        assert peers.relay.passed == len(b"content")


async def test_transfer_that_is_ended_while_it_connects_still_answers(tmp_path: Path) -> None:
    """A streamhost that accepts and says nothing, and a sender that is restarted meanwhile."""
    async with open_peers(tmp_path) as peers:
        [silent] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with silent, trio.open_nursery() as nursery:
            offer = an_offer()
            await peers.ask(si.make_offer(offer))
            port = silent.socket.getsockname()[1]
            query = s5b.make_query(offer.sid, [s5b.Streamhost(ALICE, "127.0.0.1", port)])

            async def ask() -> None:
                assert (await refused(peers.ask(query))).condition == "item-not-found"

            nursery.start_soon(ask)
            connection = await silent.accept()
            assert (await peers.send(peers.write("a", b"x"))).confirmed
            await connection.aclose()


async def dead_port() -> int:
    [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listening.socket.getsockname()[1]
    await listening.aclose()
    return port


@pytest.mark.parametrize("there", ["nobody", "another server"])
async def test_c04_who_names_streamhosts_does_not_hear_why_none_worked(
    tmp_path: Path,
    there: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An allowed peer is not to look through us at what listens in our network."""
    monkeypatch.setattr(taking, "NEXT_WAY_TIMEOUT", 0.05)
    caplog.set_level("INFO")
    async with open_peers(tmp_path) as peers:
        [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listening.socket.getsockname()[1]
        async with listening, trio.open_nursery() as nursery:

            async def serve() -> None:
                async with await listening.accept() as stream:
                    await stream.send_all(b"220 mail.example.org\r\n")

            if there == "nobody":
                await listening.aclose()
            else:
                nursery.start_soon(serve)
            offer = an_offer()
            await peers.ask(si.make_offer(offer))
            texts = []

            async def finish() -> None:
                asked = si.make_finish(si.Finish(sid=offer.sid, size=1, digest=bytes(32)))
                texts.append((await refused(peers.ask(asked))).text)

            # What waits when the transfer ends hears its reason, too.
            nursery.start_soon(finish)
            hosts = [s5b.Streamhost(ALICE, "127.0.0.1", port)]
            error = await refused(peers.ask(s5b.make_query(offer.sid, hosts)))
            assert error.condition == "item-not-found"
            await peers.settled()
        told = "no streamhost led to a bytestream (1 tried)"
        assert (error.text, texts) == (told, [told])
    assert f"127.0.0.1:{port}" in caplog.text


async def test_streamhosts_that_lead_nowhere_end_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking, "NEXT_WAY_TIMEOUT", 0.01)
    async with open_peers(tmp_path) as peers:
        only_direct = peers.make_sender(peers.listener, inband=False)
        real, peers.relay.port = peers.relay.port, await dead_port()
        source = peers.write("a", b"x")
        with pytest.raises(BytestreamError):
            await only_direct.send(source, Target(jid=BOB, is_syncd=True))
        await peers.settled()
        peers.relay.port = real
        assert (await peers.send(source)).confirmed


async def test_streamhosts_that_lead_nowhere_leave_the_way_through_the_server(
    tmp_path: Path,
) -> None:
    data = content(100_000)
    async with open_peers(tmp_path) as peers:
        peers.relay.port = await dead_port()
        assert await peers.send(peers.write("a", data)) == Sent(True, digest(data))
        assert peers.received() == {"a": data}
        tags = peers.server.tags()
        assert tags[:3] == [si.SI, s5b.TAG, ibb.OPEN]
        # On the same sid: nothing is offered twice.
        assert tags.count(si.SI) == 1
        assert [each.progress.method for each in peers.incoming] == ["ibb"]


async def test_receiver_that_is_offline_by_now_takes_no_bytes(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        offer = an_offer()
        peers.online = False
        await peers.ask(si.make_offer(offer))
        await trio.testing.wait_all_tasks_blocked(0.02)
        query = s5b.make_query(offer.sid, streamhosts(peers))
        assert (await refused(peers.ask(query))).condition == "not-acceptable"


async def test_bug_ends_one_transfer_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_peers(tmp_path) as peers:

        async def stumble(_: Arriving) -> None:
            await trio.lowlevel.checkpoint()
            raise LookupError("a bug")

        source = peers.write("a", b"x")
        peers.on_arriving, well = stumble, peers.on_arriving
        with pytest.raises(TransferError, match="given this transfer up"):
            await peers.send(source)
        peers.on_arriving = well
        assert (await peers.send(source)).confirmed
    assert "LookupError: a bug" in caplog.text


async def test_offer_that_is_cancelled_at_any_step_leaves_nothing_open(tmp_path: Path) -> None:
    """Its stream breaks while the disk is asked."""
    async with open_peers(tmp_path) as peers:
        offer = an_offer(size=2)
        key = key_of(str(ALICE.bare), FOLDER, "a", 2, LONG_AGO)
        payload = si.make_offer(offer)
        iq = Iq("set", "1", ALICE, payload, make_iq("set", "1", None, payload))

        async def ask() -> None:
            await peers.receiver.on_offer(iq)

        for step in range(1, 1_000):
            partial = PartialFile(peers.folder, key, 2)
            os.pwrite(partial.fd, b"x", 0)
            partial.blocks.update(memoryview(b"x"))
            partial.close()
            before = open_files()
            cancelled = await cancelled_at(step, ask)
            await peers.restart_receiver()
            assert open_files() == before
            assert peers.partials() == [peers.folder / ".syncd" / key]
            if not cancelled:
                break
        assert step > 2
        assert not cancelled


async def test_transfer_that_was_accepted_and_never_begun_is_let_go_as_well(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path) as peers:
        before = open_files()
        held = trio.Event()
        peers.server.inject(si.SI, held, held)
        conditions = []

        async def offer(path: str | None) -> None:
            asking = peers.ask(si.make_offer(an_offer(path=path)))
            conditions.append((await refused(asking)).condition)

        async with trio.open_nursery() as nursery:
            for path in ("a", None):
                nursery.start_soon(offer, path)
            await peers.server.asked(si.SI)
            await peers.stop_receiver()
            held.set()
        assert conditions == ["item-not-found"] * 2
        assert (open_files(), peers.leftovers()) == (before, [])


@pytest.mark.parametrize(
    ("way", "here"),
    [
        ("direct", "nothing"),
        ("through the server", "nothing"),
        ("through the server", "another file"),
    ],
)
async def test_receiver_that_is_stopped_at_any_step_leaves_nothing_open(
    tmp_path: Path, way: str, here: str
) -> None:
    """And whatever was done by then, the next one makes it whole, and does nothing twice."""
    async with open_peers(tmp_path) as peers:
        sender = peers.sender if way == "direct" else peers.make_sender(None)
        before = open_files()
        finished, step = False, 0
        while not finished:
            step += 1
            source = peers.write(f"{step}", b"content")
            if here != "nothing":
                (peers.folder / source.path).write_bytes(b"ours")
            target = Target(jid=BOB, is_syncd=True)

            over = trio.Event()

            async def send(
                over: trio.Event = over, source: Source = source, target: Target = target
            ) -> None:
                with contextlib.suppress(SyncdError):
                    await sender.send(source, target)
                over.set()

            async def stopped(over: trio.Event = over) -> None:
                await peers._stopped.wait()
                over.set()

            async with trio.open_nursery() as nursery:
                receiving = peers._receiving
                with cancelling(receiving, step):
                    nursery.start_soon(send)
                    nursery.start_soon(stopped)
                    await over.wait()
                finished = not receiving.cancel_called
                nursery.cancel_scope.cancel()
            peers.server.break_stream()
            await peers.server.idle()
            await peers.restart_receiver()
            while open_files() != before:  # noqa: ASYNC110 - the relay hears of it by its sockets
                await trio.sleep(0.001)
            await sender.send(source, target)
            expected = [b"content"] if here == "nothing" else [b"content", b"ours"]
            copies = peers.folder.glob(f"{source.path}*")
            assert sorted(copy.read_bytes() for copy in copies) == expected
        assert step > 20
        assert peers.partials() == []


async def test_stopping_leaves_no_descriptor_open(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        before = open_files()
        for path in ("a", "b", None):
            await peers.ask(si.make_offer(an_offer(path=path)))
        await peers.stop_receiver()
        assert open_files() == before


@pytest.mark.parametrize("there", ["nothing", "a part", "all of it"])
async def test_syncd_that_cannot_begin_in_the_middle_is_refused(
    tmp_path: Path, there: str
) -> None:
    """What is there could not be answered with an offset; no syncd offers so."""
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", content(2 * MIB))
        if there == "a part":
            peers.relay.cut_at(MIB)
            with pytest.raises(TransferError):
                await peers.send(source)
        elif there == "all of it":
            await peers.send(source)
        await peers.settled()
        before = peers.leftovers()
        offer = replace(an_offer(size=2 * MIB), ranged=False)
        error = await refused(peers.ask(si.make_offer(offer)))
        assert (error.type, error.condition) == (ErrorType.MODIFY, "bad-request")
        assert peers.leftovers() == before


# Plain clients


@pytest.mark.parametrize("size", [0, 1, 5 * MIB])
async def test_file_of_a_plain_client_is_done_at_the_end_of_the_stream(
    tmp_path: Path, size: int
) -> None:
    data = content(size)
    async with open_peers(tmp_path) as peers:
        await plain_send(peers, "photo.jpg", data)
        assert peers.received() == {"photo.jpg": data}
        assert peers.partials() == []
        [arriving] = peers.arrived
        assert (arriving.inbox.folder, arriving.path) == ("", "photo.jpg")
        assert peers.server.tags() == [si.SI, s5b.TAG]


async def test_plain_client_that_does_not_hang_up_is_done_at_the_last_byte(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path) as peers:
        offer = an_offer(path=None, size=7)
        await peers.ask(si.make_offer(offer))
        async with await open_by_hand(peers, offer.sid) as stream:
            await stream.send_all(b"content")
            await peers.settled()
            assert peers.received() == {"a": b"content"}


@pytest.mark.parametrize("data", [b"", b"conten", b"content!", b"content" * 1_000])
async def test_plain_client_that_sends_more_or_less_delivers_nothing(
    tmp_path: Path, data: bytes
) -> None:
    async with open_peers(tmp_path) as peers:
        await plain_send(peers, "a", data, size=7)
        assert (peers.received(), peers.partials(), peers.arrived) == ({}, [], [])


async def test_files_of_one_name_from_plain_clients_are_all_kept(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        for data in (b"first", b"second", b"first"):
            await plain_send(peers, "photo.jpg", data)
        names = sorted(peers.received())
        assert sorted(peers.received().values()) == [b"first", b"second"]
        assert names[1] == "photo.jpg"
        assert names[0].startswith("photo.conflict-alice-")
        assert names[0].endswith(".jpg")


async def test_inbox_that_is_gone_harms_no_other_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk was unmounted while a client was sending."""
    monkeypatch.setattr(taking, "OPEN_TIMEOUT", 0.05)
    async with open_peers(tmp_path) as peers:
        await peers.ask(si.make_offer(an_offer(path=None)))
        peers.inbox.rename(tmp_path / "unmounted")
        await trio.testing.wait_all_tasks_blocked()
        await peers.settled()
        error = await refused(peers.ask(si.make_offer(an_offer(path=None))))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        assert (await peers.send(peers.write("a", b"x"))).confirmed


# Paths


@pytest.mark.parametrize("path", REFUSED, ids=ascii)
async def test_hostile_path_changes_nothing_anywhere(tmp_path: Path, path: str) -> None:
    """Asked past the parser, which would not even let some of them through."""
    (tmp_path / "canary").write_bytes(b"alive")
    async with open_peers(tmp_path) as peers:
        before = snapshot(tmp_path)
        payload = si.make_offer(an_offer(path=path))
        iq = Iq("set", "1", ALICE, payload, make_iq("set", "1", None, payload))
        error = await refused(peers.receiver.on_offer(iq))
        assert error.condition in ("forbidden", "bad-request")
        assert peers.incoming == []
        assert snapshot(tmp_path) == before


async def test_path_that_only_looks_hostile_arrives_below_the_folder(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "canary").write_bytes(b"alive")
        for path in HARMLESS:
            await peers.send(peers.write(path, path.encode()))
        got = {
            os.fsdecode(os.fsencode(name)): data
            for name, data in snapshot(peers.folder).items()
            if data is not None
        }
        assert got == {str(peers.folder / path): path.encode() for path in HARMLESS}
        assert snapshot(outside) == {str(outside / "canary"): b"alive"}
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "folder",
            "inbox",
            "outside",
            "source",
        ]


async def test_every_name_of_a_plain_client_arrives_in_the_inbox(tmp_path: Path) -> None:
    names = [name for name in (*REFUSED, *HARMLESS) if name and is_writable(name)]
    async with open_peers(tmp_path) as peers:
        for name in names:
            await plain_send(peers, name, name.encode())
        assert sorted(peers.received().values()) == sorted(name.encode() for name in names)
        assert len([path for path in peers.inbox.iterdir() if path.is_file()]) == len(names)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "folder",
            "inbox",
            "source",
        ]


@pytest.mark.parametrize("path", ["link/a", "b/link/a"])
async def test_linked_directory_in_the_folder_is_never_written_through(
    tmp_path: Path, path: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    async with open_peers(tmp_path) as peers:
        link = peers.folder / Path(path).parent
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(outside)
        with pytest.raises(TransferError):
            await peers.send(peers.write(path, b"x"))
        assert list(outside.iterdir()) == []


async def test_parent_that_becomes_a_link_in_the_last_instant_is_not_followed(
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    async with open_peers(tmp_path) as peers:

        async def swap(_: Arriving) -> None:
            (peers.folder / "d").rmdir()
            (peers.folder / "d").symlink_to(outside)
            await trio.lowlevel.checkpoint()

        peers.on_arriving = swap
        with pytest.raises(TransferError):
            await peers.send(peers.write("d/a", b"x"))
        assert list(outside.iterdir()) == []


# Places


async def test_journal_knows_of_a_file_before_it_gets_its_name(tmp_path: Path) -> None:
    """Or the folder's own scan would find a file that nobody knows, and send it back."""
    async with open_peers(tmp_path) as peers:
        seen: list[tuple[list[str], int]] = []

        async def look(arriving: Arriving) -> None:
            await trio.lowlevel.checkpoint()
            [partial] = peers.partials()
            assert partial.stat().st_ino == arriving.known.identity.inode
            seen.append((list(peers.received()), partial.stat().st_mtime_ns))

        peers.on_arriving = look
        await peers.send(peers.write("a", b"x"))
        assert seen == [([], LONG_AGO)]


async def test_new_version_replaces_the_one_that_came_before(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        for data in (b"first", b"second", b""):
            await peers.send(peers.write("a", data))
            assert peers.received() == {"a": data}
        assert peers.partials() == []


async def test_our_own_edit_is_kept_beside_the_new_version(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("a.txt", b"first"))
        (peers.folder / "a.txt").write_bytes(b"our edit")
        await peers.send(peers.write("a.txt", b"second"))
        received = peers.received()
        assert received.pop("a.txt") == b"our edit"
        [(name, data)] = received.items()
        assert name.startswith("a.conflict-alice-")
        assert name.endswith(".txt")
        assert data == b"second"
        assert peers.arrived[-1].path == name


async def test_version_of_another_sender_is_not_replaced(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("a", b"first"))
        peers.journal[FOLDER, "a"] = replace(peers.journal[FOLDER, "a"], peer=MALLORY.bare)
        await peers.send(peers.write("a", b"second"))
        assert peers.received()["a"] == b"first"
        assert sorted(peers.received().values()) == [b"first", b"second"]


async def test_content_that_lies_there_already_is_not_doubled(tmp_path: Path) -> None:
    """Both ends had the file before they met."""
    async with open_peers(tmp_path) as peers:
        (peers.folder / "a").write_bytes(b"content")
        inode = (peers.folder / "a").stat().st_ino
        assert (await peers.send(peers.write("a", b"content"))).confirmed
        assert peers.received() == {"a": b"content"}
        assert (peers.folder / "a").stat().st_ino == inode
        assert peers.partials() == []
        assert peers.arrived[-1].known.identity.inode == inode
        # And the next version may replace it.
        await peers.send(peers.write("a", b"next"))
        assert peers.received() == {"a": b"next"}


async def test_file_that_appears_in_the_last_instant_is_kept(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:

        async def be_faster(arriving: Arriving) -> None:
            await trio.lowlevel.checkpoint()
            if arriving.path == "a":
                (peers.folder / "a").write_bytes(b"ours")

        peers.on_arriving = be_faster
        assert (await peers.send(peers.write("a", b"theirs"))).confirmed
        received = peers.received()
        assert received.pop("a") == b"ours"
        assert list(received.values()) == [b"theirs"]
        assert [arriving.path for arriving in peers.arrived] == ["a", *received]


async def test_program_that_is_always_faster_is_not_waited_for(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:

        async def be_faster(arriving: Arriving) -> None:
            await trio.lowlevel.checkpoint()
            (peers.folder / arriving.path).write_bytes(b"ours")

        peers.on_arriving = be_faster
        source = peers.write("a", b"theirs")
        with pytest.raises(TransferError, match="all the time") as caught:
            await peers.send(source)
        assert caught.value.type == ErrorType.WAIT
        assert set(peers.received().values()) == {b"ours"}
        assert len(peers.arrived) == receiver.MAX_RACES
        assert len(peers.partials()) == 1


async def test_files_for_one_place_are_placed_one_after_the_other(tmp_path: Path) -> None:
    """Two resources of one account send two versions of one inbox name at once."""
    async with open_peers(tmp_path) as peers:
        placing: list[str] = []

        async def place(_: Arriving) -> None:
            placing.append("begin")
            await trio.testing.wait_all_tasks_blocked(0.01)
            placing.append("end")

        peers.on_arriving = place
        async with trio.open_nursery() as nursery:
            for data in (b"first", b"second"):
                nursery.start_soon(plain_send, peers, "a", data)
        await peers.settled()
        assert placing == ["begin", "end"] * 2
        assert sorted(peers.received().values()) == [b"first", b"second"]


# Full disks


async def test_full_disk_is_told_and_waited_for(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        with small_disk(peers.folder):
            source = peers.write("a", content(2 * MIB))
            with pytest.raises(TransferError, match=r"\[resource-constraint\]") as caught:
                await peers.send(source)
            assert caught.value.type == ErrorType.WAIT
            assert s5b.TAG not in peers.server.tags()
            assert (peers.received(), peers.partials()) == ({}, [])
            await peers.send(peers.write("small", b"x"))
            make_room(peers.folder)
            assert (await peers.send(source)).confirmed
            assert peers.received() == {"a": content(2 * MIB), "small": b"x"}


class NoReservation:
    """A C library on a file system that cannot reserve blocks; the rest is the real one."""

    def __init__(self, real: object) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Callable[..., int]:
        function: Callable[..., int] = getattr(self._real, name)
        return function

    def fallocate(self, *_: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1


async def test_disk_that_fills_up_while_bytes_arrive_keeps_what_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system neither reserves anything nor tells how much room it has."""
    monkeypatch.setattr(beneath, "_libc", NoReservation(beneath._libc))
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((4096, 4096, *[0] * 8)))
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        with small_disk(peers.folder):
            source = peers.write("a", data)
            with pytest.raises(TransferError) as caught:
                await peers.send(source)
            assert caught.value.type == ErrorType.WAIT
            await peers.settled()
            assert peers.received() == {}
            [partial] = peers.partials()
            kept = partial.stat().st_size
            assert 0 < kept <= MIB
            make_room(peers.folder)
            assert await peers.send(source) == Sent(True, digest(data))
            assert offsets(peers) == [0, kept]
            assert peers.received() == {"a": data}
