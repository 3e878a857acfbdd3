"""Gajim up to 1.1: range over SOCKS5 only, base64 in lines, refusals under an id of its own.

It opens all connections at once and keeps the first. In-band it sends all of a file, wherever
it was asked to begin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.errors import DeclinedError
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
    sha1,
    to_end,
    used,
)
from tests.support.tcp import pattern

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.scripted import Script

ROWS = {1, 2, 8, 15, 17, 21, 22, 23, 24}

GAJIM = "asterix@example.org/Gajim"

# The iq's id is the transfer's as well.
OFFER = (
    f"<si xmlns='{si.NS_SI}' profile='{si.NS_FILE}' id='{{sid}}'>"
    f"<file xmlns='{si.NS_FILE}' name='a' size='{{size}}'><desc/><range/></file>"
    f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field var='stream-method' type='list-single'>"
    f"<option><value>{{first}}</value></option>"
    f"<option><value>{si.IBB}</value></option></field></x></feature></si>"
)
ANSWER = accepted(si.BYTESTREAMS, field=" type='list-single'")

# Enough to be worth to go on from, and the overlap in the middle.
DATA = pattern(400_000)
HAD = 300_000
START = HAD - 65_536
WAYS = ["socks5", "ibb"]


async def offers(script: Script, sid: str, size: int, way: str) -> int:
    """Let Gajim offer; where we want it to begin."""
    first = si.BYTESTREAMS if way == "socks5" else "urn:other"
    result = payload(await script.ask(OFFER.format(sid=sid, size=size, first=first), sid))
    span = result.find(f"{si.FILE}/{si.RANGE}")
    return 0 if span is None else int(span.get("offset", ""))


async def sends(script: Script, sid: str, data: bytes, way: str) -> None:
    """Let Gajim open a stream, send this and hang up, as far as we let it."""
    if way == "ibb":
        await script.ask(open_inband(sid), f"open {sid}")
        for number, each in enumerate(blocks(sid, data, lines=True)):
            answer = await script.ask(each, f"{number} {sid}")
            if answer.get("type") == "error":
                break
        await script.say(close_inband(sid), f"close {sid}")
        return
    async with script.host() as host:
        await script.say(query(sid, (GAJIM, "127.0.0.1", host.port)), f"id_{sid}")
        stream = await host.accept(address=sha1(sid, GAJIM, US))
        await script.answer_to(f"id_{sid}")
        async with stream:
            try:
                await stream.send_all(data)
            except trio.BrokenResourceError:
                return


async def interrupted(script: Script, way: str) -> None:
    """Three quarters have come, in an earlier life of ours."""
    await offers(script, "s1", len(DATA), way)
    await sends(script, "s1", DATA[:HAD], way)
    assert await script.settled() == {}
    assert script.kept() == [DATA[:HAD]]
    await script.restart()


# Gajim sends


@pytest.mark.parametrize("way", WAYS)
async def test_part_that_was_asked_for_completes_the_file(tmp_path: Path, way: str) -> None:
    """Row 21: over SOCKS5 it begins where it is asked to, after a restart of ours as well."""
    async with open_script(tmp_path, GAJIM) as script:
        await interrupted(script, way)
        assert await offers(script, "s2", len(DATA), way) == START
        await sends(script, "s2", DATA[START:], way)
        assert await script.settled() == {"a": DATA}
        assert (script.kept(), script.kept("bad")) == ([], [])


@pytest.mark.parametrize("way", WAYS)
async def test_whole_file_in_place_of_a_part_is_noticed_and_taken(
    tmp_path: Path, way: str
) -> None:
    """Row 21: in-band it ignores where to begin; the bytes of the beginning tell."""
    async with open_script(tmp_path, GAJIM) as script:
        await interrupted(script, way)
        assert await offers(script, "s2", len(DATA), way) == START
        await sends(script, "s2", DATA, way)
        assert await script.settled() == {"a": DATA}
        assert (script.kept(), script.kept("bad")) == ([], [])


@pytest.mark.parametrize("way", WAYS)
async def test_another_file_of_the_same_name_and_size_is_noticed(
    tmp_path: Path, way: str
) -> None:
    """Row 21: what was there is void, and the next offer brings all of it."""
    other = bytes(each ^ 0xFF for each in DATA)
    async with open_script(tmp_path, GAJIM) as script:
        await interrupted(script, way)
        assert await offers(script, "s2", len(other), way) == START
        with trio.fail_after(10):
            await sends(script, "s2", other[START:], way)
        if way == "ibb":
            await script.result(await script.asked(ibb.CLOSE))
        assert (await script.settled(), script.kept()) == ({}, [])
        assert await offers(script, "s3", len(other), way) == 0
        await sends(script, "s3", other, way)
        assert await script.settled() == {"a": other}


async def test_whole_file_whose_overlap_looks_like_its_beginning_is_noticed_at_its_end(
    tmp_path: Path,
) -> None:
    """Rows 21 and 22: as of nothing but zeros; then it is asked for all of it."""
    data = bytes(len(DATA))
    async with open_script(tmp_path, GAJIM) as script:
        await offers(script, "s1", len(data), "socks5")
        await sends(script, "s1", data[:HAD], "socks5")
        await script.settled()
        assert await offers(script, "s2", len(data), "socks5") == START
        await sends(script, "s2", data, "socks5")
        assert await script.settled() == {}
        assert await offers(script, "s3", len(data), "socks5") == 0
        await sends(script, "s3", data, "socks5")
        assert await script.settled() == {"a": data}


async def test_what_comes_beyond_the_part_in_band_is_too_much(tmp_path: Path) -> None:
    """Row 22: there as well, once it is clear that it began where it was asked to."""
    async with open_script(tmp_path, GAJIM) as script:
        await interrupted(script, "ibb")
        await offers(script, "s2", len(DATA), "ibb")
        await sends(script, "s2", DATA[START:] + b"!" * 5_000, "ibb")
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert await script.settled() == {}
        assert (script.kept(), script.kept("bad")) == ([], [DATA])


async def test_part_that_is_complete_in_band_needs_no_close(tmp_path: Path) -> None:
    """Row 21: nor does it get one of ours, as if something were missing."""
    async with open_script(tmp_path, GAJIM) as script:
        await interrupted(script, "ibb")
        await offers(script, "s2", len(DATA), "ibb")
        await script.ask(open_inband("s2"), "open")
        for number, each in enumerate(blocks("s2", DATA[START:], lines=True)):
            await script.ask(each, f"{number}")
        assert await script.settled() == {"a": DATA}
        await trio.testing.wait_all_tasks_blocked()
        assert script.asked_nothing()
        assert (await script.ask(close_inband("s2"), "close")).get("type") == "result"


async def test_base64_in_lines_is_read(tmp_path: Path) -> None:
    """Rows 15 and 17."""
    async with open_script(tmp_path, GAJIM) as script:
        await offers(script, "s1", 20_000, "ibb")
        assert "\n" in blocks("s1", DATA[:20_000], lines=True)[0]
        await sends(script, "s1", DATA[:20_000], "ibb")
        assert await script.settled() == {"a": DATA[:20_000]}


# Gajim receives


async def test_first_connection_is_kept_and_the_others_are_closed(tmp_path: Path) -> None:
    """Row 8: the last handshake is not the one here."""
    async with open_script(tmp_path, GAJIM) as script:
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), ANSWER)
        opening = await script.asked(s5b.TAG)
        first, *others = [await script.join(opening) for _ in range(3)]
        for each in others:
            await each.aclose()
        await trio.testing.wait_all_tasks_blocked(0.02)
        await script.result(opening, used(US, payload(opening).get("sid", "")))
        assert await to_end(first) == b"content"
        await delivery.sent()


@pytest.mark.parametrize("way", [si.BYTESTREAMS, si.IBB])
async def test_range_stands_before_the_feature(tmp_path: Path, way: str) -> None:
    """Rows 1, 2 and 21: read by name."""
    async with open_script(tmp_path, GAJIM) as script:
        delivery = script.send(DATA)
        offered = await script.asked(si.SI)
        file = f"<file xmlns='{si.NS_FILE}'><range offset='{HAD}'/></file>"
        await script.result(offered, accepted(way, field=" type='list-single'", file=file))
        if way == si.IBB:
            came = await script.take_blocks(await script.asked(ibb.OPEN))
        else:
            opening = await script.asked(s5b.TAG)
            stream = await script.join(opening)
            await script.result(opening, used(US))
            came = await to_end(stream)
        assert came == DATA[HAD:]
        await delivery.sent()


@pytest.mark.parametrize("echo", [False, True])
async def test_refusal_may_have_an_id_of_its_own(tmp_path: Path, echo: bool) -> None:
    """Rows 23 and 24: what it is about is told by the condition, or by the offer in it."""
    async with open_script(tmp_path, GAJIM) as script:
        delivery = script.send(b"content")
        offered = await script.asked(si.SI)
        sid = payload(offered).get("id", "")
        if echo:
            inside = f"<si xmlns='{si.NS_SI}' id='{sid}'/>"
            await script.refuse(
                offered, error("forbidden", "cancel", code="403"), ident="91", inside=inside
            )
        else:
            app = f"<no-valid-streams xmlns='{si.NS_SI}'/>"
            said = error("bad-request", "cancel", code="400", inside=app)
            await script.refuse(offered, said, ident="91")
        with pytest.raises(DeclinedError):
            await delivery.sent()


async def test_refusal_of_nothing_that_we_asked_ends_nothing(tmp_path: Path) -> None:
    """Row 24: with two offers out, one that names neither could mean either."""
    async with open_script(tmp_path, GAJIM) as script:
        deliveries = [script.send(b"content", name=name) for name in ("a", "b")]
        offered = [await script.asked(si.SI) for _ in deliveries]
        app = f"<no-valid-streams xmlns='{si.NS_SI}'/>"
        await script.refuse(offered[0], error("bad-request", inside=app), ident="91")
        await script.refuse(offered[0], error("forbidden", code="403"), ident="92")
        await trio.testing.wait_all_tasks_blocked(0.02)
        for each in offered:
            await script.refuse(each, error("not-acceptable"))
        for delivery in deliveries:
            with pytest.raises(DeclinedError, match="not-acceptable"):
                await delivery.sent()
