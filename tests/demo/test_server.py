"""The whole server over real TCP and TLS."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import s5b
from syncd.demo import server
from syncd.demo.faults import Faults, payload
from syncd.demo.server import open_server
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import make_iq, read_error
from syncd.xmpp.xml import make
from tests.support.rawclient import NS_SASL, connect, log_in, socks5
from tests.support.world import (
    ACCOUNTS,
    ALICE,
    BOB,
    PING,
    World,
    drive,
    is_silent,
    open_world,
    stream_error,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_world() as running:
        yield running


async def test_plain_and_direct_tls_are_possible() -> None:
    async with (
        open_server(accounts=ACCOUNTS, mechanisms=("PLAIN",), direct_tls=True) as running,
        connect(running.port) as client,
    ):
        await client.start_tls("demo.example", running.ca_pem)
        await client.open("demo.example")
        success = await client.authenticate("alice", "pw-a", "PLAIN")
        assert success.tag == f"{{{NS_SASL}}}success"


async def test_contacts_see_each_other_come_and_go(world: World) -> None:
    alice = await world.join(ALICE)
    bob = await world.join(BOB)
    seen = await alice.until(lambda e: e.get("from") == BOB)
    assert seen.get("type") is None
    await bob.forget()
    await bob.write("</stream:stream>")
    seen = await alice.until(lambda e: e.get("from") == BOB)
    assert seen.get("type") == "unavailable"
    assert await drive(bob) == []
    assert await bob.next_item() is None


async def test_clients_ask_each_other(world: World) -> None:
    alice, bob = await world.join(ALICE), await world.join(BOB)

    async def answer() -> None:
        asked = await bob.until(lambda e: e.get("type") == "get")
        assert asked.get("from") == ALICE
        await bob.send(make_iq("result", asked.get("id", ""), JID.parse(ALICE)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        reply = await alice.request("get", BOB, make(PING))
    assert (reply.get("type"), reply.get("from")) == ("result", BOB)


async def test_a_transfer_through_the_proxy(world: World) -> None:
    """What a client does: find the proxy, connect twice, activate, send, close."""
    alice = await world.join(ALICE)
    items = await alice.request(
        "get", "demo.example", make("{http://jabber.org/protocol/disco#items}query")
    )
    proxy = items[0][0].get("jid")
    assert proxy == "proxy.demo.example"
    address = await alice.request("get", proxy, make(s5b.TAG))
    port = int(address[0][0].get("port", ""))
    dstaddr = s5b.dstaddr("sid", alice.jid, JID.parse(BOB))
    async with await socks5(port, dstaddr) as target, await socks5(port, dstaddr) as requester:
        activate = make(f"{{{s5b.NS}}}activate", text=BOB)
        reply = await alice.request("set", proxy, make(s5b.TAG, {"sid": "sid"}, activate))
        assert reply.get("type") == "result"
        await requester.send_all(b"the file")
        await requester.aclose()
        assert await target.receive_some(100) == b"the file"


async def test_a_server_can_be_without_proxy() -> None:
    async with open_server(accounts=ACCOUNTS, proxy=False) as running:
        assert running.proxy is None
        async with log_in(running.port, running.ca_pem, ALICE, "pw-a") as alice:
            reply = await alice.request("get", "proxy.demo.example", make(s5b.TAG))
            assert read_error(reply).condition == "remote-server-not-found"
            reply = await alice.request("set", ALICE, make(PING))
            assert reply[0].tag == PING


async def test_a_taken_resource_goes_to_the_newcomer(world: World) -> None:
    old = await world.join(ALICE)
    await world.join(ALICE)
    assert await stream_error(old) == "conflict"
    assert len(world.server.sessions) == 1


async def test_fault_drop_delay_duplicate(world: World) -> None:
    alice = await world.join(ALICE)
    await alice.forget()
    world.faults.drop(payload(PING), times=1)
    world.faults.delay(payload(PING), 0.05, times=1)
    for ident in ("dropped", "delayed", "overtakes"):
        await alice.send(make_iq("get", ident, None, make(PING)))
    assert [(await alice.next()).get("id") for _ in range(2)] == ["overtakes", "delayed"]
    world.faults.duplicate(payload(PING))
    await alice.send(make_iq("get", "twice", None, make(PING)))
    assert [(await alice.next()).get("id") for _ in range(2)] == ["twice", "twice"]


async def test_fault_delay_in_virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    # Real sockets need a moment of real time before the clock may jump.
    autojump_clock.autojump_threshold = 0.05
    async with (
        open_server(accounts=ACCOUNTS) as running,
        log_in(running.port, running.ca_pem, ALICE, "pw-a") as alice,
    ):
        running.faults.delay(payload(PING), 5.0)
        before = trio.current_time()
        await alice.request("get", None, make(PING))
        assert trio.current_time() - before == pytest.approx(5.0, abs=0.5)


async def test_fault_forget_presence(world: World) -> None:
    alice, bob = await world.join(ALICE), await world.join(BOB)
    await alice.forget()
    world.faults.forget_presence = True
    world.server.cut(bob.jid)
    await world.server.until(lambda: len(world.server.sessions) == 1)
    assert await is_silent(alice)


async def test_clients_are_told_when_the_server_stops() -> None:
    async with AsyncExitStack() as stack:
        async with open_server(accounts=ACCOUNTS) as running:
            context = log_in(running.port, running.ca_pem, ALICE, "pw-a")
            alice = await stack.enter_async_context(context)
        assert await stream_error(alice) == "system-shutdown"


async def test_strangers_have_so_much_room_and_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_HALF_OPEN", 1)
    alice = await world.join(ALICE)
    stranger = await world.connect()
    await stranger.open("demo.example")
    turned_away = await world.connect()
    assert await turned_away.next_item() is None
    await trio.aclose_forcefully(stranger.wire)
    await alice.request("get", None, make(PING))
    assert (await world.join(BOB)).jid == JID.parse(BOB)


async def test_delayed_stanzas_have_so_much_room_and_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_LATER", 1)
    alice = await world.join(ALICE)
    await alice.forget()
    world.faults.delay(payload(PING), 0.01, times=2)
    for ident in ("1", "2"):
        await alice.send(make_iq("get", ident, None, make(PING)))
    assert (await alice.next()).get("id") == "1"
    assert await is_silent(alice)


async def test_faults_can_be_there_from_the_beginning() -> None:
    faults = Faults(refuse_login="account-disabled")
    async with open_server(accounts=ACCOUNTS, faults=faults) as running:
        assert running.faults is faults


async def test_rosters_as_given() -> None:
    rosters = {"alice": {"bob": "to"}, "bob": {"alice": "from"}}
    async with (
        open_server(accounts=ACCOUNTS, rosters=rosters) as running,
        log_in(running.port, running.ca_pem, ALICE, "pw-a") as alice,
    ):
        reply = await alice.request("get", None, make("{jabber:iq:roster}query"))
        (item,) = reply[0]
        assert (item.get("jid"), item.get("subscription")) == ("bob@demo.example", "to")


async def test_a_port_that_is_taken_is_an_error(world: World) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with open_server(accounts=ACCOUNTS, port=world.server.port):
            pytest.fail("listens on a taken port")
    assert caught.group_contains(OSError)
