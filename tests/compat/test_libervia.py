"""Libervia up to 0.8: the range at the wrong place, an empty <file/>, and 65535 numbers.

It tries all streamhosts, 200 ms apart, and reads exact lengths. Numbers of in-band blocks
begin again one too early.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import ibb, s5b
from syncd.transfer import si
from syncd.xmpp.jid import JID
from tests.support.scripted import (
    US,
    accepted,
    block,
    close_inband,
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

ROWS = {1, 8, 16, 18}

LIBERVIA = "goffi@example.org/libervia"
SID = "5c1b7b1e-3f3a-4a8e-b1a4-1d4b6a2f0c11"

# The range is beside the file, not in it.
OFFER = (
    f"<si xmlns='{si.NS_SI}' id='{SID}' mime-type='image/jpeg' profile='{si.NS_FILE}'>"
    f"<file xmlns='{si.NS_FILE}' name='a' size='{{size}}'/><range/>"
    f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field var='stream-method' type='list-single'>"
    f"<option><value>{si.BYTESTREAMS}</value></option>"
    f"<option><value>{si.IBB}</value></option></field></x></feature></si>"
)
ANSWER = accepted(si.BYTESTREAMS, behind=f"<file xmlns='{si.NS_FILE}'/>")
INBAND = ANSWER.replace(si.BYTESTREAMS, si.IBB)


async def test_no_part_is_asked_for_as_none_was_offered(tmp_path: Path) -> None:
    """Row 1: a range that is not 0 is not implemented there."""
    data = pattern(400_000)
    async with open_script(tmp_path, LIBERVIA) as script:
        for end, expected in ((300_000, {}), (len(data), {"a": data})):
            result = payload(await script.ask(OFFER.format(size=len(data)), f"a{end}"))
            assert [child.tag for child in result] == [si.FEATURE]
            async with script.host() as host:
                await script.say(query(SID, (LIBERVIA, "127.0.0.1", host.port)), f"b{end}")
                stream = await host.accept(address=sha1(SID, LIBERVIA, US))
                await script.answer_to(f"b{end}")
                async with stream:
                    await stream.send_all(data[:end])
            assert await script.settled() == expected


@pytest.mark.parametrize(
    ("numbers", "good"),
    [
        ([65_533, 65_534, 0, 1], True),
        ([65_533, 65_534, 65_535, 0], True),
        ([65_533, 0], False),
        ([65_533, 65_534, 1], False),
    ],
    ids=["Libervia", "by the book", "too early", "a gap"],
)
async def test_numbers_begin_again_one_too_early(
    tmp_path: Path, numbers: list[int], good: bool
) -> None:
    """Row 18."""
    async with open_script(tmp_path, LIBERVIA) as script:
        await script.ask(OFFER.format(size=len(numbers)), "a")
        await script.ask(open_inband(SID), "b")
        # As if 65533 blocks had come, which would take a while.
        machine = script._inband._slots[JID.parse(LIBERVIA), SID]._machine
        machine._seq = numbers[0]
        answers = [
            (await script.ask(block(SID, number, b"%d" % index), f"c{index}")).get("type")
            for index, number in enumerate(numbers)
        ]
        if good:
            assert answers == ["result"] * len(numbers)
            await script.ask(close_inband(SID), "d")
            assert await script.settled() == {"a": b"0123"}
        else:
            assert answers[-1] == "error"
            await script.result(await script.asked(ibb.CLOSE))
            assert await script.settled() == {}


async def test_empty_file_in_the_answer_asks_for_all(tmp_path: Path) -> None:
    """Row 1, the other way round; row 8: it connects everywhere, 200 ms apart."""
    data = pattern(100_000)
    async with open_script(tmp_path, LIBERVIA) as script:
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), ANSWER)
        opening = await script.asked(s5b.TAG)
        first, late = [await script.join(opening) for _ in range(2)]
        await late.aclose()
        await trio.testing.wait_all_tasks_blocked(0.02)
        await script.result(opening, used(US))
        assert await to_end(first) == data
        await delivery.sent()


async def test_blocks_of_ours_wait_for_each_other(tmp_path: Path) -> None:
    """Row 16: a window of one to who is no syncd, and the numbers by the book."""
    data = pattern(9_000)
    async with open_script(tmp_path, LIBERVIA, direct=False) as script:
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), INBAND)
        await script.result(await script.asked(ibb.OPEN))
        for number in range(3):
            request = await script.asked(ibb.DATA)
            assert payload(request).get("seq") == str(number)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert script.asked_nothing()
            await script.result(request)
        await script.result(await script.asked(ibb.CLOSE))
        await delivery.sent()
