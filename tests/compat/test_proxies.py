"""Proxies as they are: Openfire's, ejabberd's and Prosody's, between us and a scripted peer.

The bytes go through the proxy of the embedded server, which has the faults of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import outgoing, s5b
from syncd.demo.faults import Faults
from syncd.errors import ErrorType, OpeningError, StanzaError
from syncd.transfer import si
from syncd.xmpp.jid import JID
from tests.support.scripted import (
    PROXY,
    US,
    accepted,
    connect_reply,
    exactly,
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

ROWS = {4, 5, 7, 9, 26, 27, 31, 33}

PEER = "bob@example.org/client"
SID = "s1"
SECOND = JID.parse("proxy2.example.org")
NODE = JID.parse("proxy.example.org/ejabberd@localhost")


async def by_proxy(script: Script) -> trio.SocketStream:
    """Let the peer accept our file and come to the proxy, as it cannot reach us."""
    await script.result(await script.asked(si.SI), accepted(si.BYTESTREAMS))
    opening = await script.asked(s5b.TAG)
    hosts = [host.get("jid") for host in payload(opening)]
    number = next(index for index, jid in enumerate(hosts) if jid != US)
    stream = await script.join(opening, number)
    await script.result(opening, used(hosts[number] or ""))
    return stream


@pytest.mark.parametrize(
    "fault",
    [
        Faults(),
        Faults(proxy_requires_si=True),
        Faults(proxy_one_way=True),
        Faults(proxy_keeps_tail=True),
    ],
    ids=["none", "offer seen", "one way", "tail kept"],
)
async def test_file_arrives_whole_by_every_proxy(tmp_path: Path, fault: Faults) -> None:
    """Rows 4, 5, 9: Openfire wants an offer with name and size, and knows one direction.

    Prosody keeps the tail back until we close. Who comes first is the target.
    """
    data = pattern(300_000)
    async with open_script(tmp_path, PEER) as script:
        await script.offer_proxy(faults=fault)
        delivery = script.send(data)
        stream = await by_proxy(script)
        assert await to_end(stream) == data
        await delivery.sent()
        assert [progress.method for progress in script.sending] == ["proxy"]


async def test_proxy_is_joined_once_and_only_behind_the_target(tmp_path: Path) -> None:
    """Row 9: before the peer is there, nobody of us has been."""
    async with open_script(tmp_path, PEER) as script:
        proxy = await script.offer_proxy()
        delivery = script.send(b"content")
        await script.result(await script.asked(si.SI), accepted(si.BYTESTREAMS))
        opening = await script.asked(s5b.TAG)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert proxy._bytestreams == {}
        stream = await script.join(opening, 1)
        [bytestream] = proxy._bytestreams.values()
        target = bytestream.parties[0]
        await script.result(opening, used(str(PROXY)))
        assert await exactly(stream, 7) == b"content"
        assert bytestream.parties[0] is target
        await stream.aclose()
        await delivery.sent()


async def test_activation_goes_to_the_very_jid_that_was_used(tmp_path: Path) -> None:
    """Row 27: ejabberd's has a resource, and only that one knows of the stream."""
    async with open_script(tmp_path, PEER) as script:
        await script.offer_proxy(NODE)
        delivery = script.send(b"content")
        stream = await by_proxy(script)
        assert await to_end(stream) == b"content"
        await delivery.sent()
        assert f"to='{NODE}'" in script.heard()
        assert f"<activate>{PEER}</activate>" in script.heard()


async def test_full_proxy_is_waited_for_and_each_attempt_has_a_sid_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 31: ejabberd's max_connections; it is no refusal of the file."""
    async with open_script(tmp_path, PEER) as script:
        full = await script.offer_proxy()
        await script.offer_proxy(SECOND)

        def busy(_: object, sender: JID) -> None:
            raise StanzaError(ErrorType.WAIT, "resource-constraint")

        monkeypatch.setattr(full, "_activate", busy)
        sids = []
        for expected in ([US, str(PROXY), str(SECOND)], [US, str(SECOND), str(PROXY)]):
            delivery = script.send(b"content")
            offered = await script.asked(si.SI)
            sids.append(payload(offered).get("id"))
            await script.result(offered, accepted(si.BYTESTREAMS))
            opening = await script.asked(s5b.TAG)
            assert [host.get("jid") for host in payload(opening)] == expected
            stream = await script.join(opening, 1)
            await script.result(opening, used(expected[1]))
            if expected[1] == str(PROXY):
                with pytest.raises(OpeningError, match="too many transfers") as caught:
                    await delivery.sent()
                assert caught.value.type is ErrorType.WAIT
                await stream.aclose()
            else:
                assert await to_end(stream) == b"content"
                await delivery.sent()
        assert len(set(sids)) == 2


