"""Two clients that want the same resource, at servers that keep it for the one that has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from syncd.link.client import Client
from syncd.link.contacts import Contacts
from syncd.xmpp.disco import PING, Identity
from syncd.xmpp.xml import make
from tests.support import servers
from tests.support.couple import PATIENCE, account

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.servers import Server

# RFC 6120 section 7.7.2.2 leaves it to the server. As they come, both throw the older one out.
_KEEPS_THE_OLDER = {
    "prosody": [("daemonize", 'conflict_resolve = "kick_new"\n')],
    "ejabberd": [("listen:", "resource_conflict: closenew\n")],
}


def new_client(server: Server) -> Client:
    return Client(
        account(server),
        Contacts([], required=frozenset(), preferred=""),
        identity=Identity("client", "bot", "test"),
        version="1",
        features=frozenset(),
        handlers={},
    )


async def test_the_newcomer_gets_another_resource_at_once_and_nobody_is_thrown_out(
    kind: str, tmp_path: Path
) -> None:
    with servers.configured(kind, tmp_path, _KEEPS_THE_OLDER[kind]) as server:
        older, newer = new_client(server), new_client(server)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(PATIENCE):
                for client in (older, newer):
                    nursery.start_soon(client.run)
                    await client.wait_online()
                sessions = [(client.jid, client.since) for client in (older, newer)]
                for client in (older, newer):
                    answer = await client.request("get", None, make(PING), PATIENCE)
                    assert answer.type == "result"
            assert older.jid == account(server).jid
            assert newer.jid is not None
            assert newer.jid.bare == account(server).jid.bare
            assert newer.jid != older.jid
            assert sessions == [(client.jid, client.since) for client in (older, newer)]
            nursery.cancel_scope.cancel()
