"""What is killed: two daemons, a real server, a proxy, and the line that all bytes take."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from syncd.bytestreams.ibb import BLOCK_SIZE
from syncd.transfer.sender import SYNCD_WINDOW
from tests.chaos.proxy import SECRET
from tests.support.gate import Gate, open_gate
from tests.support.pair import Pair
from tests.support.processes import Process, free_ports, until
from tests.support.servers import DOMAIN, prosody

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemons import Daemons
    from tests.support.servers import Server

Way = Literal["direct", "proxy", "ibb"]

RELAY = f"relay.{DOMAIN}"

_COMPONENT = f"""
Component "{RELAY}"
    component_secret = "{SECRET}"
"""

# The bytes of the file in the blocks that a syncd sends before it hears of the first of them.
WINDOW = SYNCD_WINDOW * BLOCK_SIZE

# A Python program that imports trio; the rest is for a busy machine.
_PROXY_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything that a transfer needs.

    Attributes:
      way: Which of the ways its bytes can take.
      server: Real, with everything on its disk. In-band, all that the sender says to it
        goes through the gate.
      proxy: A process of its own; None where bytes go directly.
      pair: The two ends.
    """

    way: Way
    server: Server
    proxy: Process | None
    pair: Pair

    @property
    def gate(self) -> Gate:
        return self.pair.gate

    @property
    def processes(self) -> list[Process]:
        """All that have a log."""
        ends = [self.pair.alice.process, self.pair.bob.process, self.server.process]
        return ends if self.proxy is None else [*ends, self.proxy]

    def sent(self) -> int:
        """How many bytes have come from the sender so far, on all that goes by the gate."""
        return sum(self.gate.passed if self.way == "direct" else self.gate.taken)

    def in_flight(self) -> int:
        """How many of these the receiver has not read: they lie in kernels, or at the proxy.

        In-band they lie in the server as well, where nobody sees them: it is the most that
        can be on its way then, without an answer.
        """
        if self.way == "ibb":
            return WINDOW
        between = 0
        if self.way == "proxy":
            # One of its two connections takes the bytes, the other passes them on.
            taken, passed = self.gate.now_passed()
            between = max(0, taken - passed)
        return between + _unread(self.gate.port)

    def check_running(self) -> None:
        """Fail with the log of whoever has ended by itself."""
        for process in self.processes:
            process.check_running()

    def start_proxy(self) -> None:
        """Start it, and wait until the server knows it."""
        assert self.proxy is not None
        self.proxy.spawn()
        self.wait_joined()

    def wait_joined(self) -> None:
        """Wait until the proxy has joined the server that runs now."""
        if self.proxy is None:
            return
        log = self.proxy.log_file
        until(
            lambda: log.read_text().rstrip().endswith("joined"),
            "the proxy has joined the server",
            _PROXY_TIMEOUT,
        )


@contextlib.contextmanager
def open_world(way: Way, directory: Path, daemons: Daemons) -> Iterator[World]:
    """Make a server, a proxy if bytes are to go there, and two daemons; all but those run."""
    listen, advertise, component = free_ports(3)
    (home := directory / f"server-{way}").mkdir()
    with (
        prosody(home, proxy=False) as server,
        open_gate(
            advertise, server.port if way == "ibb" else listen, both_ways=way != "direct"
        ) as gate,
    ):
        proxy = None
        if way == "proxy":
            _join(server, home, component)
            proxy = _make_proxy(home, component, listen, advertise)
        alice = daemons.make(
            "alice", server, send_to=["bob"], listen=0, advertise=0, only_direct=True
        )
        match way:
            case "direct":
                at = f'listen = "127.0.0.1:{listen}"\nadvertise = ["127.0.0.1:{advertise}"]'
                _set_ways(alice.config_file, f"{at}\nproxies = []\nibb = false")
            case "proxy":
                ways = f'direct = false\nproxies = ["{RELAY}"]\nibb = false'
                _set_ways(alice.config_file, ways)
            case "ibb":
                _set_ways(alice.config_file, "direct = false\nproxies = []")
                _connect_to(alice.config_file, server.port, advertise)
        bob = daemons.make("bob", server, accept_from=["alice"], only_direct=way != "ibb")
        world = World(
            way=way, server=server, proxy=proxy, pair=Pair(alice=alice, bob=bob, gate=gate)
        )
        try:
            if proxy is not None:
                world.start_proxy()
            yield world
        finally:
            daemons.end_all()
            if proxy is not None:
                proxy.kill()


def _set_ways(config: Path, ways: str) -> None:
    """Replace what a configuration says of bytestreams."""
    text = config.read_text()
    head, _, rest = text.partition("[bytestreams]\n")
    _, _, tail = rest.partition("[[folder]]\n")
    config.write_text(f"{head}[bytestreams]\n{ways}\n[[folder]]\n{tail}")


def _connect_to(config: Path, server: int, gate: int) -> None:
    """Reach the server through the gate."""
    text = config.read_text()
    assert f":{server}" in text
    config.write_text(text.replace(f":{server}", f":{gate}"))


def _join(server: Server, home: Path, component: int) -> None:
    """Let the server have an external component (XEP-0114)."""
    config = home / "prosody.cfg.lua"
    text = config.read_text()
    ports = f'component_ports = {{ {component} }}\ncomponent_interfaces = {{ "127.0.0.1" }}\n'
    config.write_text(f"{ports}{text}{_COMPONENT}")
    server.restart()


def _make_proxy(home: Path, component: int, listen: int, advertise: int) -> Process:
    command = [sys.executable, "-m", "tests.chaos.proxy", "--jid", RELAY]
    command += ["--server-port", str(component), "--port", str(listen)]
    command += ["--advertise", str(advertise)]
    repository = Path(__file__).parents[2]
    env = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(repository)}
    return Process("proxy", command, log_file=home / "proxy.log", env=env)


def _unread(port: int) -> int:
    """How much of what was written on a port the other ends have not read.

    It outlives the connection: what a peer has not read when we close, it still can.
    """
    unread = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        sending, _, received = queues.partition(":")
        if _port(local) == port:
            unread += int(sending, 16)
        if _port(remote) == port:
            unread += int(received, 16)
    return unread


def _port(address: str) -> int:
    return int(address.partition(":")[2], 16)
