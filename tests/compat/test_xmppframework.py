"""XMPPFramework (iOS): reads by position, does one transfer at a time, and has 5 seconds.

As a sender it names its own address first, and in-band blocks of 4096 characters. As a
receiver it looks at the first streamhost only, reads just as many bytes as were offered, and
in-band acknowledges neither the last block nor the close.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import ibb, inband, s5b
from syncd.config import load
from syncd.errors import OfflineError
from syncd.link import session
from syncd.transfer import sender, si
from syncd.wiring.links import Links
from syncd.wiring.status import Transfers
from syncd.xmpp.disco import INFO, NS_INFO, Identity, make_info
from syncd.xmpp.stanza import PRESENCE
from syncd.xmpp.xml import make
from tests.support.scripted import (
    PROXY,
    US,
    accepted,
    blocks,
    close_inband,
    exactly,
    open_inband,
    open_script,
    payload,
    query,
    refusal,
    used,
)
from tests.support.tcp import pattern

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.scripted import Script

ROWS = {1, 2, 6, 7, 12, 14, 15, 19, 20, 22, 25, 32}

IPHONE = "hanmeimei@test/ios"
SID = "2FBC1E1C-0F4B-4C6C-9C0B-5A2B8F6D8E17"

OFFER = (
    f"<si xmlns='{si.NS_SI}' id='{SID}' profile='{si.NS_FILE}'>"
    f"<file xmlns='{si.NS_FILE}' name='image.png' size='{{size}}'><desc>hello</desc></file>"
    f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field var='stream-method' type='list-single'>"
    f"<option><value>{si.BYTESTREAMS}</value></option>"
    f"<option><value>{si.IBB}</value></option></field></x></feature></si>"
)

CONFIG = """\
[account]
jid = "user@example.org/laptop"
password_file = "password"
[state]
dir = "state"
[control]
socket = "control.sock"
[transfer]
parallel = 4
[[peer]]
jid = "hanmeimei@test"
"""


@pytest.fixture
def links(tmp_path: Path) -> Links:
    """A daemon's, which never runs."""
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "config.toml").write_text(CONFIG)
    config = load(tmp_path / "config.toml", environ={"HOME": str(tmp_path)})
    return Links(config, "resource", Transfers())


# XMPPFramework sends


async def test_result_is_found_by_position(tmp_path: Path) -> None:
    """Rows 1 and 2: the method is the first child's first child's first child's text."""
    async with open_script(tmp_path, IPHONE) as script:
        result = payload(await script.ask(OFFER.format(size=7), "a"))
        feature = result[0]
        assert feature.tag == si.FEATURE
        field = feature[0][0]
        assert (field.tag, field[0].tag, field[0].text) == (si.FIELD, si.VALUE, si.BYTESTREAMS)
        assert [each.text for each in result.iter() if each.tag != si.VALUE] == [None] * 4


async def test_streamhosts_come_again_and_again_and_the_first_query_counts(
    tmp_path: Path,
) -> None:
    """Row 7: one for each proxy that answers; each gets one answer, and there is one stream."""
    async with open_script(tmp_path, IPHONE) as script, script.host() as host:
        await script.ask(OFFER.format(size=7), "a")
        opening = query(SID, (IPHONE, "127.0.0.1", host.port))
        for ident in ("b1", "b2", "b3"):
            await script.say(opening, ident)
        stream = await host.accept()
        assert payload(await script.answer_to("b1"))[0].get("jid") == IPHONE
        host.close()
        await stream.send_all(b"content")  # it does not hang up
        assert await script.settled() == {"image.png": b"content"}
        for ident in ("b2", "b3"):
            assert refusal(await script.answer_to(ident)) == ("wait", "item-not-found")
        await stream.aclose()


