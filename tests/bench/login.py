"""How long it takes to come back: ``python -m tests.bench.login [--delay MS] [--runs N]``.

The daemon's own client logs in to the demo server, over TCP and TLS on the loopback, behind a
relay that holds every byte back as a long line does, and counts how often the client had to
wait for the server before it went on (TCP's own handshake included). Nothing is asserted here.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from syncd.demo.login import EVERYTHING
from syncd.demo.server import open_server
from syncd.link import connect, keyring
from syncd.link.connect import Account, Connection, Tokens
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from syncd.xmpp.sm import StreamManagement

JID_BARE = JID.parse("alice@demo.example")
AGENT = "d4565fa7-4d72-4749-b3d3-740edbf87770"
WARM_UP = "warm-up"
_CHUNK = 65_536  # bytes


@dataclass
class Line:
    """A relay in front of a server.

    Attributes:
      target: The server's port.
      delay: How long each byte is under way, one way, seconds.
      trips: Round trips so far.
    """

    target: int
    delay: float
    trips: int = 0
    _answered: bool = False  # the last that passed was of the server

    async def serve(self, near: trio.SocketStream) -> None:
        """Pass one connection's bytes, late."""
        # The client's first bytes leave it when the answer to its SYN has come.
        open_at = trio.current_time() + 2 * self.delay
        self.trips, self._answered = 1, True
        far = await trio.open_tcp_stream("127.0.0.1", self.target)
        async with near, far, trio.open_nursery() as nursery:
            for source, sink, begin in ((near, far, open_at), (far, near, -1.0)):
                send, receive = trio.open_memory_channel[tuple[float, bytes]](math.inf)
                nursery.start_soon(self._read, source, send, begin)
                nursery.start_soon(self._write, sink, receive, nursery.cancel_scope)

    async def _read(
        self,
        source: trio.SocketStream,
        send: trio.MemorySendChannel[tuple[float, bytes]],
        begin: float,
    ) -> None:
        try:
            while data := await source.receive_some(_CHUNK):
                of_client = begin >= 0
                self.trips += of_client and self._answered
                self._answered = not of_client
                at = max(trio.current_time(), begin) + self.delay
                send.send_nowait((at, bytes(data)))
        except trio.BrokenResourceError:
            pass
        send.close()

    async def _write(
        self,
        sink: trio.SocketStream,
        receive: trio.MemoryReceiveChannel[tuple[float, bytes]],
        scope: trio.CancelScope,
    ) -> None:
        try:
            async for at, data in receive:
                await trio.sleep_until(at)
                await sink.send_all(data)
        except trio.BrokenResourceError:
            pass
        scope.cancel()


@dataclass
class Bench:
    """One server, and a client that logs in to it again and again."""

    account: Account
    runs: int
    line: Line
    times: dict[str, list[float]] = field(default_factory=dict)
    trips: dict[str, int] = field(default_factory=dict)

    @asynccontextmanager
    async def login(
        self, name: str, account: Account, resume: StreamManagement | None = None
    ) -> AsyncIterator[Connection]:
        begin = trio.current_time()
        connection = await connect.connect(account, resume)
        self.times.setdefault(name, []).append(trio.current_time() - begin)
        self.trips[name] = max(self.line.trips, self.trips.get(name, 0))
        try:
            yield connection
        finally:
            await trio.aclose_forcefully(connection.transport)

    async def managed(self, connection: Connection) -> StreamManagement:
        """Wait until the session can be resumed."""
        stream = connection.stream
        while stream.sm is None or not stream.sm.id:
            await connect.write(connection.transport, stream)
            stream.receive_data(await connect.read(connection.transport))
        return stream.sm

    async def run(self) -> None:
        """Log in in every way, `runs` times."""
        old = replace(self.account, agent="", tokens=None)
        new = replace(self.account, tokens=None)
        fast = self.account
        async with self.login(WARM_UP, fast):
            pass
        for _ in range(self.runs):
            async with self.login("SASL, bind", old) as connection:
                former = await self.managed(connection)
            async with self.login("SASL, resume", old, former) as connection:
                assert connection.stream.sm is former
            async with self.login("SASL2, Bind 2", new) as connection:
                former = await self.managed(connection)
            async with self.login("SASL2, resume", new, former) as connection:
                assert connection.stream.sm is former
            async with self.login("SASL2, token, Bind 2", fast) as connection:
                assert connection.stream.mechanism.startswith("HT-")
                former = await self.managed(connection)
            async with self.login("SASL2, token, resume", fast, former) as connection:
                assert connection.stream.mechanism.startswith("HT-")
                assert connection.stream.sm is former


async def measure(*, delay: float, runs: int, direct: bool) -> None:
    """Measure on one line, and print."""
    begun = "direct TLS" if direct else "STARTTLS"
    sys.stdout.write(f"\n{begun}, {delay * 1000:.0f} ms one way, median of {runs}\n")
    accounts = {JID_BARE.local: "password"}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with (
            open_server(
                accounts=accounts, abilities=EVERYTHING, direct_tls=direct, proxy=False
            ) as server,
            trio.open_nursery() as nursery,
        ):
            line = Line(server.port, delay)
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, line.serve, [listener])
            (directory / "ca.pem").write_bytes(server.ca_pem)
            account = Account(
                jid=JID_BARE,
                password=lambda: "password",
                server=("127.0.0.1", listener.socket.getsockname()[1]),
                tls="direct" if direct else "starttls",
                ca_file=directory / "ca.pem",
                agent=AGENT,
                tokens=Tokens(
                    partial(keyring.read_token, directory, JID_BARE),
                    partial(keyring.write_token, directory),
                ),
            )
            bench = Bench(account, runs, line)
            await bench.run()
            nursery.cancel_scope.cancel()
    for way, times in bench.times.items():
        median = statistics.median(times)
        # Without a delay the two directions run into each other.
        trips = f"{bench.trips[way]:2d} round trips" if delay else ""
        if way != WARM_UP:
            sys.stdout.write(f"  {way:24s} {median * 1000:7.1f} ms  {trips}\n")


def main() -> None:
    """Measure as the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.login", description=__doc__)
    parser.add_argument("--delay", type=float, default=50.0, help="one way, milliseconds")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    for delay in (args.delay / 1000, 0.0):
        for direct in (False, True):
            trio.run(partial(measure, delay=delay, runs=args.runs, direct=direct))


if __name__ == "__main__":
    main()
