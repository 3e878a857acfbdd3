from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import blake3
import pytest
import trio

from syncd.bytestreams import ibb, inband, outgoing, s5b
from syncd.bytestreams.inband import Inband
from syncd.bytestreams.proxies import Probed, Proxies
from syncd.demo.faults import Faults
from syncd.demo.proxy65 import Proxy65
from syncd.errors import (
    BytestreamError,
    ChangedError,
    DeclinedError,
    ErrorType,
    IntegrityError,
    OfflineError,
    RemoteProtocolError,
    StanzaError,
    SyncdError,
    TransferError,
)
from syncd.transfer import pump, receiver, sender, si, taking
from syncd.transfer.sender import Sender, Sent, Target
from syncd.xmpp.jid import JID
from tests.support.peers import ALICE, BOB, Fault, Peers, Relay, open_files, open_peers
from tests.support.steps import cancelled_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from xml.etree.ElementTree import Element

    from syncd.transfer.incoming import Arriving
    from syncd.transfer.sender import Source
    from syncd.xmpp.stanza import Iq, IqType

PROXY = JID.parse("proxy.example.org")

TO_BOB = Target(jid=BOB, is_syncd=True)

MIB = 1 << 20  # bytes
# More than the kernel keeps between two ends, so that a sender can be caught in the middle.
LARGE = 16 * MIB


def content(size: int) -> bytes:
    """Bytes that are the same nowhere else in the file."""
    return blake3.blake3(b"%d" % size).digest(length=size)


def digest(data: bytes) -> bytes:
    return blake3.blake3(data).digest()


def only_direct(peers: Peers) -> Sender:
    """Alice, who sends nothing through the server."""
    return peers.make_sender(peers.listener, inband=False)


def offered(peers: Peers, number: int = 0) -> si.Offer:
    offers = [each for each in peers.server.exchanges if each.tag == si.SI]
    return si.read_offer(offers[number].payload)


# Whole transfers


@pytest.mark.parametrize("size", [0, 1, 5 * MIB])
async def test_file_arrives_whole_with_its_time_and_is_confirmed(
    tmp_path: Path, size: int
) -> None:
    data = content(size)
    async with open_peers(tmp_path) as peers:
        source = peers.write("2031/a.raw", data)
        assert await peers.send(source) == Sent(True, digest(data))
        assert peers.received() == {"2031/a.raw": data}
        arrived = (peers.folder / "2031/a.raw").stat()
        assert arrived.st_mtime_ns == source.version.mtime_ns
        assert peers.partials() == []
        [arriving] = peers.arrived
        assert (arriving.path, arriving.known.digest) == ("2031/a.raw", digest(data))
        assert arriving.known.identity.inode == arrived.st_ino


async def test_nothing_left_to_send_needs_no_bytestream_between_syncds(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("empty", b""))
        assert peers.server.tags() == [si.SI, si.FINISH]
        await peers.send(peers.write("full", b"x"))
        assert peers.server.tags()[2:] == [si.SI, s5b.TAG, si.FINISH]


async def test_watcher_sees_how_far_it_is(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("a", content(MIB)))
        assert [progress.offset for progress in peers.sending] == [MIB]
        assert [incoming.progress.offset for incoming in peers.incoming] == [MIB]


async def test_many_files_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    files = {f"d/{number}": content(number * 10_000) for number in range(20)}
    async with open_peers(tmp_path) as peers:
        async with trio.open_nursery() as nursery:
            for path, data in files.items():
                nursery.start_soon(peers.send, peers.write(path, data))
        assert peers.received() == files


async def test_plain_client_gets_a_plain_offer_and_cannot_confirm(tmp_path: Path) -> None:
    data = content(MIB)
    async with open_peers(tmp_path) as peers:
        sent = await peers.send(peers.write("2031/a.raw", data), is_syncd=False)
        await peers.settled()
        assert sent == Sent(False, digest(data))
        offer = offered(peers)
        assert (offer.name, offer.size, offer.ranged, offer.sync) == (
            "a.raw",
            MIB,
            True,
            None,
        )
        assert peers.server.tags() == [si.SI, s5b.TAG]
        assert peers.received() == {"a.raw": data}


async def test_plain_client_gets_an_empty_file_through_the_server(tmp_path: Path) -> None:
    """Over SOCKS5 most of them wait for a byte for ever."""
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write("empty", b""), is_syncd=False)
        await peers.settled()
        assert peers.server.tags() == [si.SI, ibb.OPEN, ibb.CLOSE]
        assert peers.received() == {"empty": b""}


