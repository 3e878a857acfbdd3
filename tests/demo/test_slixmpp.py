"""An independent client against the demo server: slixmpp, in a process of its own (asyncio)."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.demo.login import EVERYTHING, NOTHING_MORE, Abilities
from syncd.demo.server import open_server

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = r"""
import asyncio, json, ssl, sys
import slixmpp

port, ca_file = int(sys.argv[1]), sys.argv[2]
DATA = bytes(range(256)) * 4096


class Client(slixmpp.ClientXMPP):
    def __init__(self, name):
        super().__init__(f"{name}@demo.example/x", f"pw-{name}")
        self.ca_certs = ca_file
        self.ready = asyncio.get_running_loop().create_future()
        self.seen = asyncio.get_running_loop().create_future()
        self.received = bytearray()
        for plugin in ("xep_0030", "xep_0065", "xep_0199"):
            self.register_plugin(plugin)
        self.add_event_handler("session_start", self.start)
        self.add_event_handler("presence_available", self.status)
        self.add_event_handler("socks5_data", self.data)

    async def start(self, _):
        self.send_presence()
        await self.get_roster()
        self.ready.set_result(None)

    def status(self, presence):
        if presence["from"].bare != self.boundjid.bare and not self.seen.done():
            self.seen.set_result(str(presence["from"]))

    def data(self, data):
        self.received += data


async def main():
    alice, bob = Client("alice"), Client("bob")
    bob.plugin["xep_0065"].auto_accept = True
    for client in (alice, bob):
        client.connect("127.0.0.1", port)
    await asyncio.gather(alice.ready, bob.ready)
    found = {"seen": await alice.seen}
    found["subscription"] = alice.client_roster["bob@demo.example"]["subscription"]
    found["ping"] = await alice.plugin["xep_0199"].ping("bob@demo.example/x") is not None
    proxies = await alice.plugin["xep_0065"].discover_proxies()
    found["proxies"] = sorted(str(jid) for jid in proxies)
    transport = await alice.plugin["xep_0065"].handshake("bob@demo.example/x")
    await transport.write(DATA)
    while len(bob.received) < len(DATA):
        await asyncio.sleep(0.01)
    found["intact"] = bytes(bob.received) == DATA
    try:
        await alice.plugin["xep_0199"].send_ping("bob@demo.example/gone")
    except slixmpp.exceptions.IqError as error:
        found["gone"] = error.condition
    print(json.dumps(found))


asyncio.run(asyncio.wait_for(main(), 15))
"""


@pytest.mark.parametrize("abilities", [NOTHING_MORE, EVERYTHING])
async def test_slixmpp_logs_in_sees_its_contact_and_uses_the_proxy(
    tmp_path: Path, abilities: Abilities
) -> None:
    accounts = {"alice": "pw-alice", "bob": "pw-bob"}
    ca_file = tmp_path / "ca.pem"
    async with open_server(accounts=accounts, abilities=abilities) as server:
        ca_file.write_bytes(server.ca_pem)
        done = await trio.run_process(
            [sys.executable, "-c", SCRIPT, str(server.port), str(ca_file)],
            capture_stdout=True,
        )
    assert json.loads(done.stdout) == {
        "seen": "bob@demo.example/x",
        "subscription": "both",
        "ping": True,
        "proxies": ["proxy.demo.example"],
        "intact": True,
        "gone": "service-unavailable",
    }
