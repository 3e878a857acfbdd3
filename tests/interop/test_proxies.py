"""Bytestreams through the proxies of real servers (XEP-0065)."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.bytestreams import s5b
from syncd.bytestreams.discovery import Discovery, MemoryFile
from syncd.bytestreams.outgoing import MAX_MEDIATED, Requester
from syncd.bytestreams.proxies import Proxies
from syncd.bytestreams.sockets import connect_first
from syncd.errors import OpeningError
from syncd.link.connect import Account, connect
from syncd.link.session import Session
from syncd.xmpp.jid import JID
from tests.support.pair import noise

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.bytestreams.proxies import Policy
    from syncd.link.session import Handler
    from syncd.xmpp.stanza import Iq
    from tests.support.servers import Server

# Only a test that fails waits so long.
PATIENCE = 60.0  # seconds

# Many times what the proxies keep in their buffers.
DATA = noise(8 * 1024 * 1024)


@dataclass
class Target:
    """Bob's side: goes to whatever streamhost he is offered, and keeps what comes.

    Attributes:
      arrived: Of each stream, by sid.
      lies: He says that he is there, and is not.
    """

    jid: JID
    requester: JID
    nursery: trio.Nursery
    arrived: dict[str, bytes] = field(default_factory=dict)
    lies: bool = False

    async def on_bytestream(self, iq: Iq) -> Element:
        assert iq.payload is not None
        query = s5b.read_query(iq.payload)
        if self.lies:
            await trio.lowlevel.checkpoint()
            return s5b.make_used(query.sid, query.streamhosts[0].jid)
        address = s5b.dstaddr(query.sid, self.requester, self.jid)
        used, stream = await connect_first(query.streamhosts, address)
        self.nursery.start_soon(self._read, query.sid, stream)
        return s5b.make_used(query.sid, used.jid)

    async def _read(self, sid: str, stream: trio.SocketStream) -> None:
        data = bytearray()
        async with stream:
            while chunk := await stream.receive_some(262_144):
                data += chunk
        self.arrived[sid] = bytes(data)

    async def arrival(self, sid: str) -> bytes:
        while sid not in self.arrived:  # noqa: ASYNC110 - a real server is in between
            await trio.sleep(0.01)
        return self.arrived[sid]


@dataclass
class World:
    """Alice, who sends, and bob; both are logged in at a real server."""

    requester: Requester
    known: Proxies
    target: Target

    async def send(self, sid: str, data: bytes = DATA) -> str:
        """Send something as a sender does; by which proxy it went."""
        async with self.requester.place(self.target.jid) as place:
            opened = await place.open(sid)
            assert opened.method == "proxy"
            async with opened.stream as stream:
                await stream.send_all(data)
        return opened.via


def new_sid() -> str:
    """Never used before: ejabberd keeps half a stream under its sid, and then refuses it."""
    return secrets.token_hex(16)


@asynccontextmanager
async def logged_in(
    server: Server, jid: JID, handlers: Callable[[JID], dict[str, Handler]]
) -> AsyncIterator[Session]:
    account = Account(
        jid=jid,
        password=lambda: server.password(jid.local),
        server=(server.host, server.port),
        tls="starttls",
        ca_file=server.ca_file,
    )
    session = Session(await connect(account), handlers(jid), lambda presence: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        yield session
        session.close()


@asynccontextmanager
async def open_world(
    server: Server, folder: Path, *, policy: Policy = "auto", resource: str = "syncd-4f2a"
) -> AsyncIterator[World]:
    """Both are there, and alice has looked at the proxies."""
    bob = JID.parse(f"bob@{server.domain}/{resource}")
    alice = JID.parse(f"alice@{server.domain}/syncd-77e1")
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            target = Target(bob, alice, nursery)
            handlers: dict[str, Handler] = {s5b.TAG: target.on_bytestream}
            async with (
                logged_in(server, bob, lambda jid: handlers),
                logged_in(server, alice, lambda jid: {}) as session,
            ):
                assert session.jid == alice
                known = Proxies(policy, server.domain)
                discovery = Discovery(
                    known,
                    own_domain=server.domain,
                    request=session.request,
                    own_jid=lambda: session.jid,
                    wait_online=trio.lowlevel.checkpoint,
                    memory=MemoryFile(folder / "proxies"),
                )
                nursery.start_soon(discovery.run)
                requester = Requester(
                    request=session.request,
                    own_jid=lambda: session.jid,
                    listener=None,
                    advertised=list,
                    proxies=known,
                    prepare=discovery.prepare,
                )
                yield World(requester, known, target)
            nursery.cancel_scope.cancel()


async def test_the_servers_proxy_is_found_and_used_under_the_jid_that_it_gives(
    server: Server, tmp_path: Path
) -> None:
    one = new_sid()
    async with open_world(server, tmp_path) as world:
        via = await world.send(one)
        arrived = await world.target.arrival(one)
        assert hashlib.sha256(arrived).digest() == hashlib.sha256(DATA).digest()
        # ejabberd adds the number of its node.
        jid = JID.parse(via)
        assert jid.bare == JID.parse(f"proxy.{server.domain}")
        assert bool(jid.resource) == (server.kind == "ejabberd")


async def test_a_configured_proxy_is_used_without_discovery(
    server: Server, tmp_path: Path
) -> None:
    policy = (JID.parse(f"proxy.{server.domain}"),)
    one = new_sid()
    async with open_world(server, tmp_path, policy=policy) as world:
        await world.send(one, b"x")
        assert await world.target.arrival(one) == b"x"


async def test_what_is_no_proxy_is_told_in_words(server: Server, tmp_path: Path) -> None:
    policy = (JID.parse(server.domain),)
    one = new_sid()
    async with open_world(server, tmp_path, policy=policy) as world:
        with pytest.raises(OpeningError) as caught:
            await world.send(one)
        assert caught.value.reason == "nothing"
        [report] = world.known.report(0)
        assert report.text.startswith(f"{server.domain} cannot be used: ")


async def test_a_resource_in_capitals_is_no_obstacle(server: Server, tmp_path: Path) -> None:
    """Many clients have one, such as ``Spark 2.6.3``."""
    one = new_sid()
    async with open_world(server, tmp_path, resource="Spark 2.6.3") as world:
        await world.send(one, b"x")
        assert await world.target.arrival(one) == b"x"


async def test_a_proxy_without_the_target_refuses_the_activation(
    server: Server, tmp_path: Path
) -> None:
    one, two = new_sid(), new_sid()
    async with open_world(server, tmp_path) as world:
        world.target.lies = True
        with pytest.raises(OpeningError) as caught:
            await world.send(one)
        assert caught.value.reason == "activation"
        assert "does not see both of them" in str(caught.value)
        # And it can be used all the same, with another sid.
        world.target.lies = False
        await world.send(two, b"x")
        assert await world.target.arrival(two) == b"x"


async def test_more_transfers_than_places_all_arrive(server: Server, tmp_path: Path) -> None:
    async with open_world(server, tmp_path) as world:
        sids = {new_sid(): noise(500_000, number) for number in range(3 * MAX_MEDIATED)}
        async with trio.open_nursery() as nursery:
            for sid, data in sids.items():
                nursery.start_soon(world.send, sid, data)
        for sid, data in sids.items():
            assert await world.target.arrival(sid) == data


async def test_what_was_found_is_there_at_once_the_next_time(
    server: Server, tmp_path: Path
) -> None:
    one = new_sid()
    async with open_world(server, tmp_path) as world:
        await world.send(one, b"x")
    known = Proxies("auto", server.domain)
    known.restore((tmp_path / "proxies").read_bytes())
    [report] = known.report(0)
    assert report.usable
    assert f"127.0.0.1:{server.proxy_port}" in report.text
