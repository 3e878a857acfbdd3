"""gloox: labels, an out-of-band option and an empty value; paths as names; silence on failure.

In-band it sends everything at once, and makes bytes of white space. As a receiver it says
nothing when it cannot connect, and may choose what was not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import ibb, outgoing, s5b
from syncd.errors import OfflineError, RemoteProtocolError
from syncd.link import session
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

ROWS = {1, 2, 3, 5, 8, 10, 13, 14, 16, 17, 23, 29, 30}

GLOOX = "camaya@example.org/gloox"
SID = "uid:4f2a1b3c:00000007"

# Options with labels, and one that is no way of transfer; an empty value behind them.
OFFER = (
    f"<si xmlns='{si.NS_SI}' id='{SID}' mime-type='binary/octet-stream' profile='{si.NS_FILE}'>"
    f"<file xmlns='{si.NS_FILE}' name='{{name}}' size='{{size}}'/>"
    f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field type='list-single' var='stream-method'>"
    f"<option label='In-Band Bytestreams'><value>{si.IBB}</value></option>"
    "<option label='Out-of-Band Data'><value>jabber:iq:oob</value></option>"
    f"<option label='SOCKS5 Bytestreams'><value>{si.BYTESTREAMS}</value></option>"
    "<value/></field></x></feature></si>"
)
ANSWER = accepted(si.BYTESTREAMS, field=" type='text-single'")
INBAND = accepted(si.IBB, field=" type='text-single'")


# gloox sends


async def test_options_that_we_do_not_know_are_passed_over(tmp_path: Path) -> None:
    """Rows 1 and 3: of the four values one is chosen; and there is no <file/>."""
    async with open_script(tmp_path, GLOOX) as script:
        answer = payload(await script.ask(OFFER.format(name="a", size=7), "a"))
        assert [value.text for value in answer.iter(si.VALUE)] == [si.BYTESTREAMS]
        assert answer.find(si.FILE) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/home/me/Bilder/foto.jpg", "foto.jpg"),
        ("C:\\Users\\me\\foto.jpg", "foto.jpg"),
        ("../../../etc/cron.d/foto.jpg", "foto.jpg"),
        ("..\\..\\foto.jpg", "foto.jpg"),
    ],
)
async def test_path_leads_nowhere_but_into_the_inbox(
    tmp_path: Path, name: str, expected: str
) -> None:
    """Row 29."""
    async with open_script(tmp_path, GLOOX) as script:
        await script.ask(OFFER.format(name=name, size=7), "a")
        await script.ask(open_inband(SID), "b")
        await script.ask(blocks(SID, b"content")[0], "c")
        await script.ask(close_inband(SID), "d")
        assert await script.settled() == {expected: b"content"}
        assert [path.name for path in script.inbox.iterdir()] == [".syncd", expected]


async def test_all_blocks_at_once_are_taken_and_each_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 16: 75 stanzas before the first answer, however little else we handle at a time."""
    monkeypatch.setattr(session, "MAX_HANDLING", 1)
    data = pattern(300_000)
    async with open_script(tmp_path, GLOOX) as script:
        await script.ask(OFFER.format(name="a", size=len(data)), "a")
        await script.ask(open_inband(SID), "b")
        sent = blocks(SID, data)
        assert len(sent) == 74
        for number, each in enumerate(sent):
            await script.say(each, f"c{number}")
        await script.say(close_inband(SID), "d")
        for number in range(len(sent)):
            assert (await script.answer_to(f"c{number}")).get("type") == "result"
        assert (await script.answer_to("d")).get("type") == "result"
        assert await script.settled() == {"a": data}


async def test_data_may_come_before_we_have_said_that_we_are_connected(
    tmp_path: Path,
) -> None:
    """Rows 5 and 10: in the segment of the reply already; it is the file's beginning."""
    async with open_script(tmp_path, GLOOX) as script, script.host() as host:
        await script.ask(OFFER.format(name="a", size=7), "a")
        await script.say(query(SID, (GLOOX, "127.0.0.1", host.port)), "b")
        stream = await host.accept(behind=b"con")
        await script.answer_to("b")
        async with stream:
            await stream.send_all(b"tent")
        assert await script.settled() == {"a": b"content"}


async def test_udp_is_not_acceptable_and_the_next_opening_is(tmp_path: Path) -> None:
    """Rows 13 and 30: another query on the same sid, as gloox itself takes one."""
    async with open_script(tmp_path, GLOOX) as script, script.host() as host:
        await script.ask(OFFER.format(name="a", size=7), "a")
        hosts = (GLOOX, "127.0.0.1", host.port)
        udp = await script.ask(query(SID, hosts, attributes=" mode='udp'"), "b")
        assert refusal(udp) == ("modify", "not-acceptable")
        dead = await script.ask(query(SID, (GLOOX, "127.0.0.1", 9)), "c")
        assert refusal(dead) == ("cancel", "item-not-found")
        await script.say(query(SID, hosts), "d")
        stream = await host.accept()
        await script.answer_to("d")
        async with stream:
            await stream.send_all(b"content")
        assert await script.settled() == {"a": b"content"}


# gloox receives


async def test_answer_in_a_field_of_text_is_taken(tmp_path: Path) -> None:
    """Row 2; row 8: of two handshakes the last is the one."""
    async with open_script(tmp_path, GLOOX) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ANSWER)
        opening = await script.asked(s5b.TAG)
        first, second = [await script.join(opening) for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        await script.result(opening, used(US, payload(opening).get("sid", "")))
        assert await to_end(second) == b"content"
        assert await to_end(first) == b""
        await delivery.sent()


async def test_silence_about_our_streamhosts_is_a_failure_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 13 and 14: then the file is offered anew, in-band, under another sid."""
    monkeypatch.setattr(outgoing, "USED_TIMEOUT", 0.05)
    async with open_script(tmp_path, GLOOX) as script:
        delivery = script.send(b"content")
        first = await script.asked(si.SI)
        await script.result(first, ANSWER)
        await script.asked(s5b.TAG)
        second = await script.asked(si.SI)
        assert payload(second).get("id") != payload(first).get("id")
        await script.result(second, INBAND)
        assert await script.take_blocks(await script.asked(ibb.OPEN)) == b"content"
        await delivery.sent()


async def test_service_that_is_not_there_is_a_client_that_went(tmp_path: Path) -> None:
    """Row 23."""
    async with open_script(tmp_path, GLOOX) as script:
        delivery = script.send(b"content")
        await script.refuse(await script.asked(si.SI), error("service-unavailable"))
        with pytest.raises(OfflineError):
            await delivery.sent()


async def test_what_was_not_offered_cannot_be_chosen(tmp_path: Path) -> None:
    """It answers SOCKS5 whatever was offered."""
    async with open_script(tmp_path, GLOOX, direct=False) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ANSWER)
        with pytest.raises(RemoteProtocolError, match="no way"):
            await delivery.sent()


async def test_no_white_space_is_in_our_blocks(tmp_path: Path) -> None:
    """Row 17: it makes bytes of it; and row 16: there is one at a time."""
    data = pattern(20_000)
    async with open_script(tmp_path, GLOOX, direct=False) as script:
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), INBAND)
        await script.result(await script.asked(ibb.OPEN))
        for _ in range(5):
            request = await script.asked(ibb.DATA)
            text = payload(request).text
            assert text is not None
            assert text.split() == [text]
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert script.asked_nothing()
            await script.result(request)
        await script.result(await script.asked(ibb.CLOSE))
        assert (await delivery.sent()).digest
