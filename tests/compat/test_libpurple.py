"""libpurple (Pidgin, Finch, bitlbee): one connection, its own address, and another way.

It goes on in-band on the same sid when SOCKS5 has failed, at either end. Its listener takes
one connection in all. In-band it closes as soon as it has all, and never answers a close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import ibb, inband, s5b
from syncd.errors import BytestreamError, OfflineError, TruncatedError
from syncd.transfer import sender, si
from tests.support.scripted import (
    PROXY,
    US,
    accepted,
    blocks,
    close_inband,
    error,
    exactly,
    open_inband,
    open_script,
    payload,
    query,
    refusal,
    to_end,
    used,
)
from tests.support.tcp import pattern, until

if TYPE_CHECKING:
    from pathlib import Path

ROWS = {5, 6, 7, 10, 13, 14, 15, 19, 20, 22, 23}

PIDGIN = "gaim@example.org/Pidgin"
SID = "purple4f2a1b3c"

OFFER = (
    f"<si xmlns='{si.NS_SI}' profile='{si.NS_FILE}' id='{SID}'>"
    f"<file xmlns='{si.NS_FILE}' name='photo.jpg' size='{{size}}'/>"
    f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field var='stream-method' type='list-single'>"
    f"<option><value>{si.BYTESTREAMS}</value></option>"
    f"<option><value>{si.IBB}</value></option></field></x></feature></si>"
)
ANSWER = accepted(si.BYTESTREAMS)
INBAND = accepted(si.IBB)

# What it replies: its own IP address as a name, no port.
OWN_IP = b"\x05\x00\x00\x03\x09" + b"10.77.0.1" + b"\x00\x00"


# libpurple sends


async def test_listener_takes_one_connection_and_is_gone(tmp_path: Path) -> None:
    """Rows 6 and 7: no probe, one handshake, one file; and its reply is its own address."""
    data = pattern(300_000)
    async with open_script(tmp_path, PIDGIN) as script, script.host() as host:
        await script.ask(OFFER.format(size=len(data)), "a")
        own = (PIDGIN, "127.0.0.1", host.port)
        await script.say(query(SID, own, own, (str(PROXY), "127.0.0.1", 9)), "b")
        stream = await host.accept(lambda _: OWN_IP)
        host.close()
        await script.answer_to("b")
        async with stream:
            await stream.send_all(data)
        assert await script.settled() == {"photo.jpg": data}


async def test_streamhosts_are_tried_one_after_the_other(tmp_path: Path) -> None:
    """Row 7: while one makes us wait, no other is touched; a refused one costs nothing."""
    async with (
        open_script(tmp_path, PIDGIN) as script,
        script.host() as first,
        script.host() as second,
    ):
        await script.ask(OFFER.format(size=7), "a")
        hosts = [(PIDGIN, "127.0.0.1", port) for port in (9, first.port, second.port)]
        await script.say(query(SID, *hosts), "b")
        slow = await first._listening.accept()
        with trio.move_on_after(0.1) as quiet:
            await second._listening.accept()
        assert quiet.cancelled_caught
        await slow.aclose()
        stream = await second.accept(lambda _: OWN_IP)
        await script.answer_to("b")
        async with stream:
            await stream.send_all(b"content")
        assert await script.settled() == {"photo.jpg": b"content"}


@pytest.mark.parametrize("writes", [[1] * len(OWN_IP), [2, 2, 1], [10]])
async def test_reply_may_come_in_any_pieces(tmp_path: Path, writes: list[int]) -> None:
    """Row 5."""
    async with open_script(tmp_path, PIDGIN) as script, script.host() as host:
        await script.ask(OFFER.format(size=7), "a")
        await script.say(query(SID, (PIDGIN, "127.0.0.1", host.port)), "b")
        stream = await host.accept(lambda _: OWN_IP, writes=writes, behind=b"content")
        await script.answer_to("b")
        assert await script.settled() == {"photo.jpg": b"content"}
        await stream.aclose()


async def test_it_goes_on_in_band_when_we_cannot_connect(tmp_path: Path) -> None:
    """Rows 13 and 15: on the same sid; blocks of 3070 bytes, which have 4096 characters."""
    data = pattern(50_000)
    async with open_script(tmp_path, PIDGIN) as script:
        await script.ask(OFFER.format(size=len(data)), "a")
        answer = await script.ask(query(SID, (PIDGIN, "127.0.0.1", 9)), "b")
        assert refusal(answer) == ("cancel", "item-not-found")
        assert (await script.ask(open_inband(SID, 4_096, ""), "c")).get("type") == "result"
        for number, each in enumerate(blocks(SID, data, 3_070)):
            assert (await script.ask(each, f"d{number}")).get("type") == "result"
        assert (await script.ask(close_inband(SID), "e")).get("type") == "result"
        assert await script.settled() == {"photo.jpg": data}


async def test_empty_file_that_it_announces_is_there_at_once(tmp_path: Path) -> None:
    """Row 20: through its API; then it hangs, and nobody need wait for that."""
    async with open_script(tmp_path, PIDGIN) as script, script.host() as host:
        await script.ask(OFFER.format(size=0), "a")
        await script.say(query(SID, (PIDGIN, "127.0.0.1", host.port)), "b")
        stream = await host.accept(lambda _: OWN_IP)
        await script.answer_to("b")
        assert await script.settled() == {"photo.jpg": b""}
        await stream.aclose()


async def test_less_than_it_said_is_no_file(tmp_path: Path) -> None:
    async with open_script(tmp_path, PIDGIN) as script, script.host() as host:
        await script.ask(OFFER.format(size=8), "a")
        await script.say(query(SID, (PIDGIN, "127.0.0.1", host.port)), "b")
        stream = await host.accept(lambda _: OWN_IP)
        await script.answer_to("b")
        async with stream:
            await stream.send_all(b"content")
        assert (await script.settled(), script.kept()) == ({}, [])


# libpurple receives


async def test_streamhost_that_it_uses_comes_without_the_sid(tmp_path: Path) -> None:
    """Row 22: it stops at the size, and hangs up."""
    data = pattern(300_000)
    async with open_script(tmp_path, PIDGIN) as script:
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), ANSWER)
        opening = await script.asked(s5b.TAG)
        stream = await script.join(opening)
        await script.result(opening, used(US))
        assert await exactly(stream, len(data)) == data
        await stream.aclose()
        await delivery.sent()


async def test_receiver_that_hangs_up_in_the_middle_has_not_got_it(tmp_path: Path) -> None:
    """What the kernels still hold is no delivery: the reset tells."""
    data = pattern(100_000)
    async with open_script(tmp_path, PIDGIN) as script:
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), ANSWER)
        opening = await script.asked(s5b.TAG)
        stream = await script.join(opening)
        await script.result(opening, used(US))
        await exactly(stream, 16_384)
        # All is in the kernels: without a look at the end, this would be a success.
        await until(lambda: script.sending[0].offset == len(data))
        await stream.aclose()
        with pytest.raises(TruncatedError):
            await delivery.sent()


async def test_refused_socks5_goes_on_in_band_on_the_same_sid(tmp_path: Path) -> None:
    """Row 13: for 30 seconds it takes that."""
    async with open_script(tmp_path, PIDGIN) as script:
        delivery = script.send(b"content")
        offered = await script.asked(si.SI)
        await script.result(offered, ANSWER)
        await script.refuse(await script.asked(s5b.TAG), error("item-not-found", code="404"))
        opened = await script.asked(ibb.OPEN)
        assert payload(opened).get("sid") == payload(offered).get("id")
        assert await script.take_blocks(opened) == b"content"
        await delivery.sent()


@pytest.mark.parametrize("early", [False, True])
async def test_close_is_never_answered_and_its_own_may_cross_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """Rows 19 and 23: it closes when it has all; ours then finds no stream (code 440)."""
    monkeypatch.setattr(inband, "CLOSE_TIMEOUT", 0.05)
    async with open_script(tmp_path, PIDGIN, direct=False) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), INBAND)
        await script.result(await script.asked(ibb.OPEN))
        request = await script.asked(ibb.DATA)
        sid = payload(request).get("sid", "")
        if early:
            answer = await script.ask(close_inband(sid), "own")
            assert answer.get("type") == "result"
        await script.result(request)
        if not early:
            ours = await script.asked(ibb.CLOSE)
            await script.refuse(ours, error("item-not-found", code="440"))
        await delivery.sent()
        assert script.asked_nothing()


async def test_close_in_the_middle_is_a_cancellation(tmp_path: Path) -> None:
    """Row 19: not all blocks were out."""
    async with open_script(tmp_path, PIDGIN, direct=False) as script:
        delivery = script.send(pattern(50_000))
        await script.result(await script.asked(si.SI), INBAND)
        await script.result(await script.asked(ibb.OPEN))
        request = await script.asked(ibb.DATA)
        answer = await script.ask(close_inband(payload(request).get("sid", "")), "own")
        assert answer.get("type") == "result"
        await script.result(request)
        with pytest.raises(BytestreamError, match="closed the in-band bytestream before"):
            await delivery.sent()


async def test_silence_after_an_offer_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 14: what it does not like it does not answer."""
    monkeypatch.setattr(sender, "ANSWER_TIMEOUT", 0.05)
    async with open_script(tmp_path, PIDGIN) as script:
        delivery = script.send(b"content")
        await script.asked(si.SI)
        with pytest.raises(OfflineError, match="gave no answer"):
            await delivery.sent()


