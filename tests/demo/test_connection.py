"""One client's connection, over real TCP and TLS."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.demo import connection
from syncd.demo.login import Abilities
from syncd.demo.resumption import RESUME_WITHIN
from syncd.demo.server import open_server
from syncd.xmpp.jid import JID
from syncd.xmpp.sm import MAX_UNACKED
from syncd.xmpp.stanza import make_iq
from syncd.xmpp.xml import make
from tests.support.rawclient import NS_SASL, NS_TLS, RawClient, connect, log_in
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

    from trio.testing import MockClock


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_world() as running:
        yield running


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-1"])
async def test_login_and_ping(world: World, mechanism: str) -> None:
    alice = await world.join(ALICE, mechanism=mechanism)
    assert alice.jid == JID.parse(ALICE)
    reply = await alice.request("get", "demo.example", make(PING))
    assert (reply.get("type"), reply.get("from")) == ("result", "demo.example")


async def test_a_wrong_password_is_refused(world: World) -> None:
    client = await world.connect()
    await client.open("demo.example")
    await client.write(f"<starttls xmlns='{NS_TLS}'/>")
    await client.next()
    await client.start_tls("demo.example", world.server.ca_pem)
    await client.open("demo.example")
    failure = await client.authenticate("alice", "wrong", "SCRAM-SHA-256")
    assert [child.tag for child in failure] == [f"{{{NS_SASL}}}not-authorized"]
    success = await client.authenticate("alice", "pw-a", "SCRAM-SHA-1")
    assert success.tag == f"{{{NS_SASL}}}success"


async def test_many_stanzas_keep_their_order(world: World) -> None:
    alice, bob = await world.join(ALICE), await world.join(BOB)
    count = 2_000

    async def send() -> None:
        for number in range(count):
            await alice.write(f"<message to='{BOB}' id='{number}'/>")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        got = [
            int((await bob.until(lambda e: e.tag.endswith("message"))).get("id", ""))
            for _ in range(count)
        ]
    assert got == list(range(count))


async def test_malformed_xml_is_answered_and_ends_the_stream(world: World) -> None:
    alice = await world.join(ALICE)
    await alice.write("<message><body></message>")
    assert await stream_error(alice) == "not-well-formed"


async def test_a_stanza_may_be_a_mebibyte_and_no_more(world: World) -> None:
    alice, bob = await world.join(ALICE), await world.join(BOB)
    body = "x" * 1_000_000
    await alice.write(f"<message to='{BOB}'><body>{body}</body></message>")
    assert len((await bob.until(lambda e: len(e) > 0))[0].text or "") == len(body)
    await alice.write(f"<message to='{BOB}'><body>{body}{body}</body></message>")
    assert await stream_error(alice) == "policy-violation"


async def test_fault_refuse_login(world: World) -> None:
    world.faults.refuse_login = "temporary-auth-failure"
    client = await world.connect()
    await client.open("demo.example")
    await client.write(f"<starttls xmlns='{NS_TLS}'/>")
    await client.next()
    await client.start_tls("demo.example", world.server.ca_pem)
    await client.open("demo.example")
    failure = await client.authenticate("alice", "pw-a", "SCRAM-SHA-256")
    assert [child.tag for child in failure] == [f"{{{NS_SASL}}}temporary-auth-failure"]


async def test_fault_max_stanza(world: World) -> None:
    alice = await world.join(ALICE)
    world.faults.max_stanza = 200
    await alice.request("get", None, make(PING))
    await alice.write(f"<message to='{BOB}'><body>{'x' * 200}</body></message><presence/>")
    assert await stream_error(alice) == "policy-violation"


async def test_fault_silent(world: World) -> None:
    alice = await world.join(ALICE)
    await alice.forget()
    world.faults.silent = True
    await alice.send(make_iq("get", "late", None, make(PING)))
    stranger = await world.connect()
    await stranger.write("<stream:stream")
    assert await is_silent(alice)
    assert await is_silent(stranger)
    world.faults.silent = False
    assert (await alice.next()).get("id") == "late"


async def test_fault_rate(autojump_clock: trio.testing.MockClock) -> None:
    """As Debian's ejabberd: 3,000 bytes a second."""
    autojump_clock.autojump_threshold = 0.05
    async with (
        open_server(accounts=ACCOUNTS) as running,
        log_in(running.port, running.ca_pem, ALICE, "pw-a") as alice,
    ):
        running.faults.rate = 3_000
        before = trio.current_time()
        await alice.write(f"<message type='headline' to='{BOB}'>{' ' * 9_000}</message>")
        await alice.request("get", None, make(PING))
        assert trio.current_time() - before == pytest.approx(3.0, abs=0.5)


