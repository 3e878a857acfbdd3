"""Logging in at real servers, and staying there: resets, silence, restarts."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
import trustme

from syncd.errors import OfflineError, RemoteProtocolError
from syncd.link import session
from syncd.link.client import Client
from syncd.link.connect import Account, connect
from syncd.link.contacts import Contacts
from syncd.xmpp import sasl
from syncd.xmpp.disco import Identity
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make
from tests.support import servers
from tests.support.asking import Asked
from tests.support.gate import Gate, open_gate
from tests.support.pair import Pair, assert_delivered
from tests.support.processes import free_ports, until
from tests.support.servers import DOMAIN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.link.session import Handler
    from syncd.xmpp.stanza import Iq
    from tests.support.daemons import Daemons
    from tests.support.servers import Server

QUERY = "{urn:syncd:test}query"
FEATURE = "urn:syncd:test"

# Only a test that fails waits so long.
PATIENCE = 30.0  # seconds


def account(server: Server, user: str = "alice", *, direct: bool = False) -> Account:
    return Account(
        # Always the same resource: a session that the server keeps for an earlier test is
        # taken over, and cannot pass for a peer.
        jid=JID.parse(f"{user}@{DOMAIN}/test"),
        password=lambda: server.password(user),
        server=(server.host, server.tls_port if direct else server.port),
        tls="direct" if direct else "starttls",
        ca_file=server.ca_file,
    )


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


async def test_every_scram_that_is_offered_lets_us_in(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize("direct", [False, True], ids=["starttls", "direct-tls"])
async def test_a_server_with_another_authority_is_not_trusted(
    server: Server, direct: bool, tmp_path: Path
) -> None:
    other = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(other)
    with trio.fail_after(PATIENCE), pytest.raises(RemoteProtocolError, match="certificate"):
        await connect(replace(account(server, direct=direct), ca_file=other))


# --- Staying there


class End:
    """A client at a real server, and when its peer was seen.

    Attributes:
      client: As in the daemon.
      seen: Whether the peer was online, each time that something changed.
    """

    def __init__(self, where: Account, peer: str, handlers: dict[str, Handler]) -> None:
        self.peer = JID.parse(f"{peer}@{DOMAIN}")
        self.seen: list[bool] = []
        self._change = trio.Event()
        self.client = Client(
            where,
            Contacts([self.peer], required=frozenset({FEATURE}), preferred=FEATURE),
            identity=Identity("client", "bot", "test"),
            version="1",
            features=frozenset({FEATURE}),
            handlers=handlers,
            changed=self._changed,
        )

    def _changed(self) -> None:
        self.seen.append(self.peer in self.client.contacts.online())
        self._change.set()
        self._change = trio.Event()

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until something holds that changes are told of."""
        with trio.fail_after(PATIENCE):
            while not true():
                await self._change.wait()

    async def sees_peer(self) -> None:
        await self.until(lambda: bool(self.seen) and self.seen[-1])

    async def ask(self) -> Iq:
        """Ask the peer; it is there."""
        return await self.client.request(
            "get", self.client.contacts.choose(self.peer).jid, make(QUERY), PATIENCE
        )


class Couple:
    """Alice, whose connection goes through the gate, and bob, who answers when he may."""

    def __init__(self, server: Server, gate: Gate) -> None:
        self.gate = gate
        self.may_answer = trio.Event()
        self.may_answer.set()
        self.asked = 0
        self._first_asked = trio.Event()
        through = replace(account(server), server=("127.0.0.1", gate.port))
        self.alice = End(through, "bob", {})
        self.bob = End(account(server, "bob"), "alice", {QUERY: self._on_query})

    async def _on_query(self, _: Iq) -> Element:
        self.asked += 1
        self._first_asked.set()
        await self.may_answer.wait()
        return make(QUERY, text="answer")

    async def was_asked(self) -> None:
        """Wait until bob has been asked."""
        with trio.fail_after(PATIENCE):
            await self._first_asked.wait()

    async def break_off(self) -> None:
        """Reset alice's connection, and keep her from making another."""
        self.gate.refusing = True
        await trio.to_thread.run_sync(self.gate.reset)
        await self.alice.until(lambda: not self.alice.client.connected)

    async def come_back(self) -> None:
        self.gate.refusing = False
        await self.alice.until(lambda: self.alice.client.connected)


@asynccontextmanager
async def together(server: Server) -> AsyncIterator[Couple]:
    """Run both until they see each other, and while the block lasts."""
    with open_gate(free_ports(1)[0], server.port) as gate:
        couple = Couple(server, gate)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(couple.alice.client.run)
            nursery.start_soon(couple.bob.client.run)
            await couple.alice.sees_peer()
            await couple.bob.sees_peer()
            yield couple
            with trio.move_on_after(2):
                await couple.alice.client.goodbye()
                await couple.bob.client.goodbye()
            nursery.cancel_scope.cancel()


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


async def test_a_server_that_comes_back_has_forgotten_the_session(server: Server) -> None:
    """Then a new one is bound, and everything is found anew."""
    async with together(server) as couple:
        alice, bob = couple.alice, couple.bob
        couple.may_answer = trio.Event()
        since = alice.client.since
        async with trio.open_nursery() as nursery:
            asked = Asked()
            to = alice.client.contacts.choose(alice.peer).jid
            nursery.start_soon(asked.ask, alice.client, to, make(QUERY), PATIENCE)
            await couple.was_asked()
            await trio.to_thread.run_sync(server.restart)
            with pytest.raises(OfflineError):
                await asked.answer()
        couple.may_answer.set()
        await alice.until(lambda: alice.client.connected and alice.client.since > since)
        await alice.sees_peer()
        await bob.sees_peer()
        with trio.fail_after(PATIENCE):
            assert (await alice.ask()).type == "result"


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