@pytest.mark.parametrize("way", [si.BYTESTREAMS, si.IBB])
async def test_silence_in_the_middle_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Row 14: an opening that is not answered in-band is given up as well."""
    monkeypatch.setattr(inband, "OPEN_TIMEOUT", 0.05)
    monkeypatch.setattr(sender, "SAME_SID_TIMEOUT", 0.05)
    async with open_script(tmp_path, PIDGIN) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), accepted(way))
        if way == si.BYTESTREAMS:
            await script.refuse(await script.asked(s5b.TAG), error("item-not-found"))
        await script.asked(ibb.OPEN)
        if way == si.BYTESTREAMS:
            await script.result(await script.asked(si.SI), INBAND)
            await script.asked(ibb.OPEN)
        with pytest.raises(OfflineError, match="gave no answer"):
            await delivery.sent()


async def test_data_comes_right_behind_the_activation(tmp_path: Path) -> None:
    """Row 10: by a proxy, before its answer; nothing of it is lost here."""
    data = pattern(100_000)
    async with open_script(tmp_path, PIDGIN) as script, script.host() as host:
        await script.ask(OFFER.format(size=len(data)), "a")
        await script.say(query(SID, (str(PROXY), "127.0.0.1", host.port)), "b")
        stream = await host.accept(behind=data[:1_000])
        assert payload(await script.answer_to("b"))[0].get("jid") == str(PROXY)
        async with stream:
            await stream.send_all(data[1_000:])
        assert await script.settled() == {"photo.jpg": data}


async def test_stream_of_ours_ends_right_behind_the_last_byte(tmp_path: Path) -> None:
    """Row 22."""
    async with open_script(tmp_path, PIDGIN) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ANSWER)
        opening = await script.asked(s5b.TAG)
        stream = await script.join(opening)
        await script.result(opening, used(US))
        assert await to_end(stream) == b"content"
        await delivery.sent()
