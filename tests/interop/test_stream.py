"""Logging in at real servers, and staying there: resets, silence, restarts."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
import trustme

from syncd.errors import OfflineError, RemoteProtocolError
from syncd.link import connect as connecting
from syncd.link import session
from syncd.link.connect import connect
from syncd.xmpp import sasl
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make
from tests.support import servers
from tests.support.asking import Asked
from tests.support.couple import PATIENCE, QUERY, account, together
from tests.support.gate import open_gate
from tests.support.pair import Pair, assert_delivered
from tests.support.processes import free_ports, until
from tests.support.servers import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.daemons import Daemons
    from tests.support.servers import Server


# --- Getting in


@pytest.mark.parametrize("direct", [False, True], ids=["starttls", "direct-tls"])
async def test_the_strongest_login_is_used(server: Server, direct: bool) -> None:
    with trio.fail_after(PATIENCE):
        connection = await connect(account(server, direct=direct))
        await trio.aclose_forcefully(connection.transport)
    assert connection.stream.is_open
    assert connection.stream.jid.bare == JID.parse(f"alice@{DOMAIN}")
    assert connection.stream.mechanism.startswith("SCRAM-SHA-")
    assert sasl.strength(connection.stream.mechanism) >= sasl.strength("SCRAM-SHA-256")


async def test_every_mechanism_that_is_offered_and_known_lets_us_in(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strongest that there is, and then without it; PLAIN is the last."""
    with servers.connect(server) as stream:
        features = servers.open_stream(stream, server.domain).decode()
    offered = {name: how for name, how in sasl.MECHANISMS.items() if f">{name}<" in features}
    assert offered.keys() >= {"SCRAM-SHA-1", "SCRAM-SHA-256"}
    for mechanism, how in offered.items():
        monkeypatch.setattr(sasl, "MECHANISMS", {mechanism: how})
        with trio.fail_after(PATIENCE):
            connection = await connect(account(server))
            await trio.aclose_forcefully(connection.transport)
        assert connection.stream.is_open
        assert connection.stream.mechanism.removesuffix("-PLUS") == mechanism
    assert ">PLAIN<" in features
    monkeypatch.setattr(sasl, "MECHANISMS", {})
    with trio.fail_after(PATIENCE):
        connection = await connect(replace(account(server), allow_plain=True))
        await trio.aclose_forcefully(connection.transport)
    assert (connection.stream.is_open, connection.stream.mechanism) == (True, "PLAIN")


@pytest.mark.parametrize("direct", [False, True], ids=["starttls", "direct-tls"])
async def test_a_server_with_another_authority_is_not_trusted(
    server: Server, direct: bool, tmp_path: Path
) -> None:
    other = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(other)
    with trio.fail_after(PATIENCE), pytest.raises(RemoteProtocolError, match="certificate"):
        await connect(replace(account(server, direct=direct), ca_file=other))


# --- Staying there


async def test_a_reset_connection_is_not_seen_by_anybody(server: Server) -> None:
    """A request under way is answered, exactly once, and the peer sees nobody go."""
    async with together(server) as couple, trio.open_nursery() as nursery:
        alice, bob = couple.alice, couple.bob
        since, jid = alice.client.since, alice.client.jid
        couple.may_answer = trio.Event()
        early, late = Asked(), Asked()
        to = alice.client.contacts.choose(alice.peer).jid
        nursery.start_soon(early.ask, alice.client, to, make(QUERY), PATIENCE)
        await couple.was_asked()
        await couple.break_off()
        couple.may_answer.set()  # bob's server keeps the answer for her
        nursery.start_soon(late.ask, alice.client, to, make(QUERY), PATIENCE)
        await couple.come_back()
        with trio.fail_after(PATIENCE):
            answers = [await early.answer(), await late.answer()]
        assert [answer.sender for answer in answers] == [to, to]
        assert couple.asked == 2
        assert (alice.client.since, alice.client.jid) == (since, jid)
        first = bob.seen.index(True)
        assert all(bob.seen[first:])
        assert all(alice.seen[alice.seen.index(True) :])


