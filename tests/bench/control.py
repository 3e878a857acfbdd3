"""How soon the control socket answers: ``python -m tests.bench.control [--size MIB]``.

Two daemons and the demo server, a process each. Asked is for the status of the sender, over
one connection, one question after the other: while nothing moves; while four files go at full
speed; and while the journal cannot be written, because somebody else holds SQLite's lock for
a second, as a disk would that hangs. Nothing is asserted here: the machine's other work is in
the figures, of which the first row shows how much.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from syncd.control.client import ask
from syncd.control.messages import Status, StatusRequest, decode_reply, encode_request
from syncd.errors import ControlError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20  # bytes
FILES = 4
FREEZE = 1.0  # seconds
# Between two questions: a person at ``status --watch`` asks less often, a script hardly more.
PAUSE = 0.002  # seconds
PATIENCE = 120.0  # seconds
PASSWORDS = {"alice": "pw-a", "bob": "pw-b"}

CONFIG = """\
[account]
jid = "{name}@demo.example/bench"
password_file = "{home}/password"
server = "127.0.0.1:{port}"
tls = "starttls"
ca_file = "{ca_file}"
[state]
dir = "{home}/state"
[control]
socket = "{home}/control.sock"
[bytestreams]
listen = "127.0.0.1:0"
advertise = ["127.0.0.1:0"]
[[folder]]
id = "shared"
path = "{home}/folder"
{ways}
settle = 0.1
"""


@dataclass
class Party:
    """One daemon.

    Attributes:
      home: Everything of it.
      socket: Its control socket.
    """

    home: Path

    @property
    def socket(self) -> Path:
        return self.home / "control.sock"

    def status(self) -> Status:
        return ask(self.socket, StatusRequest(), timeout=PATIENCE)


class Asker:
    """Asks one daemon over one connection."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: Path) -> None:
        self._socket = context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.connect(f"ipc://{socket}")
        self.status()  # the connection is made by the first

    def status(self) -> tuple[float, Status]:
        """Ask once; how long it took, in seconds, and the answer."""
        began = time.perf_counter()
        self._socket.send(encode_request(StatusRequest()))
        data = self._socket.recv()
        took = time.perf_counter() - began
        reply = decode_reply(data)
        assert isinstance(reply, Status)
        return took, reply

    def while_(self, condition: Callable[[Status], bool]) -> list[float]:
        """Ask as long as the answers say so."""
        times: list[float] = []
        while True:
            took, status = self.status()
            if not condition(status):
                return times
            times.append(took)
            time.sleep(PAUSE)

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def running(*command: str | Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process for as long as the block lasts."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def parties(root: Path) -> Iterator[tuple[Party, Party]]:
    """Alice and bob, both online."""
    accounts = [f"--account={name}:{password}" for name, password in PASSWORDS.items()]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            running(
                "syncd.demo", *accounts, "--directory", root / "ca", log=root / "server.log"
            )
        )
        assert server.stdout is not None
        port = int(server.stdout.readline().split()[1])
        made = []
        for name, ways in (
            ("alice", 'send_to = ["bob@demo.example"]'),
            ("bob", 'accept_from = ["alice@demo.example"]'),
        ):
            home = root / name
            (home / "folder").mkdir(parents=True)
            home.chmod(0o700)
            (home / "password").touch(mode=0o600)
            (home / "password").write_text(PASSWORDS[name])
            config = CONFIG.format(
                name=name, home=home, port=port, ca_file=root / "ca" / "ca.pem", ways=ways
            )
            (home / "config.toml").write_text(config)
            stack.enter_context(
                running("syncd", "--config", home / "config.toml", log=home / "log")
            )
            made.append(Party(home))
        alice, bob = made
        until(lambda: alice.status().peers[0].online, "bob is online")
        yield alice, bob


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(ControlError):
            if condition():
                return
        time.sleep(0.05)
    raise TimeoutError(f"not within {PATIENCE:g} s: {what}")


def drop(party: Party, name: str, size: int) -> None:
    """Put a file into a folder, by renaming."""
    made = party.home / name
    block = os.urandom(MIB)
    with made.open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(block)
    made.rename(party.home / "folder" / name)


def report(what: str, times: list[float], more: str = "") -> None:
    """Print one row."""
    if len(times) < 2:
        sys.stdout.write(f"{what:<30} too few answers\n")
        return
    p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
    sys.stdout.write(
        f"{what:<30} {len(times):>6} answers   p50 {1000 * p50:6.2f} ms"
        f"   p99 {1000 * p99:6.2f} ms   max {1000 * max(times):6.2f} ms   {more}\n"
    )


def measure(alice: Party, bob: Party, size: int) -> None:
    """Ask in each of the three situations."""
    with zmq.Context() as context, contextlib.closing(Asker(context, alice.socket)) as asker:
        idle = time.monotonic() + 2.0
        report("nothing moves", asker.while_(lambda _: time.monotonic() < idle))

        for number in range(FILES):
            drop(alice, f"{number}.bin", size)
        until(lambda: bool(alice.status().transfers), "a transfer has begun")
        began = time.monotonic()
        times = asker.while_(lambda now: bool(now.transfers) or now.peers[0].pending > 0)
        speed = FILES * size / (time.monotonic() - began) / MIB
        report(f"{FILES} transfers at full speed", times, f"{speed:.0f} MiB/s together")

        until(lambda: alice.status().peers[0].pending == 0, "all is delivered")
        journal = sqlite3.connect(alice.home / "state" / "journal.db", isolation_level=None)
        with contextlib.closing(journal):
            journal.execute("BEGIN IMMEDIATE")
            drop(alice, "small", MIB)
            end = time.monotonic() + FREEZE
            oldest = 0.0

            def frozen(status: Status) -> bool:
                nonlocal oldest
                if status.counted is not None:
                    oldest = max(oldest, time.time() - status.counted.timestamp())
                return time.monotonic() < end

            times = asker.while_(frozen)
            journal.execute("ROLLBACK")
        report("the journal's disk hangs", times, f"counts up to {oldest:.2f} s old")


def main() -> None:
    """Run it, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.control", description=__doc__)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of each file")
    parser.add_argument(
        "--directory", type=Path, help="for the files; default: a temporary one"
    )
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="sb", dir=arguments.directory) as root,
        parties(Path(root)) as (alice, bob),
    ):
        measure(alice, bob, arguments.size * MIB)


if __name__ == "__main__":
    main()