async def test_only_so_many_go_by_proxies_at_a_time(tmp_path: Path) -> None:
    """Row 31: the next is not even offered, as a receiver waits 5 s for what follows."""
    async with open_script(tmp_path, PEER, direct=False) as script:
        await script.offer_proxy()
        deliveries = [
            script.send(b"content", name=f"{number}")
            for number in range(outgoing.MAX_MEDIATED + 1)
        ]
        offered = [await script.asked(si.SI) for _ in deliveries[1:]]
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert script.asked_nothing()
        assert len(offered) == 4
        for each in offered:
            await script.refuse(each, "<error code='403' type='auth'/>")
        await script.refuse(await script.asked(si.SI), "<error code='403' type='auth'/>")
        for delivery in deliveries:
            with pytest.raises(Exception, match="does not accept"):
                await delivery.sent()


async def test_receipt_comes_over_the_stream_as_no_proxy_has_a_half_close(
    tmp_path: Path,
) -> None:
    """Row 33: an end of one direction ends both; a syncd confirms by an iq."""
    data = pattern(300_000)
    async with open_script(tmp_path, PEER) as script:
        await script.offer_proxy(faults=Faults(proxy_one_way=True))
        delivery = script.send(data, is_syncd=True)
        stream = await by_proxy(script)
        assert await to_end(stream) == data
        finish = await script.asked(si.FINISH)
        assert payload(finish).get("size") == str(len(data))
        receipt = "".join(f" {key}='{value}'" for key, value in payload(finish).items())
        await script.result(finish, f"<receipt xmlns='{si.NS_SYNC}'{receipt}/>")
        assert (await delivery.sent()).confirmed


async def test_of_a_host_that_left_us_waiting_no_second_address_is_asked(
    tmp_path: Path,
) -> None:
    """Row 7: Openfire would take us for the other end; another host is asked all the same."""
    async with (
        open_script(tmp_path, PEER) as script,
        script.host() as first,
        script.host() as second,
        script.host() as other,
    ):
        await script.ask(OFFER, "a")
        hosts = [
            (str(PROXY), "127.0.0.1", first.port),
            (str(PROXY), "127.0.0.1", second.port),
            (PEER, "127.0.0.1", other.port),
        ]
        await script.say(query(SID, *hosts), "b")
        silent = await first.accept(lambda _: b"")  # hangs up behind the request
        await silent.aclose()
        stream = await other.accept()
        assert payload(await script.answer_to("b"))[0].get("jid") == PEER
        with trio.move_on_after(0.05) as untouched:
            await second._listening.accept()
        assert untouched.cancelled_caught
        async with stream:
            await stream.send_all(b"content")
        assert await script.settled() == {"a": b"content"}


async def test_proxy_that_lower_cases_is_asked_in_its_own_way(tmp_path: Path) -> None:
    """Row 26: ejabberd's hash is of the addresses in lower case."""
    peer = "bob@example.org/Client"
    async with open_script(tmp_path, peer) as script, script.host() as host:
        await script.ask(OFFER, "a")
        await script.say(query(SID, (str(PROXY), "127.0.0.1", host.port)), "b")
        refused = await host.accept(
            lambda request: b"\x05\x02" + connect_reply(request)[2:],
            address=sha1(SID, peer, US),
        )
        await refused.aclose()
        stream = await host.accept(address=sha1(SID, peer.lower(), US.lower()))
        await script.answer_to("b")
        async with stream:
            await stream.send_all(b"content")
        assert await script.settled() == {"a": b"content"}


OFFER = (
    f"<si xmlns='{si.NS_SI}' id='{SID}' profile='{si.NS_FILE}'>"
    f"<file xmlns='{si.NS_FILE}' name='a' size='7'/>"
    f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
    "<field var='stream-method' type='list-single'>"
    f"<option><value>{si.BYTESTREAMS}</value></option></field></x></feature></si>"
)
