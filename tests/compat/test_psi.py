"""Psi and Kopete, by iris: range both ways, fast mode, and refusals under another id.

It connects to all of the first five streamhosts at once. In fast mode it sends an opening of
its own for the transfer that it receives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import s5b
from syncd.errors import DeclinedError, OpeningError
from syncd.transfer import si
from tests.support.scripted import (
    PROXY,
    US,
    accepted,
    error,
    exactly,
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

    from tests.support.scripted import Script

ROWS = {1, 5, 8, 10, 12, 21, 23, 24, 28, 30}

PSI = "jan@example.org/Psi"
SID = "ft_0001"
FAST = "<fast xmlns='http://affinix.com/jabber/stream'/>"

OFFER = (
    f"<si xmlns='{si.NS_SI}' id='{SID}' profile='{si.NS_FILE}'>"
    f"<file xmlns='{si.NS_FILE}' name='{{name}}' size='{{size}}'><range/>"
    "<thumbnail xmlns='urn:xmpp:thumbs:0' cid='sha1+1@bob.xmpp.org' media-type='image/png'/>"
    f"</file><feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field type='list-single' var='stream-method'>"
    f"<option><value>{si.BYTESTREAMS}</value></option></field></x></feature></si>"
)


def answer(span: str = "") -> str:
    file = f"<file xmlns='{si.NS_FILE}'>{span}</file>" if span else ""
    return accepted(si.BYTESTREAMS, field=" type='list-single'", file=file)


async def begun(script: Script, name: str, size: int, ident: str) -> int:
    """Let Psi offer a file; where we want it to begin."""
    result = payload(await script.ask(OFFER.format(name=name, size=size), ident))
    span = result.find(f"{si.FILE}/{si.RANGE}")
    return 0 if span is None else int(span.get("offset", ""))


async def sends(script: Script, data: bytes, ident: str) -> None:
    """Let Psi open the stream, send this, and hang up."""
    async with script.host() as host:
        await script.say(query(SID, (PSI, "127.0.0.1", host.port), inside=FAST), ident)
        stream = await host.accept(address=sha1(SID, PSI, US))
        await script.answer_to(ident)
        async with stream:
            await stream.send_all(data)


# Psi sends


async def test_fast_mode_and_its_proxies_are_passed_over(tmp_path: Path) -> None:
    """Rows 1, 10 and 30: without an offset there is no <file/>, though a range was offered."""
    async with open_script(tmp_path, PSI) as script:
        result = payload(await script.ask(OFFER.format(name="a", size=7), "a"))
        assert [child.tag for child in result] == [si.FEATURE]
        await sends(script, b"content", "b")
        assert await script.settled() == {"a": b"content"}


async def test_file_goes_on_where_it_was_cut_also_after_a_restart_of_ours(
    tmp_path: Path,
) -> None:
    """Row 21: asked for an offset and no length; what comes twice is compared."""
    data = pattern(1_000_000)
    async with open_script(tmp_path, PSI) as script:
        assert await begun(script, "a", len(data), "a1") == 0
        await sends(script, data[:700_000], "a2")
        assert await script.settled() == {}
        assert script.kept() == [data[:700_000]]
        await script.restart()
        result = payload(await script.ask(OFFER.format(name="a", size=len(data)), "b1"))
        assert [child.tag for child in result] == [si.FEATURE, si.FILE]
        [span] = result[1]
        assert span.attrib == {"offset": str(700_000 - 65_536)}
        await sends(script, data[700_000 - 65_536 :], "b2")
        assert await script.settled() == {"a": data}
        assert script.kept() == []


async def test_sids_come_again(tmp_path: Path) -> None:
    """Row 28: 16 bits, counted anew by each start; only two at a time are one too many."""
    async with open_script(tmp_path, PSI) as script:
        await begun(script, "a", 7, "a1")
        twice = await script.ask(OFFER.format(name="b", size=7), "a2")
        assert refusal(twice) == ("modify", "not-acceptable")
        await sends(script, b"content", "a3")
        await script.settled()
        await begun(script, "b", 7, "b1")
        await sends(script, b"another", "b2")
        assert await script.settled() == {"a": b"content", "b": b"another"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [("ABCDEF0123" * 4, b"ABCDEF0123" * 4), ("not a hash", sha1(SID, PSI, US))],
)
async def test_address_that_it_names_is_said_to_the_letter(
    tmp_path: Path, given: str, expected: bytes
) -> None:
    """Row 30: dstaddr, if it is one."""
    async with open_script(tmp_path, PSI) as script, script.host() as host:
        await begun(script, "a", 7, "a")
        opening = query(
            SID, (PSI, "127.0.0.1", host.port), attributes=f" dstaddr='{given}'", inside=FAST
        )
        await script.say(opening, "b")
        stream = await host.accept(address=expected)
        await script.answer_to("b")
        async with stream:
            await stream.send_all(b"content")
        assert await script.settled() == {"a": b"content"}


# Psi receives


async def test_opening_of_its_own_for_our_file_is_refused_and_ours_goes_on(
    tmp_path: Path,
) -> None:
    """Row 30: without that it waits; refused, it goes on as without fast mode."""
    async with open_script(tmp_path, PSI) as script:
        delivery = script.send(b"content")
        offered = await script.asked(si.SI)
        await script.result(offered, answer())
        opening = await script.asked(s5b.TAG)
        sid = payload(opening).get("sid", "")
        fast = await script.ask(query(sid, (PSI, "127.0.0.1", 9), inside=FAST), "fast")
        assert refusal(fast) == ("modify", "not-acceptable")
        stream = await script.join(opening)
        await script.result(opening, used(US, sid))
        assert await to_end(stream) == b"content"  # and no \r before it
        await delivery.sent()


async def test_several_handshakes_at_once_leave_the_one_that_stays(tmp_path: Path) -> None:
    """Rows 8 and 12: to all that it was offered, and that is not more than five."""
    async with open_script(tmp_path, PSI) as script:
        await script.offer_proxy()
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), answer())
        opening = await script.asked(s5b.TAG)
        assert len(payload(opening)) <= 5
        streams: list[trio.SocketStream] = []

        async def join() -> None:
            streams.append(await script.join(opening))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(join)
        kept = streams.pop(1)
        for each in streams:
            await each.aclose()
        await trio.testing.wait_all_tasks_blocked(0.02)
        await script.result(opening, used(US, payload(opening).get("sid", "")))
        assert await to_end(kept) == b"content"
        await delivery.sent()


@pytest.mark.parametrize(
    ("span", "start", "end"),
    [
        ("<range offset='250000'/>", 250_000, 300_000),
        ("<range offset='250000' length='50000'/>", 250_000, 300_000),
        ("<range offset='1000' length='2000'/>", 1_000, 3_000),
        ("<range length='2000'/>", 0, 2_000),
        ("<range/>", 0, 300_000),
    ],
)
async def test_part_that_it_asks_for_is_what_it_gets(
    tmp_path: Path, span: str, start: int, end: int
) -> None:
    """Row 21: Kopete goes on with both offset and length."""
    data = pattern(300_000)
    async with open_script(tmp_path, PSI) as script:
        delivery = script.send(data)
        offered = await script.asked(si.SI)
        assert payload(offered)[0].find(si.RANGE) is not None
        await script.result(offered, answer(span))
        opening = await script.asked(s5b.TAG)
        stream = await script.join(opening)
        await script.result(opening, used(US))
        assert await to_end(stream) == data[start:end]
        await delivery.sent()


async def test_refusal_may_have_the_id_of_the_offer(tmp_path: Path) -> None:
    """Row 24: the iq's id is the transfer's."""
    async with open_script(tmp_path, PSI) as script:
        delivery = script.send(b"content")
        offered = await script.asked(si.SI)
        sid = payload(offered).get("id", "")
        assert offered.get("id") != sid
        await script.refuse(offered, error("bad-request", "modify"), ident=sid)
        with pytest.raises(Exception, match="bad-request"):
            await delivery.sent()


@pytest.mark.parametrize("sender", ["jan@example.org/Other", "jan@example.org", "example.org"])
@pytest.mark.parametrize("kind", ["error", "result"])
async def test_nobody_else_and_no_result_ends_an_offer_under_its_id(
    tmp_path: Path, sender: str, kind: str
) -> None:
    """Row 24: only an error, and only of who was asked."""
    async with open_script(tmp_path, PSI) as script:
        delivery = script.send(b"content")
        offered = await script.asked(si.SI)
        sid = payload(offered).get("id", "")
        inside = error("forbidden") if kind == "error" else answer()
        await script.say(inside, sid, kind, sender)
        await script.say(answer(), sid, "result")
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert script.asked_nothing()
        await script.refuse(offered, error("forbidden", "auth", code="403"))
        with pytest.raises(DeclinedError):
            await delivery.sent()


@pytest.mark.parametrize("condition", ["forbidden", "not-acceptable"])
async def test_no_is_a_no(tmp_path: Path, condition: str) -> None:
    """Row 23: declined, or no stream type of ours that it can do."""
    async with open_script(tmp_path, PSI) as script:
        delivery = script.send(b"content")
        said = error(condition, inside="<text>Declined</text>", code="403")
        await script.refuse(await script.asked(si.SI), said)
        with pytest.raises(DeclinedError):
            await delivery.sent()


async def test_who_cannot_connect_names_a_server(tmp_path: Path) -> None:
    """Row 23: remote-server-not-found is about our streamhosts."""
    async with open_script(tmp_path, PSI, inband=False) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), answer())
        said = error("remote-server-not-found", code="404")
        await script.refuse(await script.asked(s5b.TAG), said)
        with pytest.raises(OpeningError, match="cannot connect to us at"):
            await delivery.sent()


async def test_bytes_of_a_handshake_come_in_any_pieces(tmp_path: Path) -> None:
    """Row 5: ours as a listener."""
    async with open_script(tmp_path, PSI) as script:
        await script.offer_proxy(PROXY)
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), answer())
        opening = await script.asked(s5b.TAG)
        host = payload(opening)[0]
        stream = await trio.open_tcp_stream(host.get("host", ""), int(host.get("port", "")))
        address = sha1(payload(opening).get("sid", ""), US, PSI)
        said = b"\x05\x02\x00\x02" + b"\x05\x01\x00\x03\x28" + address + b"\x00\x00"
        for byte in said:
            await stream.send_all(bytes([byte]))
        assert await exactly(stream, 2 + 47) == b"\x05\x00\x05\x00" + said[6:]
        await script.result(opening, used(US))
        assert await to_end(stream) == b"content"
        await delivery.sent()