async def test_every_transfer_has_an_id_that_nobody_guesses(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        for number in range(3):
            await peers.send(peers.write(str(number), b"x"))
        sids = {offered(peers, number).sid for number in range(3)}
        assert [len(sid) for sid in sids] == [32, 32, 32]


# Names


async def test_path_is_sent_as_it_is_and_a_plain_client_gets_the_usual_form(
    tmp_path: Path,
) -> None:
    path = unicodedata.normalize("NFD", "Ångström/é")
    async with open_peers(tmp_path) as peers:
        await peers.send(peers.write(path, b"x"))
        assert peers.received() == {path: b"x"}
        await peers.send(peers.found(path), is_syncd=False)
        await peers.settled()
        assert peers.received() == {path: b"x", "é": b"x"}


@pytest.mark.parametrize("path", ["bad\udcff", "a\\..\\b", "tab\there", ".syncd/x.part"])
async def test_names_that_nobody_takes_are_not_even_offered(tmp_path: Path, path: str) -> None:
    async with open_peers(tmp_path) as peers:
        with pytest.raises(DeclinedError) as caught:
            await peers.send(peers.write(path, b"x"))
        assert str(caught.value).isprintable()
        assert peers.server.tags() == []


# Files that do not stand still


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


def replaced(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(content(LARGE))
    status = path.stat()
    os.utime(new, ns=(status.st_mtime_ns, status.st_mtime_ns))
    new.rename(path)


def truncated(path: Path) -> None:
    os.truncate(path, MIB)


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def moved(path: Path) -> None:
    path.rename(path.with_name("moved"))


CHANGES = [appended, overwritten, replaced, truncated, touched, moved, Path.unlink]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_file_that_changes_before_it_is_sent_is_not_offered(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", content(LARGE))
        change(peers.source / "a")
        with pytest.raises(ChangedError):
            await peers.send(source)
        assert peers.server.tags() == []


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_file_that_changes_while_it_is_sent_is_never_delivered(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """And its next version is, though the receiver still waits for the end of the first."""
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", content(LARGE))
        peers.relay.hold_at(MIB)

        async def interfere() -> None:
            await peers.relay.reached.wait()
            change(peers.source / "a")
            peers.relay.resume.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(interfere)
            with pytest.raises(ChangedError) as caught:
                await peers.send(source)
        assert caught.value.type == ErrorType.WAIT
        assert peers.received() == {}
        assert si.FINISH not in peers.server.tags()
        peers.relay.hold_at(None)
        if (peers.source / "a").exists():
            await peers.send(peers.found("a"))
            assert peers.received() == {"a": (peers.source / "a").read_bytes()}


async def test_file_whose_change_hides_behind_its_old_time_is_never_delivered_torn(
    tmp_path: Path,
) -> None:
    """A program writes into it while it is sent, and puts the mtime back (``touch -r``)."""
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", content(LARGE))
        peers.relay.hold_at(5 * MIB)

        async def interfere() -> None:
            await peers.relay.reached.wait()
            with (peers.source / "a").open("r+b") as file:
                for place in (100, 12 * MIB):  # sent already, and not yet
                    file.seek(place)
                    file.write(b"NEW")
            os.utime(peers.source / "a", ns=(source.version.mtime_ns,) * 2)
            peers.relay.resume.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(interfere)
            with pytest.raises(ChangedError):
                await peers.send(source)
        assert (peers.received(), peers.found("a")) == ({}, source)
        peers.relay.hold_at(None)
        # What is over there now is of neither version, and goes on as neither.
        with pytest.raises(TransferError, match="not what was sent; it is sent anew"):
            await peers.send(source)
        assert (await peers.send(source)).confirmed
        assert peers.received() == {"a": (peers.source / "a").read_bytes()}


async def test_file_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", b"ours")
        secret = tmp_path / "secret"
        (peers.source / "a").rename(secret)
        (peers.source / "a").symlink_to(secret)
        with pytest.raises(ChangedError):
            await peers.send(source)
        assert peers.server.tags() == []


# Receipts


@pytest.mark.parametrize(
    ("faults", "asked"),
    [
        ([Fault.LOSE_REQUEST], 1),
        ([Fault.LOSE_ANSWER], 2),
        ([Fault.BREAK_MEANWHILE], 1),
        ([Fault.TWICE], 2),
        ([Fault.LOSE_ANSWER, Fault.LOSE_REQUEST], 2),
        ([Fault.LOSE_REQUEST, Fault.LOSE_ANSWER], 2),
    ],
    ids=str,
)
async def test_receipt_that_is_lost_is_asked_for_again(
    tmp_path: Path, faults: list[Fault], asked: int
) -> None:
    async with open_peers(tmp_path) as peers:
        peers.server.inject(si.FINISH, *faults)
        source = peers.write("a", b"content")
        assert await peers.send(source) == Sent(True, digest(b"content"))
        assert peers.server.tags()[:3] == [si.SI, s5b.TAG, si.FINISH]
        assert peers.server.tags().count(si.FINISH) >= asked
        assert peers.server.tags().count(si.SI) == 1
        assert peers.received() == {"a": b"content"}
        assert len(peers.arrived) == 1


async def test_receipt_is_waited_for_until_the_stream_is_back(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        held = trio.Event()
        peers.server.inject(si.FINISH, held)
        source = peers.write("a", b"content")

        async def outage() -> None:
            await peers.server.asked(si.FINISH)
            peers.server.break_stream(come_back=False)
            held.set()
            await trio.testing.wait_all_tasks_blocked(0.02)
            peers.server.come_back()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outage)
            assert (await peers.send(source)).confirmed


async def test_outage_that_lasts_ends_the_delivery_and_the_next_one_finds_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RECONNECT_TIMEOUT", 0.01)
    async with open_peers(tmp_path) as peers:
        held = trio.Event()
        peers.server.inject(si.FINISH, held)
        source = peers.write("a", b"content")

        async def outage() -> None:
            await peers.server.asked(si.FINISH)
            peers.server.break_stream(come_back=False)
            held.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outage)
            with pytest.raises(OfflineError):
                await peers.send(source)
        peers.server.come_back()
        assert (await peers.send(source)).confirmed
        assert peers.received() == {"a": b"content"}
        assert peers.server.tags().count(s5b.TAG) == 1


async def test_receipt_that_never_comes_is_not_asked_for_for_ever(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.server.inject(si.FINISH, *[Fault.LOSE_ANSWER] * sender.RECEIPT_TRIES)
        source = peers.write("a", b"content")
        with pytest.raises(OfflineError):
            await peers.send(source)
        assert peers.server.tags().count(si.FINISH) == sender.RECEIPT_TRIES
        assert (await peers.send(source)).confirmed
        assert peers.relay.passed == len(b"content")


def storing(
    receipt: Callable[[si.Finish], Element | None],
) -> dict[str, Callable[[Iq], object]]:
    """A receiver that has every file already, and its own idea of receipts."""

    async def on_offer(iq: Iq) -> Element:
        assert iq.payload is not None
        offer = si.read_offer(iq.payload)
        answer = si.Answer(method=si.BYTESTREAMS, offset=offer.size or 0)
        return si.make_answer(answer, offer)

    async def on_finish(iq: Iq) -> Element | None:
        assert iq.payload is not None
        return receipt(si.read_finish(iq.payload))

    return {si.SI: on_offer, si.FINISH: on_finish}


@pytest.mark.parametrize(
    ("receipt", "error"),
    [
        pytest.param(
            lambda finish: si.make_receipt(
                si.Finish(sid=finish.sid, size=finish.size, digest=bytes(32))
            ),
            IntegrityError,
            id="other content",
        ),
        pytest.param(
            lambda finish: si.make_receipt(
                si.Finish(sid=finish.sid, size=0, digest=finish.digest)
            ),
            IntegrityError,
            id="other size",
        ),
        pytest.param(
            lambda finish: si.make_receipt(
                si.Finish(sid="other", size=finish.size, digest=finish.digest)
            ),
            IntegrityError,
            id="other transfer",
        ),
        pytest.param(
            lambda finish: si.make_receipt(
                si.Finish(sid=finish.sid, size=finish.size, seal={"signature": "A" * 88})
            ),
            IntegrityError,
            id="a signature instead",
        ),
        pytest.param(si.make_finish, RemoteProtocolError, id="no receipt"),
        pytest.param(lambda _: None, RemoteProtocolError, id="nothing"),
    ],
)
async def test_receipt_for_something_else_confirms_nothing(
    tmp_path: Path, receipt: Callable[[si.Finish], Element | None], error: type[SyncdError]
) -> None:
    async with open_peers(tmp_path) as peers:
        peers.server.attach(BOB, storing(receipt))  # type: ignore[arg-type] # object: any awaitable
        with pytest.raises(error):
            await peers.send(peers.write("a", b"content"))


async def test_transfer_that_the_receiver_has_given_up_is_offered_again_later(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path) as peers:
        peers.server.inject(si.FINISH, StanzaError(ErrorType.CANCEL, "item-not-found"))
        source = peers.write("a", b"content")
        with pytest.raises(TransferError, match="given this transfer up") as caught:
            await peers.send(source)
        assert caught.value.type == ErrorType.WAIT
        assert (caught.value.began, caught.value.moved) == (0, len(b"content"))
        # What is out may still be on its way; the next offer would cut it off there.
        with trio.fail_after(10):
            while [part.stat().st_size for part in peers.partials()] != [7]:  # noqa: ASYNC110 - the disk tells nobody
                await trio.sleep(0.01)
        assert (await peers.send(source)).confirmed
        assert peers.relay.passed == len(b"content")


async def test_refusal_to_store_is_explained(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.server.inject(
            si.FINISH, StanzaError(ErrorType.WAIT, "resource-constraint", "no room")
        )
        with pytest.raises(TransferError, match="no room") as caught:
            await peers.send(peers.write("a", b"content"))
        assert caught.value.type == ErrorType.WAIT


# Offers


@pytest.mark.parametrize(
    ("refusal", "error", "kind"),
    [
        (StanzaError(ErrorType.CANCEL, "forbidden"), DeclinedError, ErrorType.CANCEL),
        (StanzaError(ErrorType.AUTH, "forbidden"), DeclinedError, ErrorType.CANCEL),
        (StanzaError(ErrorType.MODIFY, "not-acceptable"), DeclinedError, ErrorType.CANCEL),
        (StanzaError(ErrorType.AUTH, "not-authorized"), DeclinedError, ErrorType.CANCEL),
        (
            StanzaError(ErrorType.CANCEL, "bad-request", app=f"{{{si.NS_SI}}}no-valid-streams"),
            DeclinedError,
            ErrorType.CANCEL,
        ),
        (
            StanzaError(ErrorType.MODIFY, "bad-request", app=f"{{{si.NS_SI}}}bad-profile"),
            DeclinedError,
            ErrorType.CANCEL,
        ),
        (StanzaError(ErrorType.WAIT, "policy-violation"), TransferError, ErrorType.WAIT),
        (StanzaError(ErrorType.WAIT, "not-acceptable"), TransferError, ErrorType.WAIT),
        (StanzaError(ErrorType.MODIFY, "bad-request"), TransferError, ErrorType.CANCEL),
        (StanzaError(ErrorType.CANCEL, "not-allowed"), TransferError, ErrorType.CANCEL),
        (StanzaError(ErrorType.CANCEL, "undefined-condition"), TransferError, ErrorType.CANCEL),
        (StanzaError(ErrorType.WAIT, "resource-constraint"), TransferError, ErrorType.WAIT),
        (StanzaError(ErrorType.MODIFY, "resource-constraint"), TransferError, ErrorType.WAIT),
        (StanzaError(ErrorType.CANCEL, "resource-constraint"), TransferError, ErrorType.WAIT),
        (StanzaError(ErrorType.WAIT, "internal-server-error"), TransferError, ErrorType.WAIT),
        (StanzaError(ErrorType.CANCEL, "service-unavailable"), OfflineError, ErrorType.WAIT),
        (StanzaError(ErrorType.WAIT, "recipient-unavailable"), OfflineError, ErrorType.WAIT),
        (StanzaError(ErrorType.CANCEL, "gone"), OfflineError, ErrorType.WAIT),
    ],
    ids=lambda value: value.condition if isinstance(value, StanzaError) else None,
)
async def test_refused_offer_says_who_why_and_whether_to_try_again(
    tmp_path: Path, refusal: StanzaError, error: type[SyncdError], kind: ErrorType
) -> None:
    refusal.text = "their words"
    async with open_peers(tmp_path) as peers:
        peers.server.inject(si.SI, refusal)
        with pytest.raises(SyncdError) as caught:
            await peers.send(peers.write("a", b"x"))
        assert (type(caught.value), caught.value.type) == (error, kind)
        message = str(caught.value)
        assert message.startswith("bob@example.org")
        assert "their words" in message
        assert message.endswith(f"[{refusal.condition}]")


NO_VALID_STREAMS = f"{{{si.NS_SI}}}no-valid-streams"


async def test_way_that_fails_for_once_is_not_the_end_if_there_is_no_other(
    tmp_path: Path,
) -> None:
    """The peer takes nothing through the server, which is no reason to never try again."""
    async with open_peers(tmp_path) as peers:
        unreachable = StanzaError(ErrorType.CANCEL, "item-not-found")
        peers.server.inject(s5b.TAG, unreachable)
        peers.server.inject(ibb.OPEN, StanzaError(ErrorType.CANCEL, "not-acceptable"))
        accepted = trio.Event()
        accepted.set()
        no_valid_streams = StanzaError(ErrorType.CANCEL, "bad-request", app=NO_VALID_STREAMS)
        peers.server.inject(si.SI, accepted, no_valid_streams)
        with pytest.raises(BytestreamError, match="in-band") as caught:
            await peers.send(peers.write("a", b"content"))
        assert caught.value.type == ErrorType.WAIT
        assert len(peers.server.exchanges) < 4


async def test_peer_that_takes_only_what_we_cannot_offer_now_is_asked_again(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path) as peers:
        offline = peers.make_sender(None)
        no_valid_streams = StanzaError(ErrorType.CANCEL, "bad-request", app=NO_VALID_STREAMS)
        peers.server.inject(si.SI, no_valid_streams)
        with pytest.raises(BytestreamError) as caught:
            await offline.send(peers.write("a", b"content"), Target(jid=BOB, is_syncd=True))
        assert caught.value.type == ErrorType.WAIT


async def test_peer_that_went_offline_is_waited_for(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.server.detach(BOB)
        with pytest.raises(OfflineError, match="offline"):
            await peers.send(peers.write("a", b"x"))


async def test_silence_after_an_offer_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "SYNCD_ANSWER_TIMEOUT", 0.01)
    async with open_peers(tmp_path) as peers:
        held = trio.Event()
        peers.server.inject(si.SI, held)
        with pytest.raises(OfflineError):
            await peers.send(peers.write("a", b"x"))
        held.set()


@pytest.mark.parametrize("is_syncd", [True, False])
async def test_a_person_is_waited_for_as_long_as_is_configured(
    tmp_path: Path, is_syncd: bool
) -> None:
    """A syncd asks nobody, and has its own deadline."""
    async with open_peers(tmp_path) as peers:
        patience: list[float] = []

        async def request(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
            patience.append(timeout)
            raise OfflineError("nobody is asked here")

        asking = Sender(
            request=request,
            wait_online=peers.server.wait_online,
            requester=None,
            inband=Inband(request, max_block=lambda: ibb.MAX_BLOCK),
            watch=lambda *_: contextlib.nullcontext(),
            own_jid=lambda: ALICE,
            answer_timeout=600.0,
        )
        with pytest.raises(OfflineError, match="nobody"):
            await asking.send(peers.write("a", b"x"), Target(jid=BOB, is_syncd=is_syncd))
        assert patience == [sender.SYNCD_ANSWER_TIMEOUT if is_syncd else 600.0]


@pytest.mark.parametrize("offset", [b"-1", b"2", b"x"])
async def test_impossible_offset_is_the_peers_fault(tmp_path: Path, offset: bytes) -> None:
    async with open_peers(tmp_path) as peers:

        async def on_offer(iq: Iq) -> Element:
            assert iq.payload is not None
            offer = si.read_offer(iq.payload)
            answer = si.make_answer(si.Answer(method=si.BYTESTREAMS, offset=1), offer)
            answer[1][0].set("offset", offset.decode())
            await trio.lowlevel.checkpoint()
            return answer

        peers.server.attach(BOB, {si.SI: on_offer})
        with pytest.raises(RemoteProtocolError):
            await peers.send(peers.write("a", b"x"))


# Bytestreams


async def test_target_that_cannot_connect_says_where_it_tried(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.server.inject(s5b.TAG, StanzaError(ErrorType.CANCEL, "item-not-found"))
        with pytest.raises(BytestreamError) as caught:
            await only_direct(peers).send(peers.write("a", b"x"), TO_BOB)
        assert f"127.0.0.1:{peers.relay.port}" in str(caught.value)
        assert "bytestreams.advertise" in caught.value.hint
        assert peers.listener._expected == {}


async def test_target_that_uses_what_was_not_offered_is_at_fault(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:

        async def on_offer(iq: Iq) -> Element:
            assert iq.payload is not None
            await trio.lowlevel.checkpoint()
            answer = si.Answer(method=si.BYTESTREAMS)
            return si.make_answer(answer, si.read_offer(iq.payload))

        async def on_query(_: Iq) -> Element:
            await trio.lowlevel.checkpoint()
            return s5b.make_used("a0", BOB)

        peers.server.attach(BOB, {si.SI: on_offer, s5b.TAG: on_query})
        with pytest.raises(RemoteProtocolError):
            await peers.send(peers.write("a", b"x"))


async def test_without_any_way_nothing_is_offered(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        without = peers.make_sender(None, inband=False)
        with pytest.raises(BytestreamError) as caught:
            await without.send(peers.write("a", b"x"), TO_BOB)
        assert "bytestreams.direct" in caught.value.hint
        assert peers.server.tags() == []


async def test_our_own_outage_is_no_fault_of_the_way(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        held = trio.Event()
        peers.server.inject(si.SI, held)

        async def outage() -> None:
            await peers.server.asked(si.SI)
            peers.online = False
            held.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outage)
            with pytest.raises(OfflineError):
                await peers.send(peers.write("a", b"x"))


async def test_bytes_flow_on_while_the_stream_is_gone(tmp_path: Path) -> None:
    """A transfer is no child of the stream: nothing is sent twice."""
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        peers.relay.hold_at(MIB)

        async def outage() -> None:
            await peers.relay.reached.wait()
            peers.server.break_stream(come_back=False)
            peers.relay.resume.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
            peers.server.come_back()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(outage)
            assert await peers.send(source) == Sent(True, digest(data))
        assert peers.relay.passed == LARGE
        assert peers.received() == {"a": data}


async def test_cancelled_sender_leaves_nothing_open(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", content(LARGE))
        peers.relay.hold_at(MIB)
        before = open_files()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def interrupt() -> None:
                    await peers.relay.reached.wait()
                    scope.cancel()

                nursery.start_soon(interrupt)
                await peers.send(source)
        peers.relay.resume.set()
        await peers.settled()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert open_files() == before
        assert peers.listener._expected == {}
        assert peers.received() == {}


@pytest.mark.parametrize("way", ["direct", "through the server", "one after the other"])
async def test_transfer_that_is_cancelled_at_any_step_leaves_nothing_open(
    tmp_path: Path, way: str
) -> None:
    """And whatever it leaves on the other disk, the next one makes the file whole."""
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", b"content")
        before = open_files()
        cancelled, step = True, 0
        through_server = peers.make_sender(None)

        async def send() -> None:
            if way == "through the server":
                await through_server.send(source, Target(jid=BOB, is_syncd=True))
                return
            if way == "one after the other":
                refusal = StanzaError(ErrorType.CANCEL, "item-not-found")
                peers.server.inject(s5b.TAG, refusal)
            await peers.send(source)

        while cancelled:
            step += 1
            cancelled = await cancelled_at(step, send)
            peers.server.break_stream()
            await peers.server.idle()
            await peers.restart_receiver()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert open_files() == before
            assert peers.listener._expected == {}
            for end in (peers.sender, through_server):
                assert repr(end._inband) == "<Inband slots=0 sendings=0>"
            assert list(peers.received().values()) in ([], [b"content"])
        assert step > 20
        assert peers.received() == {"a": b"content"}
        assert peers.partials() == []


async def test_failed_sends_leave_no_descriptor_open(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", b"x")
        before = open_files()
        for tags in ((si.SI,), (s5b.TAG, ibb.OPEN, ibb.OPEN), (s5b.TAG, ibb.DATA)):
            for tag in tags:
                peers.server.inject(tag, StanzaError(ErrorType.CANCEL, "not-allowed"))
            with pytest.raises(TransferError):
                await peers.send(source)
        await peers.stop_receiver()
        assert open_files() == before


def test_the_sentence_names_the_resource_only_when_it_matters() -> None:
    gone = sender.explain(StanzaError(ErrorType.CANCEL, "gone"), BOB)
    declined = sender.explain(StanzaError(ErrorType.CANCEL, "forbidden"), BOB)
    assert str(gone) == "bob@example.org/desk is offline, or this resource is [gone]"
    assert str(declined) == "bob@example.org does not accept the file [forbidden]"
    assert "accept_from" in declined.hint


async def test_source_is_not_opened_twice_by_two_targets(tmp_path: Path) -> None:
    """One file may go to several peers at once; each reads with a descriptor of its own."""
    data = content(5 * MIB)
    async with open_peers(tmp_path) as peers:
        source: Source = peers.write("a", data)
        results: list[Sent] = []

        async def send(*, is_syncd: bool) -> None:
            results.append(await peers.send(source, is_syncd=is_syncd))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: send(is_syncd=True))
            nursery.start_soon(lambda: send(is_syncd=False))
        await peers.settled()
        assert {result.digest for result in results} == {digest(data)}
        assert peers.received() == {"a": data}
        assert (peers.inbox / "a").read_bytes() == data
        assert ALICE.bare in {arriving.known.peer for arriving in peers.arrived}


# Ways that carry nothing


@contextlib.asynccontextmanager
async def impatience(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Let no end wait long for bytes that do not come; they do not, and it is over."""
    with monkeypatch.context() as patch:
        for moving in (pump.send, pump.receive):
            assert moving.__kwdefaults__ is not None
            patch.setitem(moving.__kwdefaults__, "idle_timeout", 0.3)
        patch.setattr(sender, "SWALLOWED_AFTER", 0.2)
        with pytest.raises(TransferError):
            yield
        await peers.settled()


async def open_proxy(peers: Peers, nursery: trio.Nursery) -> Relay:
    """Let Alice know a proxy; returns what stands before it."""
    proxy = Proxy65(PROXY, "127.0.0.1", Faults())
    [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy.port = listening.socket.getsockname()[1]
    relay = Relay(proxy)  # type: ignore[arg-type]  # only its port is asked for
    await nursery.start(relay.serve)
    nursery.start_soon(trio.serve_listeners, proxy.serve, [listening])

    async def activate(iq: Iq) -> Element | None:
        await trio.lowlevel.checkpoint()
        return proxy.answer(iq, ALICE)

    peers.server.attach(PROXY, {s5b.TAG: activate})
    assert peers.sender._requester is not None
    known = peers.sender._requester._proxies = Proxies((PROXY,), ALICE.domain)
    found = s5b.Streamhost(PROXY, "127.0.0.1", relay.port)
    known.tested(PROXY, [Probed(found, 0.1)], time.time())
    return relay


async def test_way_that_swallows_all_bytes_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections come about, the kernel takes some bytes, and nothing arrives."""
    data = content(LARGE)
    async with open_peers(tmp_path) as peers, trio.open_nursery() as nursery:
        relay = await open_proxy(peers, nursery)
        peers.relay.hold_at(0)
        source = peers.write("a", data)
        async with impatience(peers, monkeypatch):
            await peers.send(source)
        assert await peers.send(source) == Sent(True, digest(data))
        relay.hold_at(0)
        source = peers.write("b", data)
        async with impatience(peers, monkeypatch):
            await peers.send(source)
        assert await peers.send(source) == Sent(True, digest(data))
        # By now it is known before anything is offered.
        assert await peers.send(peers.write("c", data)) == Sent(True, digest(data))
        ways = [progress.method for progress in peers.sending]
        assert ways == ["direct", "proxy", "proxy", "ibb", "ibb"]
        assert peers.received() == dict.fromkeys("abc", data)
        nursery.cancel_scope.cancel()


async def test_small_file_that_only_the_kernel_has_taken_is_sent_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sender was through at once, and its receiver has not seen a byte."""
    async with open_peers(tmp_path) as peers:
        peers.relay.hold_at(0)
        source = peers.write("a", b"content")
        async with impatience(peers, monkeypatch):
            await peers.send(source)
        assert await peers.send(source) == Sent(True, digest(b"content"))
        assert [progress.method for progress in peers.sending] == ["direct", "ibb"]


async def test_way_on_which_something_arrived_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        peers.relay.hold_at(100_000)
        source = peers.write("a", data)
        async with impatience(peers, monkeypatch):
            await peers.send(source)
        peers.relay.hold_at(None)
        assert await peers.send(source) == Sent(True, digest(data))
        assert [progress.method for progress in peers.sending] == ["direct", "direct"]


def lose_all(peers: Peers) -> None:
    """Leave Bob what a kill leaves of less than a block: nothing."""
    for path in (peers.folder / ".syncd").iterdir():
        path.unlink()


async def test_way_that_broke_off_at_once_is_blamed_only_the_second_time(
    tmp_path: Path,
) -> None:
    """Once it is a peer that was killed; ever again, something in between that hangs up."""
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        for _ in range(2):
            await peers.send_until_cut(source, 1_000)
            lose_all(peers)
        peers.relay.cut_at(None)
        assert await peers.send(source) == Sent(True, digest(data))
        assert [progress.method for progress in peers.sending] == ["direct", "direct", "ibb"]


async def test_peer_that_was_killed_before_it_had_a_block_is_reached_the_same_way_again(
    tmp_path: Path,
) -> None:
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        await peers.send_until_cut(source, 1_000)
        lose_all(peers)
        peers.relay.cut_at(None)
        for each in (source, peers.write("b", data)):
            assert await peers.send(each) == Sent(True, digest(data))
        assert [progress.method for progress in peers.sending] == ["direct"] * 3


def is_avoided(peers: Peers) -> bool:
    """Whether Alice takes direct connections to Bob for dead."""
    assert peers.sender._requester is not None
    return peers.sender._requester._proxies.swallows_direct(BOB, time.time())


async def test_way_that_had_carried_much_is_not_blamed_for_what_the_peer_lost(
    tmp_path: Path,
) -> None:
    data = content(3 * LARGE)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        for _ in range(3):
            await peers.send_until_cut(source, 2 * LARGE)
            lose_all(peers)
        peers.relay.cut_at(None)
        assert await peers.send(source) == Sent(True, digest(data))
        assert [progress.method for progress in peers.sending] == ["direct"] * 4


async def test_our_own_disk_that_fails_is_no_fault_of_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = os.preadv

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    async with open_peers(tmp_path) as peers:
        source = peers.write("a", content(LARGE))
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", fail)
                with pytest.raises(TransferError, match="Input/output error"):
                    await peers.send(source)
            await peers.settled()
        assert os.preadv is reading
        assert (await peers.send(source)).confirmed
        assert [progress.method for progress in peers.sending] == ["direct"] * 4


async def test_file_that_is_refused_in_the_end_is_no_fault_of_the_way(tmp_path: Path) -> None:
    """All of it went over, and was not what it should be, or had no room."""
    async with open_peers(tmp_path) as peers:

        async def full(_: Arriving) -> None:
            await trio.lowlevel.checkpoint()
            raise TransferError("the disk is full")

        peers.on_arriving = full
        source = peers.write("a", content(MIB))
        for _ in range(3):
            with pytest.raises(TransferError, match="full"):
                await peers.send(source)
            await peers.settled()
            lose_all(peers)
        assert not is_avoided(peers)
        assert [progress.method for progress in peers.sending] == ["direct"] * 3


async def test_ordinary_client_that_hangs_up_again_and_again_says_nothing_about_the_way(
    tmp_path: Path,
) -> None:
    """Where it always begins anew, nobody knows what it had."""

    def without_range(element: Element) -> None:
        for parent in list(element.iter()):
            for child in list(parent):
                if child.tag.endswith("}range"):
                    parent.remove(child)

    async with open_peers(tmp_path) as peers:
        peers.server.change(si.SI, without_range)
        source = peers.write("a", content(MIB // 2))
        peers.relay.cut_at(MIB // 4)
        for _ in range(3):
            with pytest.raises(SyncdError):
                await peers.send(source, is_syncd=False)
            await peers.settled()
        assert not is_avoided(peers)
        assert [progress.method for progress in peers.sending] == ["direct"] * 3


async def test_way_that_carries_nothing_is_used_when_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        peers.sender = only_direct(peers)
        peers.relay.hold_at(0)
        source = peers.write("a", data)
        for _ in range(2):
            async with impatience(peers, monkeypatch):
                await peers.send(source)
        peers.relay.hold_at(None)
        assert await peers.send(source) == Sent(True, digest(data))


async def test_refusal_of_a_file_that_has_arrived_is_no_fault_of_the_way(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path) as peers:

        async def full(_: Arriving) -> None:
            await trio.lowlevel.checkpoint()
            raise TransferError("the disk is full")

        accepting, peers.on_arriving = peers.on_arriving, full
        source = peers.write("a", content(MIB))
        with pytest.raises(TransferError, match="full"):
            await peers.send(source)
        await peers.settled()
        peers.on_arriving = accepting
        await peers.send(source)
        await peers.send(peers.write("b", content(MIB)))
        assert offered(peers, 2).methods == (si.BYTESTREAMS, si.IBB)
        assert [progress.method for progress in peers.sending] == ["direct", "", "direct"]


# Places at proxies


async def test_large_files_to_a_stranger_that_only_the_proxy_reaches_wait_for_it(
    tmp_path: Path,
) -> None:
    """They were offered before that was known; none is sent through the server for that."""
    with contextlib.closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))
        nowhere = nobody.getsockname()
        data = content(5 * MIB)
        async with open_peers(tmp_path) as peers, trio.open_nursery() as nursery:
            relay = await open_proxy(peers, nursery)
            relay.hold_at(MIB)
            requester = peers.sender._requester
            assert requester is not None
            requester._advertised = lambda: [nowhere]
            failures: list[TransferError] = []

            async def deliver(name: str) -> None:
                source = peers.write(name, data)
                try:
                    await peers.send(source)
                except TransferError as error:
                    failures.append(error)
                    relay.resume.set()
                    await peers.send(source)

            async with trio.open_nursery() as sending:
                for name in "ab":
                    sending.start_soon(deliver, name)
            assert peers.received() == dict.fromkeys("ab", data)
            assert {progress.method for progress in peers.sending} <= {"", "proxy"}
            [failure] = failures
            assert failure.type is ErrorType.WAIT
            assert str(failure).endswith("; the proxies are in use just now")
            nursery.cancel_scope.cancel()


async def test_transfer_through_the_server_keeps_no_place_at_a_proxy(tmp_path: Path) -> None:
    def only_inband(element: Element) -> None:
        for parent in list(element.iter()):
            for option in parent.findall("{jabber:x:data}option"):
                if option.findtext("{jabber:x:data}value") != ibb.NS:
                    parent.remove(option)

    async with open_peers(tmp_path) as peers, trio.open_nursery() as nursery:
        await open_proxy(peers, nursery)
        requester = peers.sender._requester
        assert requester is not None
        requester._proxies.failed(BOB, [None], time.time())  # so it takes a place
        peers.server.change(si.SI, only_inband)
        held = trio.Event()
        peers.server.inject(ibb.OPEN, held)
        nursery.start_soon(peers.send, peers.write("a", content(MIB)))
        await peers.server.asked(ibb.OPEN)
        assert len(requester._room) == 0
        held.set()
        nursery.cancel_scope.cancel()


async def test_who_waits_for_the_receipt_keeps_no_place_at_a_proxy(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers, trio.open_nursery() as nursery:
        await open_proxy(peers, nursery)
        requester = peers.sender._requester
        assert requester is not None
        requester._listener = None
        held = trio.Event()
        peers.server.inject(si.FINISH, held)
        nursery.start_soon(peers.send, peers.write("a", content(MIB)))
        await peers.server.asked(si.FINISH)
        assert peers.sending[0].method == "proxy"
        assert len(requester._room) == 0
        held.set()
        nursery.cancel_scope.cancel()


# What must be read first


@pytest.mark.parametrize("way", ["direct", "ibb"])
async def test_both_ends_wait_until_the_other_has_read_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Without any patience but the one for that, on a disk that reads 100 kB a second."""
    data = content(LARGE)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        await peers.send_until_cut(source, 5 * MIB)
        peers.relay.cut_at(None)
        if way == "ibb":
            peers.sender = peers.make_sender(None)
        monkeypatch.setattr(pump, "SLOWEST_DISK", 100_000)
        monkeypatch.setattr(outgoing, "USED_TIMEOUT", 0.0)
        monkeypatch.setattr(inband, "ACK_TIMEOUT", 0.0)
        monkeypatch.setattr(taking, "OPEN_TIMEOUT", 0.0)
        assert await peers.send(source) == Sent(True, digest(data))
        assert [progress.method for progress in peers.sending] == ["direct", way]
        assert peers.received() == {"a": data}


async def test_both_ends_wait_as_well_when_nothing_is_left_to_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(5 * MIB)
    async with open_peers(tmp_path) as peers:
        source = peers.write("a", data)
        peers.server.inject(si.FINISH, *[Fault.LOSE_ANSWER] * 3)
        with pytest.raises(OfflineError):
            await peers.send(source)
        await peers.restart_receiver()
        monkeypatch.setattr(pump, "SLOWEST_DISK", 100_000)
        monkeypatch.setattr(receiver, "FINISH_TIMEOUT", 0.0)
        monkeypatch.setattr(sender, "RECEIPT_TIMEOUT", 0.0)
        assert await peers.send(source) == Sent(True, digest(data))


async def test_stream_that_breaks_under_a_transfer_through_the_server_tells_how_far_it_was(
    tmp_path: Path,
) -> None:
    """So that it goes on at once, and its next failure is not one more in a row."""
    data = content(MIB)
    passing = trio.Event()
    passing.set()
    async with open_peers(tmp_path) as peers:
        peers.sender = peers.make_sender(None)
        peers.server.inject(ibb.DATA, *[passing] * 40, Fault.LOSE_REQUEST)
        with pytest.raises(TransferError, match="the stream to the server ended") as caught:
            await peers.send(peers.write("a", data))
        assert caught.value.type is ErrorType.WAIT
        assert (caught.value.began, caught.value.moved) == (0, peers.sending[0].offset)
        assert caught.value.moved > 0
