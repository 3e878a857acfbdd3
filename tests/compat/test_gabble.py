"""Telepathy's gabble, and Vacuum-IM: both resume with a range, both listen for one handshake.

Gabble puts the feature before the file and its own si-multiple between them. Vacuum always
names the address to ask for, refuses empty files, and takes blocks in messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from syncd.bytestreams import ibb, s5b
from syncd.errors import TransferError
from syncd.transfer import si
from tests.support.scripted import (
    US,
    accepted,
    block,
    close_inband,
    error,
    open_inband,
    open_script,
    payload,
    query,
    sha1,
    to_end,
    used,
)
from tests.support.tcp import pattern

if TYPE_CHECKING:
    from pathlib import Path

ROWS = {3, 6, 7, 20, 21, 30}

GABBLE = "empathy@example.org/Telepathy"
VACUUM = "vacuum@example.org/Vacuum-IM"
SID = "1594232171"

MULTIPLE = "<si-multiple xmlns='http://telepathy.freedesktop.org/xmpp/si-multiple'/>"


def offer(size: int, *, gabble: bool) -> str:
    feature = (
        f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
        "<field var='stream-method' type='list-single'>"
        f"<option><value>{si.BYTESTREAMS}</value></option>"
        f"<option><value>{si.IBB}</value></option></field></x></feature>"
    )
    file = (
        f"<file xmlns='{si.NS_FILE}' name='a' size='{size}' date='2031-05-04T12:00:00Z'>"
        "<desc>what it is</desc><range/></file>"
    )
    inside = f"{feature}{MULTIPLE}{file}" if gabble else f"{file}{feature}"
    return (
        f"<si xmlns='{si.NS_SI}' id='{SID}' profile='{si.NS_FILE}' "
        f"mime-type='application/octet-stream'>{inside}</si>"
    )


@pytest.mark.parametrize(
    "reply",
    [
        b"\x05\x00\x00\x00\x00\x00",
        b"\x05\x00\x00\x01\x0a\x4d\x00\x01\x1e\x61",
        b"\x05\x00\x00\x04" + bytes(16) + b"\x00\x00",
        b"\x05\x00\x00\x03\x00\x00\x00",
    ],
    ids=["no address", "IPv4", "IPv6", "an empty name"],
)
async def test_feature_comes_first_and_the_reply_has_any_address(
    tmp_path: Path, reply: bytes
) -> None:
    """Rows 3, 6 and 7: also of an old ejabberd; the listener is gone behind the first."""
    data = pattern(100_000)
    async with open_script(tmp_path, GABBLE) as script, script.host() as host:
        await script.ask(offer(len(data), gabble=True), "a")
        await script.say(query(SID, (GABBLE, "127.0.0.1", host.port)), "b")
        stream = await host.accept(lambda _: reply)
        host.close()
        await script.answer_to("b")
        async with stream:
            await stream.send_all(data)
        assert await script.settled() == {"a": data}


async def test_gabble_asks_for_a_part_behind_the_feature(tmp_path: Path) -> None:
    """Row 21."""
    data = pattern(100_000)
    async with open_script(tmp_path, GABBLE) as script:
        delivery = script.send(data)
        file = f"<file xmlns='{si.NS_FILE}'><range offset='60000'/></file>"
        answer = accepted(si.BYTESTREAMS, behind=MULTIPLE + file)
        await script.result(await script.asked(si.SI), answer)
        opening = await script.asked(s5b.TAG)
        stream = await script.join(opening)
        await script.result(opening, used(US))
        assert await to_end(stream) == data[60_000:]
        await delivery.sent()


async def test_vacuum_names_the_address_and_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    """Rows 7, 21 and 30: its key is good for one handshake."""
    data = pattern(400_000)
    address = "0123456789abcdefABCD" * 2
    async with open_script(tmp_path, VACUUM) as script:
        for start, end in ((0, 300_000), (300_000 - 65_536, len(data))):
            result = payload(await script.ask(offer(len(data), gabble=False), f"a{start}"))
            span = result.find(f"{si.FILE}/{si.RANGE}")
            assert (0 if span is None else int(span.get("offset", ""))) == start
            async with script.host() as host:
                attributes = f" mode='tcp' dstaddr='{address}'"
                hosts = (VACUUM, "127.0.0.1", host.port)
                await script.say(query(SID, hosts, attributes=attributes), f"b{start}")
                stream = await host.accept(address=address.encode())
                host.close()
                await script.answer_to(f"b{start}")
                async with stream:
                    await stream.send_all(data[start:end])
            await script.settled()
        assert script.received() == {"a": data}


async def test_vacuum_may_send_blocks_in_messages(tmp_path: Path) -> None:
    """XEP-0047 section 4: nobody answers them."""
    async with open_script(tmp_path, VACUUM) as script:
        await script.ask(offer(7, gabble=False), "a")
        opening = open_inband(SID, 4096, " stanza='message'")
        assert (await script.ask(opening, "b")).get("type") == "result"
        for number, part in enumerate((b"con", b"tent")):
            await script.server.send(
                f"<message from='{VACUUM}' to='{US}' id='m{number}'>"
                f"{block(SID, number, part)}<body/></message>"
            )
        assert (await script.ask(close_inband(SID), "c")).get("type") == "result"
        assert await script.settled() == {"a": b"content"}


async def test_vacuum_refuses_an_empty_file_and_that_is_final(tmp_path: Path) -> None:
    """Row 20: it is offered in-band, and no fault of the way."""
    async with open_script(tmp_path, VACUUM) as script:
        delivery = script.send(b"")
        await script.refuse(await script.asked(si.SI), error("bad-request", "modify"))
        with pytest.raises(TransferError) as caught:
            await delivery.sent()
        assert caught.value.type == "cancel"
        assert script.asked_nothing()


async def test_address_of_ours_is_what_the_book_says(tmp_path: Path) -> None:
    """Row 30: towards others none is named, so that nobody need understand it."""
    async with open_script(tmp_path, VACUUM) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), accepted(si.BYTESTREAMS))
        opening = await script.asked(s5b.TAG)
        assert payload(opening).keys() == ["sid", "mode"]
        address = sha1(payload(opening).get("sid", ""), US, VACUUM)
        stream = await script.join(opening, address=address)
        await script.result(opening, used(US))
        assert await to_end(stream) == b"content"
        await delivery.sent()


async def test_in_band_is_taken_as_well(tmp_path: Path) -> None:
    async with open_script(tmp_path, VACUUM, direct=False) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), accepted(si.IBB))
        assert await script.take_blocks(await script.asked(ibb.OPEN)) == b"content"
        await delivery.sent()
