"""C-04: nobody gets anything but whom the configuration names, and only what it names.

Who comes first, then what: a stranger hears ``forbidden`` whatever he sends, and costs
neither a file nor a task nor a line too many.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import blake3
import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.bytestreams.inband import Inband
from syncd.config import load
from syncd.errors import DeclinedError, ErrorType, StanzaError, TransferError
from syncd.log import BURST, BURST_OF_ALL, INTERVAL_OF_ALL, Limiter
from syncd.transfer import schema, si
from syncd.wiring import links
from syncd.wiring.allowances import ENTRY, OFFER_BURST, Allowances, Terms
from syncd.wiring.status import Transfers
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import Iq, make_iq
from syncd.xmpp.xml import make
from tests.support.peers import (
    ALICE,
    BOB,
    FOLDER,
    LONG_AGO,
    MALLORY,
    Peers,
    open_files,
    open_peers,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.xmpp.stanza import IqType


MIB = 1 << 20  # bytes


def offer(
    *,
    folder: str | None = FOLDER,
    path: str = "a",
    name: str = "a",
    size: int = 1,
    sid: str = "",
) -> si.Offer:
    """An offer of a syncd, or of a plain client if it names no folder."""
    sync = None if folder is None else si.Sync(folder=folder, path=path, mtime_ns=LONG_AGO)
    return si.Offer(
        sid=sid or secrets.token_hex(16),
        name=name,
        size=size,
        methods=(si.BYTESTREAMS, si.IBB),
        ranged=sync is not None,
        sync=sync,
    )


def malformed() -> list[Element]:
    """Offers that nobody could accept, each wrong in another way."""
    wrong = [si.make_offer(offer()) for _ in range(8)]
    wrong[0].set("profile", "urn:x")
    del wrong[1].attrib["id"]
    wrong[2].remove(wrong[2][0])
    wrong[3].remove(wrong[3][1])
    wrong[4][0].set("size", "-1")
    wrong[5][0].set("name", "x" * 5_000)
    wrong[6][-1].set("mtime-ns", "yesterday")
    wrong[7].extend(make("{urn:x}y") for _ in range(600))
    return [*wrong, make(si.SI), make(si.SI, None, make(si.SYNC))]


async def refused(asking: Awaitable[object]) -> StanzaError:
    with pytest.raises(StanzaError) as caught:
        await asking
    return caught.value


@pytest.mark.parametrize("number", range(len(malformed())))
@pytest.mark.parametrize("sender", [MALLORY, JID.parse("alice@evil.org/laptop")])
async def test_c04_a_stranger_is_forbidden_whatever_he_offers(
    tmp_path: Path, sender: JID, number: int
) -> None:
    """Even what is so wrong that a friend would be told."""
    async with open_peers(tmp_path) as peers:
        before, files = snapshot(tmp_path), open_files()
        payload = malformed()[number]
        assert (await refused(peers.ask(payload, sender=sender))).condition == "forbidden"
        # Who may offer hears what is wrong with it.
        told = await refused(peers.ask(payload))
        assert (told.type is ErrorType.WAIT, told.condition) == (False, "bad-request")
        assert (snapshot(tmp_path), open_files(), peers.incoming) == (before, files, [])


@pytest.mark.parametrize("folder", [FOLDER, "another", "", None, "x" * 65, "../photos"])
async def test_c04_a_stranger_learns_not_even_which_folders_there_are(
    tmp_path: Path, folder: str | None
) -> None:
    async with open_peers(tmp_path) as peers:
        payload = si.make_offer(offer(folder=folder))
        error = await refused(peers.ask(payload, sender=MALLORY))
        assert (error.type, error.condition, error.text) == (
            ErrorType.CANCEL,
            "forbidden",
            "not accepted from you here",
        )


CONFIG = """\
[account]
jid = "alice@example.org/laptop"
password_file = "password"
[state]
dir = "state"
[control]
socket = "control.sock"
[[folder]]
id = "photos"
path = "photos"
send_to = ["bob@example.org"]
accept_from = ["carol@example.org"]
[[folder]]
id = "music"
path = "music"
accept_from = ["bob@example.org"]
[inbox]
path = "inbox"
accept_from = ["dave@example.org"]
"""
ACCEPTED = {
    ("carol@example.org", "photos"): "photos",
    ("bob@example.org", "music"): "music",
    ("dave@example.org", ""): "inbox",
}
SENDERS = (
    *("alice@example.org", "bob@example.org", "carol@example.org", "dave@example.org"),
    *("carol@evil.org", "carol@example.org.evil.org", "example.org", "mallory@example.org"),
)


def test_c04_each_gets_into_its_own_folders_and_nowhere_else(tmp_path: Path) -> None:
    """Who is only sent to is not accepted from; neither is our own account."""
    for name in ("photos", "music", "inbox"):
        (tmp_path / name).mkdir()
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "config.toml").write_text(CONFIG)
    config = load(tmp_path / "config.toml", environ={"HOME": str(tmp_path)})
    joined = links.Links(config, "resource", Transfers())
    found = {}
    for sender, folder in product(
        SENDERS, ("photos", "music", "", "Photos", "photos/", "inbox")
    ):
        with suppress(DeclinedError):
            inbox = joined._inbox_for(JID.parse(sender), folder)
            assert inbox.folder == folder
            found[sender, folder] = inbox.root.name
    assert found == ACCEPTED


async def test_c04_the_schema_is_not_asked_about_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the dearest check of all: milliseconds in which nobody else is answered."""
    asked: list[Element] = []
    monkeypatch.setattr(schema, "check", asked.append)
    async with open_peers(tmp_path) as peers:
        for payload in (
            si.make_offer(offer()),
            s5b.make_query("a", [s5b.Streamhost(MALLORY, "192.0.2.1", 1)]),
            si.make_finish(si.Finish(sid="a", size=1, digest=bytes(32))),
            ibb.make_open("a", 4_096),
        ):
            await refused(peers.ask(payload, sender=MALLORY))
    assert asked == []