async def test_a_connection_that_fell_silent_is_found_and_resumed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the times cut short, which are proved with a virtual clock elsewhere."""
    async with together(server) as couple:
        monkeypatch.setattr(session, "PING_AFTER", 0.3)
        monkeypatch.setattr(session, "PING_TIMEOUT", 2.0)
        monkeypatch.setattr(session, "CLOSE_TIMEOUT", 0.3)
        since = couple.alice.client.since
        # The keep-alive sleeps already: a new connection is the first to be asked so soon.
        await couple.break_off()
        await couple.come_back()
        couple.gate.fall_silent()
        with trio.fail_after(PATIENCE):
            assert (await couple.alice.ask()).type == "result"
        assert len(couple.gate.passed) >= 3
        assert couple.alice.client.since == since
        assert all(couple.bob.seen[couple.bob.seen.index(True) :])


async def test_a_server_that_stands_still_is_waited_for_and_the_session_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped as by a frozen machine: it takes connections, and says nothing."""
    async with together(server) as couple:
        monkeypatch.setattr(session, "PING_AFTER", 0.3)
        monkeypatch.setattr(session, "PING_TIMEOUT", 0.5)
        monkeypatch.setattr(session, "CLOSE_TIMEOUT", 0.3)
        monkeypatch.setattr(connecting, "CONNECT_TIMEOUT", 1.0)
        alice = couple.alice.client
        since, jid = alice.since, alice.jid
        # The keep-alive sleeps already: a new connection is the first to be asked so soon.
        await couple.break_off()
        await couple.come_back()
        server.process.signal(signal.SIGSTOP)
        try:
            await couple.alice.until(lambda: not alice.connected)
            # At least one attempt to come back meets the silence.
            await couple.alice.until(lambda: alice.problem is not None)
            assert "did not let us in within" in str(alice.problem)
        finally:
            server.process.signal(signal.SIGCONT)
        # From here on it is a busy server like any other.
        monkeypatch.undo()
        await couple.alice.until(lambda: alice.connected)
        with trio.fail_after(PATIENCE):
            assert (await couple.alice.ask()).type == "result"
        assert (alice.since, alice.jid) == (since, jid)


async def test_a_server_that_comes_back_has_forgotten_the_session(server: Server) -> None:
    """Then a new one is bound, and everything is found anew.

    Alice's connection is broken first. A server that goes down ends one session after the
    other, and if bob's comes first she may still hear that he has gone.
    """
    async with together(server) as couple:
        alice, bob = couple.alice, couple.bob
        couple.may_answer = trio.Event()
        since = alice.client.since
        async with trio.open_nursery() as nursery:
            asked = Asked()
            to = alice.client.contacts.choose(alice.peer).jid
            nursery.start_soon(asked.ask, alice.client, to, make(QUERY), PATIENCE)
            await couple.was_asked()
            await couple.break_off()
            await trio.to_thread.run_sync(server.restart)
            couple.gate.refusing = False
            with pytest.raises(OfflineError):
                await asked.answer()
        couple.may_answer.set()
        await alice.until(lambda: alice.client.connected and alice.client.since > since)
        await alice.sees_peer()
        await bob.sees_peer()
        with trio.fail_after(PATIENCE):
            assert (await alice.ask()).type == "result"


async def test_a_request_to_a_peer_that_leaves_fails_at_once(server: Server) -> None:
    """It would never be answered, and its own time limit is far away."""
    async with together(server) as couple, trio.open_nursery() as nursery:
        couple.may_answer = trio.Event()
        asked = Asked()
        to = couple.alice.client.contacts.choose(couple.alice.peer).jid
        nursery.start_soon(asked.ask, couple.alice.client, to, make(QUERY), 10 * PATIENCE)
        await couple.was_asked()
        nursery.start_soon(couple.bob.client.goodbye)
        with trio.fail_after(PATIENCE), pytest.raises(OfflineError, match=f"{to} went offline"):
            await asked.answer()


# --- Whole daemons


@pytest.fixture
def mobile(server: Server, daemons: Daemons) -> Iterator[Pair]:
    """A pair whose gate is between alice and the server; both have found each other."""
    with open_gate(free_ports(1)[0], server.port) as gate:
        through = replace(server, port=gate.port)
        pair = Pair(
            alice=daemons.make("alice", through, send_to=["bob"], only_direct=True),
            bob=daemons.make("bob", server, accept_from=["alice"], only_direct=True),
            gate=gate,
        )
        pair.start()
        until(lambda: pair.alice.peer("bob").online, "alice sees bob")
        yield pair


def said(pair: Pair, words: str) -> int:
    """How often alice's log has something."""
    return pair.alice.process.log_file.read_text(encoding="utf-8").count(words)


def test_a_file_dropped_while_the_connection_is_broken_is_delivered(mobile: Pair) -> None:
    pair = mobile
    pair.gate.refusing = True
    pair.gate.reset()
    until(lambda: pair.alice.status().connection.state != "connected", "alice noticed")
    pair.alice.drop("in-the-gap", b"Hello, Bob!\n")
    until(lambda: pair.alice.peer("bob").pending == 1, "the file is owed")
    pair.gate.refusing = False
    assert_delivered(pair)
    assert (said(pair, "online as"), said(pair, ": resumed\n")) == (1, 1)


def test_a_file_is_delivered_across_a_restart_of_the_server(
    mobile: Pair, server: Server
) -> None:
    pair = mobile
    server.stop()
    pair.alice.drop("while-away", b"Hello, Bob!\n")
    server.start()
    assert_delivered(pair)
    assert said(pair, "online as") == 2
