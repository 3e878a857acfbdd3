"""slixmpp: prefers in-band, hosts nothing itself, and waits for all streamhosts at once.

Its SOCKS5 bytestreams go by proxies, or nowhere. What real slixmpp does, the tests with real
servers show; here are the stanzas of the cases that are hard to bring about there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.errors import DeclinedError, TransferError
from syncd.transfer import si
from tests.support.scripted import (
    US,
    accepted,
    blocks,
    close_inband,
    error,
    open_inband,
    open_script,
    payload,
    query,
    refusal,
    to_end,
    used,
)
from tests.support.tcp import pattern

if TYPE_CHECKING:
    from pathlib import Path

ROWS = {2, 3, 8, 13, 15, 17, 20, 23}

SLIXMPP = "slix@example.org/bot"
SID = "photo-1"  # chosen by its application

# A field without a type, and in-band first.
OFFER = (
    f"<si xmlns='{si.NS_SI}' id='{SID}' profile='{si.NS_FILE}' mime-type='image/jpeg'>"
    f"<file xmlns='{si.NS_FILE}' name='a' size='{{size}}'/>"
    f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field var='stream-method'>"
    f"<option><value>{si.IBB}</value></option>"
    f"<option><value>{si.BYTESTREAMS}</value></option></field></x></feature></si>"
)
ANSWER = accepted(si.IBB)


async def test_opening_without_streamhosts_leaves_the_other_way(tmp_path: Path) -> None:
    """Rows 3 and 13: no proxy, so none is named; then it may come in-band, on the same sid."""
    data = pattern(50_000)
    async with open_script(tmp_path, SLIXMPP) as script:
        await script.ask(OFFER.format(size=len(data)), "a")
        assert refusal(await script.ask(query(SID), "b")) == ("cancel", "item-not-found")
        await script.ask(open_inband(SID, 4096, ""), "c")
        for number, each in enumerate(blocks(SID, data)):
            assert (await script.ask(each, f"d{number}")).get("type") == "result"
        await script.ask(close_inband(SID), "e")
        assert await script.settled() == {"a": data}


async def test_empty_file_is_opened_and_closed(tmp_path: Path) -> None:
    """Row 20."""
    async with open_script(tmp_path, SLIXMPP) as script:
        await script.ask(OFFER.format(size=0), "a")
        await script.ask(open_inband(SID, 4096, ""), "b")
        assert (await script.ask(close_inband(SID), "c")).get("type") == "result"
        assert await script.settled() == {"a": b""}


async def test_largest_blocks_of_the_book_are_taken_and_no_larger(tmp_path: Path) -> None:
    """Row 15."""
    data = pattern(65_535)
    async with open_script(tmp_path, SLIXMPP) as script:
        await script.ask(OFFER.format(size=len(data)), "a")
        more = await script.ask(open_inband(SID, 65_536), "b")
        assert more.get("type") == "error"
        await script.ask(open_inband(SID, 65_535), "c")
        await script.ask(blocks(SID, data, 65_535)[0], "d")
        await script.ask(close_inband(SID), "e")
        assert await script.settled() == {"a": data}


async def test_answer_in_a_field_without_a_type_is_taken(tmp_path: Path) -> None:
    """Rows 2, 15 and 17: in-band, in blocks of less than 8192 bytes, without white space."""
    data = pattern(50_000)
    async with open_script(tmp_path, SLIXMPP) as script:
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), ANSWER)
        opened = await script.asked(ibb.OPEN)
        assert int(payload(opened).get("block-size", "")) <= 4_096
        assert await script.take_blocks(opened) == data
        await delivery.sent()


async def test_busy_peer_gets_the_same_block_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 15 and 23: resource-constraint, of type wait."""
    monkeypatch.setattr(ibb, "RETRY_DELAYS", (0.01,))
    async with open_script(tmp_path, SLIXMPP, direct=False) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ANSWER)
        await script.result(await script.asked(ibb.OPEN))
        first = await script.asked(ibb.DATA)
        await script.refuse(first, error("resource-constraint", "wait"))
        second = await script.asked(ibb.DATA)
        assert payload(second).attrib == payload(first).attrib
        assert payload(second).text == payload(first).text
        await script.result(second)
        await script.result(await script.asked(ibb.CLOSE))
        await delivery.sent()


async def test_two_handshakes_that_both_stay_open_are_one_stream(tmp_path: Path) -> None:
    """Row 8: it never closes the losers."""
    async with open_script(tmp_path, SLIXMPP) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), accepted(si.BYTESTREAMS))
        opening = await script.asked(s5b.TAG)
        streams = [await script.join(opening) for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked(0.02)
        await script.result(opening, used(US, payload(opening).get("sid", "")))
        assert sorted([await to_end(each) for each in streams]) == [b"", b"content"]
        await delivery.sent()


async def test_trouble_with_our_streamhosts_leaves_the_same_sid(tmp_path: Path) -> None:
    """Rows 13 and 23: undefined-condition, when a streamhost refused it."""
    async with open_script(tmp_path, SLIXMPP) as script:
        delivery = script.send(b"content")
        offered = await script.asked(si.SI)
        await script.result(offered, accepted(si.BYTESTREAMS))
        said = error("undefined-condition", "cancel", code="500")
        await script.refuse(await script.asked(s5b.TAG), said)
        opened = await script.asked(ibb.OPEN)
        assert payload(opened).get("sid") == payload(offered).get("id")
        assert await script.take_blocks(opened) == b"content"
        await delivery.sent()


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (
            error("bad-request", inside=f"<no-valid-streams xmlns='{si.NS_SI}'/>"),
            DeclinedError,
        ),
        (
            error("bad-request", "modify", inside=f"<bad-profile xmlns='{si.NS_SI}'/>"),
            DeclinedError,
        ),
        (error("forbidden"), DeclinedError),
        (error("undefined-condition"), TransferError),
    ],
)
async def test_refusals_by_the_book_are_understood(
    tmp_path: Path, problem: str, expected: type[TransferError]
) -> None:
    """Row 23."""
    async with open_script(tmp_path, SLIXMPP) as script:
        delivery = script.send(b"content")
        await script.refuse(await script.asked(si.SI), problem)
        with pytest.raises(TransferError) as caught:
            await delivery.sent()
        assert type(caught.value) is expected
        assert caught.value.type == "cancel"