async def test_reply_has_its_own_address(tmp_path: Path) -> None:
    """Row 6: its IP as a name, and a port, where the request had the hash."""
    async with open_script(tmp_path, IPHONE) as script, script.host() as host:
        await script.ask(OFFER.format(size=7), "a")
        await script.say(query(SID, (IPHONE, "127.0.0.1", host.port)), "b")
        own = b"192.168.0.17"
        stream = await host.accept(lambda _: b"\x05\x00\x00\x03\x0c" + own + b"\x1e\x61")
        await script.answer_to("b")
        await stream.send_all(b"content")
        assert await script.settled() == {"image.png": b"content"}
        await stream.aclose()


async def test_host_0_0_0_0_is_passed_over(tmp_path: Path) -> None:
    """Row 12: TURNSocket's way to say: look it up by the JID. On our side that is us."""
    async with open_script(tmp_path, IPHONE) as script, script.host() as host:
        await script.ask(OFFER.format(size=7), "a")
        hosts = (str(PROXY), "0.0.0.0", host.port), (IPHONE, "127.0.0.1", host.port)
        await script.say(query(SID, *hosts), "b")
        stream = await host.accept()
        assert payload(await script.answer_to("b"))[0].get("jid") == IPHONE
        async with stream:
            await stream.send_all(b"content")
        assert await script.settled() == {"image.png": b"content"}


async def test_in_band_blocks_of_4096_characters_are_taken(tmp_path: Path) -> None:
    """Row 15: 3072 bytes each, whatever it said."""
    data = pattern(20_000)
    async with open_script(tmp_path, IPHONE) as script:
        await script.ask(OFFER.format(size=len(data)), "a")
        await script.ask(open_inband(SID), "b")
        for number, each in enumerate(blocks(SID, data, 3_072)):
            await script.ask(each, f"c{number}")
        await script.ask(close_inband(SID), "d")
        assert await script.settled() == {"image.png": data}


# XMPPFramework receives


async def test_offer_is_found_by_position(tmp_path: Path) -> None:
    """Row 2: <file/>, then <feature/>, and nothing between."""
    async with open_script(tmp_path, IPHONE) as script:
        delivery = script.send(b"content")
        offered = await script.asked(si.SI)
        offer = payload(offered)
        assert [child.tag for child in offer] == [si.FILE, si.FEATURE]
        assert (offer[0].get("name"), offer[0].get("size")) == ("photo.jpg", "7")
        field = offer[1][0][0]
        assert (field.get("var"), field.get("type")) == ("stream-method", "list-single")
        assert all(each.tail is None for each in offer.iter())
        await script.refuse(offered, "<error code='403' type='auth'/>")
        with pytest.raises(Exception, match="does not accept"):
            await delivery.sent()


async def test_first_streamhost_is_the_one_and_size_bytes_are_all(tmp_path: Path) -> None:
    """Rows 12 and 22: it reads as many bytes as were offered, and hangs up."""
    data = pattern(100_000)
    async with open_script(tmp_path, IPHONE) as script:
        await script.offer_proxy()
        delivery = script.send(data)
        await script.result(await script.asked(si.SI), accepted(si.BYTESTREAMS))
        opening = await script.asked(s5b.TAG)
        stream = await script.join(opening, 0)
        await script.result(opening, used(US, payload(opening).get("sid", "")))
        assert await exactly(stream, len(data)) == data
        await stream.aclose()
        assert not (await delivery.sent()).confirmed


async def take_but_never_acknowledge_the_end(script: Script) -> bytes:
    """Answers every block but the one with which all bytes are there, and no close.

    It counts three bytes for four characters, padding or not.
    """
    offered = await script.asked(si.SI)
    size, counted, data = int(payload(offered)[0].get("size", "")), 0, b""
    await script.result(offered, accepted(si.IBB))
    opened = await script.asked(ibb.OPEN)
    assert payload(opened).get("block-size") == "4095"
    await script.result(opened)
    while counted < size:
        request = await script.asked(ibb.DATA)
        text = payload(request).text or ""
        data += base64.b64decode(text, validate=True)
        counted += 3 * len(text) // 4
        if counted < size:
            await script.result(request)
    return data


