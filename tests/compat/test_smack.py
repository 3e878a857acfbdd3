"""Smack (Spark, Openfire's own client, most Android apps): up to 4.3, and since 4.4.

As a receiver it gives a sender 5 seconds, asks nobody before it prefers SOCKS5, and after a
failure takes no other way. As a sender it names its own address and every proxy, and compares
what a streamhost replies with what it asked for. Its parsers throw, and then the stanza was
never there.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING
from xml.etree.ElementTree import fromstring

import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.errors import DeclinedError, TransferError
from syncd.transfer import si
from tests.support.scripted import (
    GREETED,
    GREETING,
    PROXY,
    US,
    block,
    close_inband,
    connect_reply,
    connect_request,
    error,
    exactly,
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

ROWS = {1, 2, 3, 4, 5, 6, 11, 13, 20, 22, 23}

SPARK = "android@192.168.1.113/Spark 2.6.3"
SMACK = "android@example.org/Smack"

# Closing then sends a reset, as the kernel of a process that was killed does.
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

# StreamInitiation, with the attributes and in the order in which Smack writes them.
OFFER = (
    f"<si xmlns='{si.NS_SI}' id='jsi_7462095271' mime-type='image/png' profile='{si.NS_FILE}'>"
    f"<file xmlns='{si.NS_FILE}' name='img0545.png'{{size}}><desc>You won&apos;t believe this!"
    "</desc></file>"
    f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field var='stream-method' type='list-single'>"
    f"<option><value>{si.BYTESTREAMS}</value></option>"
    f"<option><value>{si.IBB}</value></option></field></x></feature></si>"
)
SID = "jsi_7462095271"

# What was recorded between XIFF, Openfire and Spark 2.6.3: two values, and white space.
TWO_VALUES = f"""
    <si xmlns="{si.NS_SI}">
        <feature xmlns="{si.NS_FEATURE}">
            <x xmlns="{si.NS_DATA}" type="submit">
                <field var="stream-method">
                     <value>{si.BYTESTREAMS}</value>
                     <value>{si.IBB}</value>
                </field>
             </x>
        </feature>
     </si>
