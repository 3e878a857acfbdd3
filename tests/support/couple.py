"""Alice and bob, each a client at a real server; alice's connection goes through a gate."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from syncd.link.client import Client
from syncd.link.connect import Account
from syncd.link.contacts import Contacts
from syncd.xmpp.disco import Identity
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make
from tests.support.gate import Gate, open_gate
from tests.support.processes import free_ports
from tests.support.servers import DOMAIN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from xml.etree.ElementTree import Element

    from syncd.link.session import Handler
    from syncd.xmpp.stanza import Iq
    from tests.support.servers import Server

QUERY = "{urn:syncd:test}query"
FEATURE = "urn:syncd:test"

# Only a test that fails waits so long.
PATIENCE = 30.0  # seconds


def account(server: Server, user: str = "alice", *, direct: bool = False) -> Account:
    """The account of one of the users, at this server."""
    return Account(
        # Always the same resource: a session that the server keeps for an earlier test is
        # taken over, and cannot pass for a peer.
        jid=JID.parse(f"{user}@{DOMAIN}/test"),
        password=lambda: server.password(user),
        server=(server.host, server.tls_port if direct else server.port),
        tls="direct" if direct else "starttls",
        ca_file=server.ca_file,
    )


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