@pytest.mark.parametrize("size", [1, 4_095, 4_096, 20_000])
async def test_last_block_and_close_are_never_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Rows 15 and 19: probably sent, as nobody can say more; and it has counted rightly."""
    monkeypatch.setattr(ibb, "LAST_ACK_TIMEOUT", 0.05)
    monkeypatch.setattr(inband, "CLOSE_TIMEOUT", 0.05)
    data = pattern(size)
    async with open_script(tmp_path, IPHONE, direct=False) as script:
        delivery = script.send(data)
        assert await take_but_never_acknowledge_the_end(script) == data
        await script.asked(ibb.CLOSE)
        assert not (await delivery.sent()).confirmed


async def test_empty_file_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 19 and 20: opened, closed, and nobody said anything to that."""
    monkeypatch.setattr(inband, "CLOSE_TIMEOUT", 0.05)
    async with open_script(tmp_path, IPHONE) as script:
        delivery = script.send(b"")
        assert await take_but_never_acknowledge_the_end(script) == b""
        await script.asked(ibb.CLOSE)
        await delivery.sent()


async def test_offer_that_is_ignored_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 14: it is busy with another file, and says nothing."""
    monkeypatch.setattr(sender, "ANSWER_TIMEOUT", 0.05)
    async with open_script(tmp_path, IPHONE) as script:
        delivery = script.send(b"content")
        await script.asked(si.SI)
        with pytest.raises(OfflineError, match="gave no answer"):
            await delivery.sent()


async def test_what_we_can_is_said_even_when_we_are_busy(
    tmp_path: Path, links: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 25: it sends only to who answers, and names both ways of transfer."""
    monkeypatch.setattr(session, "MAX_HANDLING", 1)
    (tmp_path / "peer").mkdir()
    answers = links.client._answers
    async with (
        open_script(tmp_path / "peer", IPHONE, answers=answers) as script,
        script.host() as host,
    ):
        await script.ask(OFFER.format(size=7), "a")
        # Held: nobody accepts there, so that our one handler has something to wait for.
        await script.say(query(SID, (IPHONE, "127.0.0.1", host.port)), "b")
        await trio.testing.wait_all_tasks_blocked()
        busy = await script.ask(OFFER.format(size=7), "c")
        assert refusal(busy) == ("wait", "resource-constraint")
        ver = links.client._caps.get("ver")
        node = links.client._caps.get("node")
        for asked in ("", f" node='{node}#{ver}'"):
            info = f"<query xmlns='{NS_INFO}'{asked}/>"
            answer = payload(await script.ask(info, f"d{asked[:2]}", "get"))
            assert answer.tag == INFO
            features = {each.get("var") for each in answer}
            assert features >= {
                si.NS_SI, si.NS_FILE, si.NS_FEATURE, si.BYTESTREAMS, si.IBB,
            }  # fmt: skip


def come(links: Links, features: frozenset[str]) -> None:
    unknown = links.client.contacts.presence_received(make(PRESENCE, {"from": IPHONE}))
    assert unknown is not None
    resource = links.client.contacts.unknown(unknown)
    assert resource is not None
    info = make_info(Identity("client", "phone"), features)
    assert links.client.contacts.info_received(resource, info)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (si.REQUIRED_FEATURES, 1),
        (si.REQUIRED_FEATURES | {si.BYTESTREAMS, si.IBB}, 1),
        (si.REQUIRED_FEATURES | {si.NS_SYNC}, 4),
    ],
)
def test_one_transfer_at_a_time_to_who_is_no_syncd(
    links: Links, features: frozenset[str], expected: int
) -> None:
    """Row 32: a second offer would go by in silence."""
    come(links, features)
    assert links.limit_of("hanmeimei@test") == expected