async def test_a_cut_is_an_error_for_its_client_and_unavailable_for_others(
    world: World,
) -> None:
    alice, bob = await world.join(ALICE), await world.join(BOB)
    await alice.until(lambda e: e.get("from") == BOB)
    world.server.cut("bob@demo.example")
    with pytest.raises(trio.BrokenResourceError):
        await drive(bob)
    gone = await alice.until(lambda e: e.get("from") == BOB)
    assert gone.get("type") == "unavailable"


async def test_whom_a_dead_client_told_its_presence_learns_it(world: World) -> None:
    alice, bob = await world.join(ALICE, presence=False), await world.join(BOB)
    await alice.write(f"<presence to='{BOB}'/>")
    await bob.until(lambda e: e.get("from") == ALICE)
    await trio.aclose_forcefully(alice.wire)
    gone = await bob.until(lambda e: e.get("from") == ALICE)
    assert gone.get("type") == "unavailable"


@pytest.mark.parametrize("condition", ["", "reset"])
async def test_a_stream_can_be_ended_by_the_book(world: World, condition: str) -> None:
    alice = await world.join(ALICE)
    await alice.forget()
    world.server.end(alice.jid, condition)
    errors = await drive(alice)
    assert [error[0].tag.rpartition("}")[2] for error in errors] == list(
        filter(None, [condition])
    )
    await trio.aclose_forcefully(alice.wire)
    await world.server.until(lambda: not len(world.server.sessions))


async def test_who_does_not_log_in_is_shown_out(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with open_server(accounts=ACCOUNTS) as running, connect(running.port) as client:
        await client.open("demo.example")
        before = trio.current_time()
        await trio.sleep(connection.LOGIN_TIMEOUT + 1)
        assert await stream_error(client) == "connection-timeout"
        assert trio.current_time() - before < connection.LOGIN_TIMEOUT + 2


async def test_who_does_not_read_is_dropped() -> None:
    """Its queue has an end; nobody else suffers."""
    async with (
        open_server(accounts=ACCOUNTS, max_queue=1_000_000) as running,
        log_in(running.port, running.ca_pem, ALICE, "pw-a") as alice,
        log_in(running.port, running.ca_pem, BOB, "pw-b"),
    ):
        body = "x" * 100_000
        with trio.fail_after(10):
            for number in itertools.count():
                await alice.write(f"<message to='{BOB}' id='{number}'><b>{body}</b></message>")
                if running.sessions.get(JID.parse(BOB)) is None:
                    break
        gone = await alice.until(lambda e: e.get("from") == BOB and e.get("type") is not None)
        assert gone.get("type") in ("unavailable", "error")


# Sessions that outlive their connection (XEP-0198)

MANAGED = Abilities(managed=True)
SM = "xmlns='urn:xmpp:sm:3'"


@pytest.fixture
async def managed() -> AsyncIterator[World]:
    async with open_world(MANAGED) as running:
        yield running


async def enable(client: RawClient) -> str:
    """Make a client's session resumable; gives its id."""
    await client.write(f"<enable {SM} resume='true'/>")
    enabled = await client.until(lambda e: e.tag.endswith("}enabled"))
    return enabled.get("id", "")


async def test_a_session_waits_for_its_client_and_dies_without_it(
    managed: World, autojump_clock: MockClock
) -> None:
    alice, bob = await managed.join(ALICE), await managed.join(BOB)
    await enable(alice)
    managed.server.cut(ALICE)
    assert await alice.until_end()
    await bob.forget()
    await bob.send(make_iq("get", "lost", JID.parse(ALICE), make(PING)))
    await trio.sleep(RESUME_WITHIN - 1)
    assert len(managed.server.sessions) == 2
    reply = await bob.until(lambda e: e.get("id") == "lost")
    assert reply.get("type") == "error"
    assert len(managed.server.sessions) == 1


async def test_a_session_that_is_ended_while_its_client_is_away_is_over(
    managed: World,
) -> None:
    alice, bob = await managed.join(ALICE), await managed.join(BOB)
    await enable(alice)
    managed.server.cut(ALICE)
    assert await alice.until_end()
    await bob.forget()
    managed.server.end(ALICE, "reset")
    gone = await bob.until(lambda e: e.get("from") == ALICE)
    assert gone.get("type") == "unavailable"
    assert len(managed.server.sessions) == 1


async def test_a_client_that_acknowledges_nothing_is_given_up(managed: World) -> None:
    alice, bob = await managed.join(ALICE), await managed.join(BOB)
    await enable(alice)
    await bob.write(f"<message to='{ALICE}'/>" * (MAX_UNACKED + 1))
    assert await stream_error(alice) == "policy-violation"


async def test_a_new_session_of_the_same_address_ends_one_that_waits(managed: World) -> None:
    old = await managed.join(ALICE)
    await enable(old)
    managed.server.cut(ALICE)
    assert await old.until_end()
    new = await managed.join(ALICE)
    assert len(managed.server.sessions) == 1
    reply = await new.request("get", ALICE, make(PING))
    assert reply[0].tag == PING