"""
# Since 4.4.
ONE_VALUE = (
    f"<si xmlns='{si.NS_SI}'><feature xmlns='{si.NS_FEATURE}'>"
    f"<x xmlns='{si.NS_DATA}' type='submit'>"
    f"<field var='stream-method' type='list-single'><value>{si.BYTESTREAMS}</value></field>"
    "</x></feature></si>"
)
ONLY_INBAND = ONE_VALUE.replace(si.BYTESTREAMS, si.IBB)


def offer(size: int | None) -> str:
    return OFFER.format(size="" if size is None else f" size='{size}'")


# Smack sends


async def test_result_is_what_its_parser_takes_to_the_byte(tmp_path: Path) -> None:
    """Rows 1 and 2: no <file/>, one value in a field that says that it is a choice."""
    async with open_script(tmp_path, SMACK) as script:
        await script.ask(offer(7), "iq_13")
        assert script.heard().endswith(
            f"<iq type='result' id='iq_13' to='{SMACK}'><si xmlns='{si.NS_SI}'>"
            f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='submit'>"
            "<field var='stream-method' type='list-single'>"
            f"<value>{si.BYTESTREAMS}</value></field></x></feature></si></iq>"
        )


async def test_own_host_first_and_the_end_of_the_file_is_the_end_of_the_stream(
    tmp_path: Path,
) -> None:
    """Row 22: it closes behind the last byte."""
    data = pattern(300_000)
    async with open_script(tmp_path, SMACK) as script, script.host() as host:
        await script.ask(offer(len(data)), "a")
        hosts = (SMACK, "127.0.0.1", host.port), (str(PROXY), "127.0.0.1", 9)
        await script.say(query(SID, *hosts, attributes=" mode='tcp'"), "b")
        stream = await host.accept(address=sha1(SID, SMACK, US))
        answer = payload(await script.answer_to("b"))
        assert [child.attrib for child in answer] == [{"jid": SMACK}]
        async with stream:
            await stream.send_all(data)
        assert await script.settled() == {"img0545.png": data}


async def test_file_without_a_size_is_empty_and_comes_by_a_stream_without_bytes(
    tmp_path: Path,
) -> None:
    """Rows 4 and 20: a size of 0 is left out; the stream is opened and closed."""
    async with open_script(tmp_path, SMACK) as script, script.host() as host:
        assert (await script.ask(offer(None), "a")).get("type") == "result"
        await script.say(query(SID, (SMACK, "127.0.0.1", host.port)), "b")
        stream = await host.accept()
        await script.answer_to("b")
        await stream.aclose()
        assert await script.settled() == {"img0545.png": b""}


async def test_file_without_a_size_may_have_bytes_all_the_same(tmp_path: Path) -> None:
    """Row 4: unknown is not empty; received until the stream ends as it should."""
    async with open_script(tmp_path, SMACK) as script, script.host() as host:
        await script.ask(offer(None), "a")
        await script.say(query(SID, (SMACK, "127.0.0.1", host.port)), "b")
        stream = await host.accept()
        await script.answer_to("b")
        async with stream:
            await stream.send_all(b"content")
        assert await script.settled() == {"img0545.png": b"content"}


async def test_reset_of_a_stream_without_a_size_is_no_end(tmp_path: Path) -> None:
    """Row 4: the sender died; nobody can say that this was all."""
    async with open_script(tmp_path, SMACK) as script, script.host() as host:
        await script.ask(offer(None), "a")
        await script.say(query(SID, (SMACK, "127.0.0.1", host.port)), "b")
        stream = await host.accept()
        await script.answer_to("b")
        await stream.send_all(b"content")
        await trio.testing.wait_all_tasks_blocked(0.05)
        stream.setsockopt(*RESET)
        await stream.aclose()
        assert (await script.settled(), script.kept()) == ({}, [])


@pytest.mark.parametrize("size", [b"-5", b"99999999999999999999"])
async def test_size_that_no_file_has_is_refused(tmp_path: Path, size: bytes) -> None:
    """Row 4: negative or huge."""
    async with open_script(tmp_path, SMACK) as script:
        answer = await script.ask(OFFER.format(size=f" size='{size.decode()}'"), "a")
        assert answer.get("type") == "error"
        assert script.incoming == []


@pytest.mark.parametrize("cut", [False, True])
async def test_in_band_the_close_is_the_end_and_nothing_else(tmp_path: Path, cut: bool) -> None:
    """Row 4: without a size, a stream that fails in the middle is not taken for the file."""
    async with open_script(tmp_path, SMACK) as script:
        await script.ask(offer(None).replace(si.BYTESTREAMS, "urn:other"), "a")
        await script.ask(open_inband(SID), "b")
        await script.ask(block(SID, 0, b"con"), "c")
        if cut:
            broken = await script.ask(block(SID, 2, b"nt"), "d")  # 1 is missing
            assert broken.get("type") == "error"
            await script.result(await script.asked(ibb.CLOSE))
        else:
            await script.ask(block(SID, 1, b"tent"), "d")
            await script.ask(close_inband(SID), "e")
        expected = {} if cut else {"img0545.png": b"content"}
        assert await script.settled() == expected


@pytest.mark.parametrize("refused", [False, True])
async def test_either_way_may_be_opened_whatever_was_chosen(
    tmp_path: Path, refused: bool
) -> None:
    """Rows 3 and 13: up to 4.3, and most others, open in-band though SOCKS5 was chosen."""
    async with open_script(tmp_path, SPARK) as script:
        await script.ask(offer(7), "a")
        if refused:
            answer = await script.ask(query(SID, (SPARK, "127.0.0.1", 9)), "b")
            assert answer.get("type") == "error"
        assert (await script.ask(open_inband(SID), "c")).get("type") == "result"
        await script.ask(block(SID, 0, b"content"), "d")
        await script.ask(close_inband(SID), "e")
        assert await script.settled() == {"img0545.png": b"content"}


# Smack receives


async def test_recorded_answer_with_two_values_means_what_we_offered_first(
    tmp_path: Path,
) -> None:
    """Row 3: Smack <= 4.3, with all the white space of the recording."""
    data = pattern(300_000)
    async with open_script(tmp_path, SPARK) as script:
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), TWO_VALUES)
        opening = await script.asked(s5b.TAG)
        stream = await script.join(opening)
        await script.result(opening, used(US, payload(opening).get("sid", "")))
        assert await to_end(stream) == data
        assert not (await delivery.sent()).confirmed


async def test_answer_with_two_values_takes_the_other_way_on_the_same_sid(
    tmp_path: Path,
) -> None:
    """Row 13: who said that it takes either does, once it has refused the first."""
    async with open_script(tmp_path, SPARK) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), TWO_VALUES)
        opening = await script.asked(s5b.TAG)
        await script.refuse(opening, error("item-not-found", code="404"))
        opened = await script.asked(ibb.OPEN)
        assert payload(opened).get("sid") == payload(opening).get("sid")
        assert await script.take_blocks(opened) == b"content"
        await delivery.sent()


async def test_since_4_4_a_failed_socks5_needs_a_new_offer(tmp_path: Path) -> None:
    """Row 13: it answers an in-band opening on the same sid with not-acceptable."""
    async with open_script(tmp_path, SMACK) as script:
        delivery = script.send(b"content")
        first = await script.asked(si.SI)
        await script.result(first, ONE_VALUE)
        await script.refuse(await script.asked(s5b.TAG), error("item-not-found"))
        await script.refuse(await script.asked(ibb.OPEN), error("not-acceptable"))
        second = await script.asked(si.SI)
        assert payload(second).get("id") != payload(first).get("id")
        values = [value.text for value in payload(second).iter(si.VALUE)]
        assert values == [si.IBB]
        await script.result(second, ONLY_INBAND)
        opened = await script.asked(ibb.OPEN)
        assert payload(opened).get("sid") == payload(second).get("id")
        assert await script.take_blocks(opened) == b"content"
        await delivery.sent()


async def test_bytestream_is_the_next_thing_that_it_hears(tmp_path: Path) -> None:
    """Row 11: it waits for 5 s; nobody is asked for anything between answer and opening."""
    async with open_script(tmp_path, SMACK) as script:
        proxy = await script.offer_proxy()
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ONE_VALUE)
        heard = len(script.server.heard)
        opening = await script.asked(s5b.TAG)
        said = fromstring(
            b"<all xmlns='jabber:client'>" + script.server.heard[heard:] + b"</all>"
        )
        assert [payload(stanza).tag for stanza in said] == [s5b.TAG]
        assert [host.get("jid") for host in payload(opening)] == [US, str(proxy.jid)]
        stream = await script.join(opening)
        await script.result(opening, used(US))
        assert await to_end(stream) == b"content"
        await delivery.sent()


async def test_reply_of_our_listener_is_its_request_but_for_the_status(tmp_path: Path) -> None:
    """Rows 5 and 6: compared byte for byte; in two segments, and no data behind."""
    async with open_script(tmp_path, SMACK) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ONE_VALUE)
        opening = await script.asked(s5b.TAG)
        host = payload(opening)[0]
        async with await trio.open_tcp_stream("127.0.0.1", int(host.get("port", ""))) as stream:
            await stream.send_all(GREETING)
            assert bytes(await stream.receive_some(65_536)) == GREETED
            request = connect_request(sha1(payload(opening).get("sid", ""), US, SMACK))
            await stream.send_all(request)
            assert bytes(await stream.receive_some(65_536)) == connect_reply(request)
            # Nothing may follow before it has said that it is connected.
            await trio.testing.wait_all_tasks_blocked(0.05)
            with trio.move_on_after(0.05) as quiet:
                await stream.receive_some(1)
            assert quiet.cancelled_caught
            await script.result(opening, used(US))
            assert await exactly(stream, 7) == b"content"
        await delivery.sent()


async def test_empty_file_goes_in_band(tmp_path: Path) -> None:
    """Row 20: over SOCKS5 it makes a byte 0xFF of the end of the stream."""
    async with open_script(tmp_path, SMACK) as script:
        delivery = script.send(b"")
        offered = await script.asked(si.SI)
        file = payload(offered)[0]
        assert (file.tag, file.get("size")) == (si.FILE, "0")  # Openfire wants it said
        assert [value.text for value in payload(offered).iter(si.VALUE)] == [si.IBB]
        await script.result(offered, ONLY_INBAND)
        assert await script.take_blocks(await script.asked(ibb.OPEN)) == b""
        await delivery.sent()


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (error("forbidden", "auth", code="403"), DeclinedError),
        (error("", "", code="403"), DeclinedError),
        (error("bad-request", "modify"), TransferError),
    ],
)
async def test_refusal_is_understood(
    tmp_path: Path, problem: str, expected: type[TransferError]
) -> None:
    """Row 23: forbidden is a no of the user's; nothing in common is a bad-request."""
    async with open_script(tmp_path, SMACK) as script:
        delivery = script.send(b"content")
        await script.refuse(await script.asked(si.SI), problem)
        with pytest.raises(expected):
            await delivery.sent()
        assert script.asked_nothing()
