"""QXmpp (Qt clients): in-band first, hashes JIDs as Latin-1, and is the only one to verify MD5.

Each dead streamhost costs it 7 seconds; it never goes from one way to the other. A file
without bytes has no size there, and its stream no end.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.disk.partial import Identity
from syncd.errors import DeclinedError, OpeningError, TransferError
from syncd.transfer import sender, si
from syncd.transfer.sender import Source, Target
from syncd.xmpp.jid import JID
from tests.support.peers import FOLDER
from tests.support.scripted import (
    US,
    Delivery,
    accepted,
    blocks,
    close_inband,
    connect_reply,
    error,
    exactly,
    open_inband,
    open_script,
    payload,
    query,
    refusal,
    sha1,
    to_end,
    used,
)
from tests.support.tcp import pattern

if TYPE_CHECKING:
    from pathlib import Path

ROWS = {2, 3, 4, 12, 13, 15, 18, 19, 20, 22, 23, 26}

QXMPP = "qt@example.org/QXmpp"
REMY = "rémy@example.org/QXmpp"
SID = "u3a8f1"

ANSWER = accepted(
    si.BYTESTREAMS, field=" type='list-single'", attributes=f" profile='{si.NS_FILE}'"
)
INBAND = ANSWER.replace(si.BYTESTREAMS, si.IBB)


def offer(data: bytes, *, md5: str | None = None, size: int | None = None) -> str:
    """In-band first, date and MD5; the size only if there is one."""
    digest = hashlib.md5(data).hexdigest() if md5 is None else md5
    size = len(data) if size is None else size
    sized = f" size='{size}'" if size else ""
    return (
        f"<si xmlns='{si.NS_SI}' id='{SID}' profile='{si.NS_FILE}'>"
        f"<file xmlns='{si.NS_FILE}' date='2031-05-04T12:00:00Z' hash='{digest}'"
        f" name='photo.jpg'{sized}/><feature xmlns='{si.NS_FEATURE}'>"
        f"<x xmlns='{si.NS_DATA}' type='form'><field type='list-single' var='stream-method'>"
        f"<option><value>{si.IBB}</value></option>"
        f"<option><value>{si.BYTESTREAMS}</value></option></field></x></feature></si>"
    )


# QXmpp sends


async def test_socks5_is_chosen_though_in_band_comes_first(tmp_path: Path) -> None:
    """Row 3; and row 22: it waits for us to hang up."""
    data = pattern(300_000)
    async with open_script(tmp_path, QXMPP) as script, script.host() as host:
        answer = payload(await script.ask(offer(data), "a"))
        assert [value.text for value in answer.iter(si.VALUE)] == [si.BYTESTREAMS]
        assert [x.get("type") for x in answer.iter(si.X)] == ["submit"]
        await script.say(query(SID, (QXMPP, "127.0.0.1", host.port)), "b")
        stream = await host.accept(address=sha1(SID, QXMPP, US))
        await script.answer_to("b")
        await stream.send_all(data)
        with trio.fail_after(10):
            assert await stream.receive_some(1) == b""
        assert await script.settled() == {"photo.jpg": data}
        await stream.aclose()


async def test_wrong_md5_delivers_nothing(tmp_path: Path) -> None:
    """What came is put aside, and not gone on from."""
    data = pattern(1_000)
    async with open_script(tmp_path, QXMPP) as script:
        await script.ask(offer(data, md5="00" * 16), "a")
        await script.ask(open_inband(SID), "b")
        for number, each in enumerate(blocks(SID, data)):
            await script.ask(each, f"c{number}")
        assert (await script.settled(), script.kept("bad")) == ({}, [data])


@pytest.mark.parametrize("listening", [True, False])
async def test_empty_file_has_no_size_and_its_stream_no_end(
    tmp_path: Path, listening: bool
) -> None:
    """Rows 4 and 20: that it is empty is told by its hash alone; nothing is waited for."""
    async with open_script(tmp_path, QXMPP) as script, script.host() as host:
        await script.ask(offer(b""), "a")
        if listening:
            await script.say(query(SID, (QXMPP, "127.0.0.1", host.port)), "b")
            stream = await host.accept()
            await script.answer_to("b")
        else:
            await script.ask(open_inband(SID), "b")
        with trio.fail_after(10):
            assert await script.settled() == {"photo.jpg": b""}
        if listening:
            await stream.aclose()


async def test_address_that_it_hashed_as_latin1_is_tried_second(tmp_path: Path) -> None:
    """Row 26: its listener refuses what the book says, and then takes what it computed."""
    latin1 = sha1(SID, REMY, US, "latin-1")
    async with open_script(tmp_path, REMY) as script, script.host() as host:
        await script.ask(offer(b"content"), "a")
        await script.say(query(SID, (REMY, "127.0.0.1", host.port)), "b")
        refused = await host.accept(lambda request: b"\x05\x01" + connect_reply(request)[2:])
        await refused.aclose()
        stream = await host.accept(address=latin1)
        assert payload(await script.answer_to("b"))[0].get("jid") == REMY
        async with stream:
            await stream.send_all(b"content")
        assert await script.settled() == {"photo.jpg": b"content"}


@pytest.mark.parametrize("surplus", [b"!", b"!" * 100_000])
async def test_more_than_was_offered_is_put_aside(tmp_path: Path, surplus: bytes) -> None:
    """Row 22: it sends on when its file has grown; nobody knows what that is."""
    data = pattern(300_000)
    async with open_script(tmp_path, QXMPP) as script, script.host() as host:
        await script.ask(offer(data).replace("/><feature", "><range/></file><feature"), "a")
        await script.say(query(SID, (QXMPP, "127.0.0.1", host.port)), "b")
        stream = await host.accept()
        await script.answer_to("b")
        async with stream:
            try:
                await stream.send_all(data + surplus)
            except trio.BrokenResourceError:
                assert len(surplus) > 1  # hung up on
            await script.settled()
        assert (script.received(), script.kept(), script.kept("bad")) == ({}, [], [data])


# QXmpp receives


async def test_answer_with_a_profile_and_a_type_is_taken(tmp_path: Path) -> None:
    """Row 2; row 22: it ends at the size and hangs up."""
    data = pattern(300_000)
    async with open_script(tmp_path, QXMPP) as script:
        delivery = script.send(data)
        offered = await script.asked(si.SI)
        x = payload(offered)[1][0]
        assert (x.get("type"), x[0].get("type")) == ("form", "list-single")
        assert payload(offered)[0].get("hash") == hashlib.md5(data).hexdigest()
        await script.result(offered, ANSWER)
        opening = await script.asked(s5b.TAG)
        stream = await script.join(opening)
        await script.result(opening, used(US, payload(opening).get("sid", "")))
        assert await exactly(stream, len(data)) == data
        await stream.aclose()
        await delivery.sent()


async def test_address_in_latin1_leads_to_us(tmp_path: Path) -> None:
    """Row 26."""
    async with open_script(tmp_path, REMY) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ANSWER)
        opening = await script.asked(s5b.TAG)
        latin1 = sha1(payload(opening).get("sid", ""), US, REMY, "latin-1")
        stream = await script.join(opening, address=latin1)
        await script.result(opening, used(US))
        assert await to_end(stream) == b"content"
        await delivery.sent()


async def test_no_more_than_five_streamhosts_cost_it_seven_seconds_each(
    tmp_path: Path,
) -> None:
    """Row 12; and the last of its refusals means: no way."""
    async with open_script(tmp_path, QXMPP, inband=False) as script:
        script.requester._advertised = lambda: [(f"192.0.2.{n}", 4000) for n in range(1, 99)]
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ANSWER)
        opening = await script.asked(s5b.TAG)
        assert len(payload(opening)) == 5
        await script.refuse(opening, error("item-not-found", code="404"))
        with pytest.raises(OpeningError, match="cannot connect"):
            await delivery.sent()


async def test_after_a_failure_only_a_new_offer_is_answered(tmp_path: Path) -> None:
    """Rows 13 and 23: in-band on the same sid is a service that is not there."""
    async with open_script(tmp_path, QXMPP) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ANSWER)
        await script.refuse(await script.asked(s5b.TAG), error("not-acceptable", "auth"))
        await script.refuse(await script.asked(ibb.OPEN), error("service-unavailable"))
        second = await script.asked(si.SI)
        await script.result(second, INBAND)
        opened = await script.asked(ibb.OPEN)
        assert payload(opened).get("sid") == payload(second).get("id")
        assert await script.take_blocks(opened) == b"content"
        await delivery.sent()


async def test_blocks_are_as_big_as_it_takes_them(tmp_path: Path) -> None:
    """Row 15: more than 4096 it refuses; ours are not more, and smaller if it wants that."""
    data = pattern(10_000)
    async with open_script(tmp_path, QXMPP, direct=False) as script:
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), INBAND)
        sizes = []
        for _ in range(2):
            opened = await script.asked(ibb.OPEN)
            sizes.append(int(payload(opened).get("block-size", "")))
            assert payload(opened).get("stanza") == "iq"
            if len(sizes) == 1:
                await script.refuse(opened, error("resource-constraint", "modify"))
        assert sizes == [4_095, 2_046]
        assert await script.take_blocks(opened) == data
        await delivery.sent()


@pytest.mark.parametrize("direct", [True, False])
async def test_more_blocks_than_it_can_count_do_not_go_in_band(
    tmp_path: Path, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 18: its counter does not wrap at 65536; without another way we say so."""
    async with open_script(tmp_path, QXMPP, direct=direct) as script:
        path = script.source / "large"
        path.touch()
        os.truncate(path, (sender.MAX_BLOCKS + 1) * ibb.BLOCK_SIZE)
        source = Source(
            root=script.source,
            folder=FOLDER,
            path="large",
            version=Identity.of(path.stat()),
        )
        delivery = Delivery()
        target = Target(jid=JID.parse(QXMPP), is_syncd=False)
        script._nursery.start_soon(delivery.run, script.sender, source, target)
        offered = await script.asked(si.SI)
        methods = [value.text for value in payload(offered).iter(si.VALUE)]
        assert methods == [si.BYTESTREAMS if direct else si.IBB]
        assert ("unable to count" in caplog.text) is not direct
        await script.refuse(offered, error("forbidden", "auth", code="403"))
        with pytest.raises(DeclinedError):
            await delivery.sent()


