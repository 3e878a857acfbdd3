"""Another client at the same real server, in a process of its own: slixmpp (asyncio)."""

from __future__ import annotations

import json
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.errors import OfflineError
from syncd.link.client import SERVED
from syncd.xmpp.disco import (
    INFO,
    NS_INFO,
    NS_PING,
    NS_VERSION,
    PING,
    VERSION,
    read_info,
)
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make
from tests.support.couple import FEATURE, PATIENCE, End, account
from tests.support.servers import DOMAIN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.servers import Server

# Logs in as bob, waits for alice, asks her everything, prints what it heard, and stays until
# its input ends; then it logs out.
SCRIPT = r"""
import asyncio, json, sys
import slixmpp

port, ca_file, domain, feature = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]


class Client(slixmpp.ClientXMPP):
    def __init__(self):
        super().__init__(f"bob@{domain}/other", "pw-bob")
        self.ca_certs = ca_file
        self.seen = asyncio.get_running_loop().create_future()
        for plugin in ("xep_0030", "xep_0092", "xep_0115", "xep_0199"):
            self.register_plugin(plugin)
        self.plugin["xep_0092"].software_name = "another client"
        self.plugin["xep_0092"].version = "7"
        self.plugin["xep_0030"].add_feature(feature)
        self.add_event_handler("session_start", self.start)
        self.add_event_handler("presence_available", self.status)

    async def start(self, _):
        await self.plugin["xep_0115"].update_caps(broadcast=False)
        self.send_presence()
        await self.get_roster()

    def status(self, presence):
        if presence["from"].user == "alice" and not self.seen.done():
            self.seen.set_result((str(presence["from"]), presence["priority"]))


async def main():
    client = Client()
    client.connect("127.0.0.1", port)
    jid, priority = await client.seen
    heard = {"jid": jid, "priority": priority}
    heard["ping"] = await client.plugin["xep_0199"].ping(jid) is not None
    info = (await client.plugin["xep_0030"].get_info(jid=jid))["disco_info"]
    heard["identities"] = sorted(list(each)[:2] for each in info["identities"])
    heard["features"] = sorted(info["features"])
    version = (await client.plugin["xep_0092"].get_version(jid))["software_version"]
    heard["version"] = [version["name"], version["version"]]
    items = await client.plugin["xep_0030"].get_items(jid=jid)
    heard["items"] = len(items["disco_items"]["items"])
    try:
        await client.plugin["xep_0030"].get_info(jid=jid, node="of nothing")
    except slixmpp.exceptions.IqError as error:
        heard["no node"] = error.condition
    iq = client.make_iq_get("urn:nobody:knows", ito=jid)
    try:
        await iq.send()
    except slixmpp.exceptions.IqError as error:
        heard["unknown"] = error.condition
    print(json.dumps(heard), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await client.disconnect()


asyncio.run(asyncio.wait_for(main(), 60))
"""


class Other:
    """The other client.

    Attributes:
      heard: What alice told it.
    """

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.heard: dict[str, object] = {}

    async def listen(self) -> None:
        assert self._process.stdout is not None
        said = b""
        with trio.fail_after(PATIENCE):
            while not said.endswith(b"\n"):
                data = await self._process.stdout.receive_some()
                assert data, "it ended early"
                said += data
        self.heard = json.loads(said)

    async def go(self) -> None:
        """Let it log out."""
        assert self._process.stdin is not None
        await self._process.stdin.aclose()


@asynccontextmanager
async def meeting(server: Server) -> AsyncIterator[tuple[End, Other]]:
    """Alice, with our client, and bob, with slixmpp; they have seen each other."""
    alice = End(account(server), "bob", {})
    argv = [sys.executable, "-c", SCRIPT]
    argv += [str(server.port), str(server.ca_file), DOMAIN, FEATURE]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.client.run)
        process = await trio.lowlevel.open_process(argv, stdin=-1, stdout=-1)
        try:
            other = Other(process)
            await other.listen()
            await alice.sees_peer()
            yield alice, other
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
        with trio.move_on_after(2):
            await alice.client.goodbye()
        nursery.cancel_scope.cancel()


async def test_each_learns_of_the_other_what_it_is_and_can(server: Server) -> None:
    async with meeting(server) as (alice, other):
        assert other.heard == {
            "jid": str(alice.client.jid),
            "priority": -1,
            "ping": True,
            "identities": [["client", "bot"]],
            "features": sorted([FEATURE, *SERVED]),
            "version": ["test", "1"],
            "items": 0,
            "no node": "item-not-found",
            "unknown": "service-unavailable",
        }
        bob = alice.client.contacts.choose(alice.peer)
        assert bob.jid == JID.parse(f"bob@{DOMAIN}/other")
        assert bob.info is not None
        assert {FEATURE, NS_INFO, NS_PING, NS_VERSION} <= bob.info.features
        # Known by its presence (XEP-0115), and asked itself it says the same.
        answer = await alice.client.request("get", bob.jid, make(INFO), PATIENCE)
        assert read_info(answer.payload).features == bob.info.features
        await alice.client.request("get", bob.jid, make(PING), PATIENCE)
        answer = await alice.client.request("get", bob.jid, make(VERSION), PATIENCE)
        assert answer.payload is not None
        told = {child.tag.partition("}")[2]: child.text for child in answer.payload}
        assert (told["name"], told["version"]) == ("another client", "7")


async def test_when_the_other_logs_out_its_absence_is_known_at_once(server: Server) -> None:
    async with meeting(server) as (alice, other):
        await other.go()
        await alice.until(lambda: not alice.seen[-1])
        with pytest.raises(OfflineError, match="offline"):
            alice.client.contacts.choose(alice.peer)
