"""The demo server with clients that join it, for the tests of its trio parts."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import trio
from trio.testing import wait_all_tasks_blocked

from syncd.demo.login import NOTHING_MORE, Abilities
from syncd.demo.server import Server, open_server
from syncd.xmpp.xml import Closed
from tests.support.rawclient import RawClient, connect, log_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from xml.etree.ElementTree import Element

ACCOUNTS = {"alice": "pw-a", "bob": "pw-b"}
PING = "{urn:xmpp:ping}ping"
ALICE, BOB = "alice@demo.example/a", "bob@demo.example/b"


class World:
    """A server, and clients that come and go with the test."""

    def __init__(self, running: Server, stack: AsyncExitStack) -> None:
        self.server = running
        self.faults = running.faults
        self._stack = stack

    async def join(self, jid: str, **options: bool | str) -> RawClient:
        name = jid.partition("@")[0]
        context = log_in(self.server.port, self.server.ca_pem, jid, ACCOUNTS[name], **options)  # type: ignore[arg-type]  # options of two types
        return await self._stack.enter_async_context(context)

    async def connect(self) -> RawClient:
        return await self._stack.enter_async_context(connect(self.server.port))


@asynccontextmanager
async def open_world(abilities: Abilities = NOTHING_MORE) -> AsyncIterator[World]:
    """A running server; the clients that join it are cut off before it stops."""
    async with (
        open_server(accounts=ACCOUNTS, abilities=abilities) as running,
        AsyncExitStack() as stack,
    ):
        yield World(running, stack)


async def drive(client: RawClient) -> list[Element]:
    """All elements up to the end of the stream."""
    elements = []
    while (item := await client.next_item()) is not None and not isinstance(item, Closed):
        elements.append(item)
    return elements  # type: ignore[return-value]  # no second header comes


async def stream_error(client: RawClient) -> str:
    """The condition of the error that ends the stream."""
    error = (await drive(client))[-1]
    assert error.tag == "{http://etherx.jabber.org/streams}error"
    return error[0].tag.rpartition("}")[2]


async def is_silent(client: RawClient) -> bool:
    """Whether nothing comes any more although nothing else moves."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.next_item)
            await wait_all_tasks_blocked(0.05)
            waiting = bool(nursery.child_tasks)
            scope.cancel()
    return waiting