async def test_close_of_ours_is_not_said_when_all_is_there(tmp_path: Path) -> None:
    """Row 19: it would answer with item-not-found, and hang; its own is answered."""
    async with open_script(tmp_path, QXMPP) as script:
        await script.ask(offer(b"content"), "a")
        await script.ask(open_inband(SID), "b")
        await script.ask(blocks(SID, b"content")[0], "c")
        assert await script.settled() == {"photo.jpg": b"content"}
        await trio.testing.wait_all_tasks_blocked()
        assert script.asked_nothing()
        assert (await script.ask(close_inband(SID), "d")).get("type") == "result"
        # Late, and once more.
        assert (await script.ask(close_inband(SID), "e")).get("type") == "result"


async def test_bad_request_without_a_reason_is_final(tmp_path: Path) -> None:
    """Row 23: what it says to a method or profile that it does not know."""
    async with open_script(tmp_path, QXMPP) as script:
        delivery = script.send(b"content")
        await script.refuse(await script.asked(si.SI), error("bad-request", code="400"))
        with pytest.raises(TransferError, match="bad-request") as caught:
            await delivery.sent()
        assert caught.value.type == "cancel"


async def test_unknown_sid_is_refused_in_the_words_of_the_book(tmp_path: Path) -> None:
    async with open_script(tmp_path, QXMPP) as script:
        answer = await script.ask(query("other", (QXMPP, "127.0.0.1", 9)), "a")
        assert refusal(answer) == ("modify", "not-acceptable")
        for number, (inside, expected) in enumerate(
            [
                (open_inband("other"), ("cancel", "not-acceptable")),
                (blocks("other", b"x")[0], ("cancel", "item-not-found")),
                (close_inband("other"), ("cancel", "item-not-found")),
            ]
        ):
            assert refusal(await script.ask(inside, f"b{number}")) == expected