async def test_c04_neither_where_streams_are_opened_through_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Element] = []
    monkeypatch.setattr(schema, "check", asked.append)

    async def request(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
        await trio.lowlevel.checkpoint()
        return Iq("result", "1", to, None, make_iq("result", "1", to))

    inband = Inband(request, max_block=lambda: ibb.MAX_BLOCK)
    on_open = links._handlers(inband)[ibb.OPEN]
    payload = ibb.make_open("a", 4_096)
    iq = Iq("set", "1", MALLORY, payload, make_iq("set", "1", None, payload))
    with pytest.raises(StanzaError) as caught:
        await on_open(iq)
    assert (caught.value.condition, asked) == ("not-acceptable", [])
    async with inband.expect(MALLORY, "a", 1) as slot:
        await on_open(iq)
        await (await slot.opened(1)).aclose()
    assert asked == [payload]


async def test_c04_out_of_order_nothing_is_begun(tmp_path: Path) -> None:
    """Bytestreams, blocks and receipts for what nobody accepted, from friend and stranger."""
    async with open_peers(tmp_path) as peers:
        accepted = offer()
        await peers.ask(si.make_offer(accepted))
        before, files = snapshot(tmp_path), open_files()
        block = ibb.make_data(ibb.Block(sid=accepted.sid, seq=0, data=b"x"))
        host = s5b.Streamhost(MALLORY, "127.0.0.1", peers.listener.port)
        for sender, sid in ((MALLORY, accepted.sid), (ALICE.with_resource("x"), accepted.sid)):
            for payload in (
                s5b.make_query(sid, [host]),
                ibb.make_open(sid, 4_096),
                block,
                ibb.make_close(sid),
                si.make_finish(si.Finish(sid=sid, size=1, digest=bytes(32))),
            ):
                error = await refused(peers.ask(payload, sender=sender))
                assert error.condition in ("not-acceptable", "item-not-found")
        # From the right peer, but before the stream is open.
        assert (await refused(peers.ask(block))).condition == "item-not-found"
        assert (snapshot(tmp_path), open_files()) == (before, files)
        assert peers.listener._expected == {}


async def test_c04_a_flood_of_offers_costs_no_disk_and_a_bounded_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten thousand strangers, each with an address of his own."""
    count = 10_000
    async with open_peers(tmp_path) as peers:
        before, files = snapshot(tmp_path), open_files()
        payload = si.make_offer(offer())
        with caplog.at_level(logging.DEBUG):
            for number in range(count):
                sender = JID(f"m{number}", "evil.org", "x")
                assert (
                    await refused(peers.ask(payload, sender=sender))
                ).condition == "forbidden"
        assert (snapshot(tmp_path), open_files()) == (before, files)
        # They are not even remembered as strangers.
        assert peers.allowances._known == {}
        assert len(peers.receiver._receipts) == len(peers.receiver._incoming) == 0
        # A friend is served all the same.
        assert (await peers.send(peers.write("a", b"x"))).confirmed
    passed = written(caplog.records)
    assert len([each for each in caplog.records if "declined" in each.msg]) == count
    assert BURST <= len(passed) <= BURST_OF_ALL + count / 1_000 / INTERVAL_OF_ALL + 100


def written(records: list[logging.LogRecord]) -> list[logging.LogRecord]:
    """What the log keeps of that, if all of it came at a thousand lines a second."""
    now = iter(number / 1_000 for number in range(len(records) * 2 + 10))
    limiter = Limiter(lambda: next(now))
    return [record for record in records if limiter.filter(record)]


async def test_c04_a_friend_that_floods_is_to_come_later(tmp_path: Path) -> None:
    """Beyond any disk's speed, with ``wait``: a sender that is only fast comes again."""
    async with open_peers(tmp_path) as peers:
        peers.allowances = Allowances(lambda: 0.0, {})
        wrong = make(si.SI)
        for _ in range(OFFER_BURST):
            assert (await refused(peers.ask(wrong))).condition == "bad-request"
        error = await refused(peers.ask(wrong))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        assert (await refused(peers.ask(wrong, sender=MALLORY))).condition == "forbidden"


async def test_c04_a_file_that_is_too_long_for_its_peer_never_begins(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        limit(peers, max_file=100)
        before = snapshot(tmp_path)
        for folder in (FOLDER, None):
            error = await refused(peers.ask(si.make_offer(offer(folder=folder, size=101))))
            assert (error.type, error.condition) == (ErrorType.CANCEL, "not-acceptable")
            assert error.text == "the file has 101 bytes; 100 are accepted from you at most"
        assert snapshot(tmp_path) == before
        assert (await peers.send(peers.write("a", b"x" * 100))).confirmed


async def test_c04_no_more_comes_in_a_day_than_its_peer_may_send(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        limit(peers, quota=250_000)
        for name in ("a", "b"):
            assert (await peers.send(peers.write(name, name.encode() * 100_000))).confirmed
        await peers.settled()
        third = offer(path="c", size=100_000)
        error = await refused(peers.ask(si.make_offer(third)))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        # What is there already costs nothing, and what fits comes.
        assert (await peers.send(peers.found("a"))).confirmed
        assert (await peers.send(peers.write("d", b"d" * 50_000))).confirmed
        assert sorted(peers.received()) == ["a", "b", "d"]


async def test_c04_offers_that_wait_do_not_add_up_to_more_than_the_quota(
    tmp_path: Path,
) -> None:
    async with open_peers(tmp_path) as peers:
        limit(peers, quota=250_000)
        for name in ("a", "b"):
            await peers.ask(si.make_offer(offer(path=name, size=100_000)))
        error = await refused(peers.ask(si.make_offer(offer(path="c", size=100_000))))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        # Both end without a byte, and so may others come.
        for incoming in peers.incoming:
            incoming.scope.cancel()
        await peers.settled()
        assert (await peers.send(peers.write("d", b"d" * 250_000))).confirmed


async def test_c04_what_is_refused_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    """Neither room that was reserved for it, nor a name."""
    async with open_peers(tmp_path) as peers:
        limit(peers, quota=100 * MIB)
        await peers.ask(si.make_offer(offer(path="accepted", size=60 * MIB)))
        before = snapshot(tmp_path)
        for number in range(20):
            each = offer(path=f"{number}", size=60 * MIB)
            error = await refused(peers.ask(si.make_offer(each)))
            assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        assert snapshot(tmp_path) == before
        assert taken(peers.folder) < 61 * MIB


async def test_c04_what_never_comes_takes_no_room(tmp_path: Path) -> None:
    """An offer that is given up, by whomever, gives its room back at once."""
    async with open_peers(tmp_path) as peers:
        for number in range(3):
            await peers.ask(si.make_offer(offer(path=f"{number}", size=60 * MIB)))
            await peers.ask(si.make_offer(offer(folder=None, size=60 * MIB)))
        assert taken(peers.folder) + taken(peers.inbox) >= 360 * MIB
        for incoming in peers.incoming:
            incoming.scope.cancel()
        await peers.settled()
        assert peers.leftovers() == []


async def test_c04_what_came_of_a_file_takes_only_its_own_room(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        each = offer(path="a", size=60 * MIB)
        await peers.ask(si.make_offer(each))
        stream = await open_by_hand(peers, each.sid)
        await stream.send_all(bytes(2 * MIB))
        await stream.aclose()
        await peers.settled()
        [partial] = peers.partials()
        assert partial.stat().st_size == 2 * MIB
        assert taken(peers.folder) < 3 * MIB


async def test_c04_empty_files_and_directories_are_not_free(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        limit(peers, quota=10 * ENTRY)
        for number in range(6):
            assert (await peers.send(peers.write(f"{number}", b""))).confirmed
        await peers.settled()
        error = await refused(peers.ask(si.make_offer(offer(path="a/b/c/d/e", size=1))))
        assert (error.type, error.condition) == (ErrorType.WAIT, "resource-constraint")
        assert (await peers.send(peers.write("a/b/c/d", b""))).confirmed
        await peers.settled()
        with pytest.raises(TransferError, match="as much as is accepted from you in a day"):
            await peers.send(peers.write("7", b""))


async def test_c04_no_more_files_come_in_a_day_than_its_peer_may_send(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        limit(peers, max_files=3)
        assert (await peers.send(peers.write("a", b"x"))).confirmed
        assert (await peers.send(peers.write("b/c", b"x"))).confirmed
        await peers.settled()
        with pytest.raises(TransferError, match="as many files as are accepted") as caught:
            await peers.send(peers.write("d", b"x"))
        assert caught.value.type == ErrorType.WAIT
        assert (await peers.send(peers.found("a"))).confirmed


async def test_c04_who_begins_anew_all_the_time_pays_for_every_byte(tmp_path: Path) -> None:
    """A plain client is asked to go on, and sends the whole file instead."""
    data = blake3.blake3(b"content").digest(8 * MIB)
    each = replace(offer(folder=None, size=len(data)), ranged=True)
    async with open_peers(tmp_path) as peers:
        limit(peers, quota=16 * MIB)
        counted = []
        for _ in range(3):
            this = replace(each, sid=secrets.token_hex(16))
            await peers.ask(si.make_offer(this))
            stream = await open_by_hand(peers, this.sid)
            with suppress(trio.BrokenResourceError):
                await stream.send_all(data[: 7 * MIB])
            await stream.aclose()
            await peers.settled()
            counted.append(peers.allowances.of(ALICE.bare)._came.sum())
        # The third would be more than its day's, which shows as soon as it begins anew.
        assert counted[:2] == [7 * MIB, 14 * MIB]
        assert 14 * MIB <= counted[2] <= 15 * MIB
        # Who goes on where it was asked to pays for the rest.
        limit(peers, quota=16 * MIB)
        this = replace(each, sid=secrets.token_hex(16))
        answer = si.read_answer((await peers.ask(si.make_offer(this))).payload, this)
        stream = await open_by_hand(peers, this.sid)
        await stream.send_all(data[answer.offset :])
        await stream.aclose()
        await peers.settled()
        assert peers.received() == {this.name: data}
        assert peers.allowances.of(ALICE.bare)._came.sum() == len(data) - answer.offset


async def test_c04_what_could_not_be_accepted_sets_nothing_aside(tmp_path: Path) -> None:
    """Neither when the disk refuses it, nor when another was faster."""
    async with open_peers(tmp_path) as peers:
        limit(peers, quota=1 << 70)
        error = await refused(peers.ask(si.make_offer(offer(size=2**63 - 1))))
        assert error.condition == "not-acceptable"
        twice = [offer(path=path, sid="same") for path in ("a", "b")]
        outcomes: list[str] = []

        async def ask(each: si.Offer) -> None:
            try:
                outcomes.append((await peers.ask(si.make_offer(each))).type)
            except StanzaError as refusal:
                outcomes.append(refusal.condition)

        async with trio.open_nursery() as nursery:
            for each in twice:
                nursery.start_soon(ask, each)
        assert sorted(outcomes) == ["not-acceptable", "result"]
        allowance = peers.allowances.of(ALICE.bare)
        assert (allowance._reserved, allowance._to_make) == (ENTRY, 1)
        peers.incoming[-1].scope.cancel()
        await peers.settled()
        assert (allowance._reserved, allowance._to_make, allowance._came.sum()) == (0, 0, 0)


async def test_c04_an_offer_that_brings_nothing_costs_nothing(tmp_path: Path) -> None:
    """Not even of a file of which something is there, and would be asked for twice."""
    each = replace(offer(folder=None, size=MIB), ranged=True)
    async with open_peers(tmp_path) as peers:
        limit(peers, quota=2 * MIB)
        for count in (300_000, 0):
            this = replace(each, sid=secrets.token_hex(16))
            await peers.ask(si.make_offer(this))
            stream = await open_by_hand(peers, this.sid) if count else None
            if stream is not None:
                await stream.send_all(bytes(count))
                await stream.aclose()
            else:
                peers.incoming[-1].scope.cancel()
            await peers.settled()
            assert peers.allowances.of(ALICE.bare)._came.sum() == 300_000


async def open_by_hand(peers: Peers, sid: str) -> trio.SocketStream:
    """Open a bytestream for an accepted offer of Alice's."""
    host = s5b.Streamhost(ALICE, "127.0.0.1", peers.listener.port)
    with peers.listener.expect(s5b.dstaddr(sid, ALICE, BOB)) as slot:
        await peers.ask(s5b.make_query(sid, [host]))
        return await slot.winner()


def limit(peers: Peers, *, max_file: int = 0, quota: int = 0, max_files: int = 0) -> None:
    terms = Terms(max_file=max_file, quota=quota, max_files=max_files)
    peers.allowances = Allowances(lambda: 0.0, {ALICE.bare: terms})


def taken(root: Path) -> int:
    """What is unfinished in a folder takes of the disk, bytes."""
    return sum(path.lstat().st_blocks * 512 for path in root.glob(".syncd/*"))
