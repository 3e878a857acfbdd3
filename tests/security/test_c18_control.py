"""C-18: the control socket is its owner's alone, and no client of it harms the daemon.

Against real daemons, which have no XMPP server and need none for this. What the server's twin
(`tests/control/test_server.py`) shows by itself is not repeated.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zmq

from syncd.control.client import ask
from syncd.control.messages import (
    MAX_REQUEST,
    PingRequest,
    Refusal,
    StatusRequest,
    decode_reply,
    encode_request,
)
from tests.support.memory import resident
from tests.support.processes import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemons import Daemon, Daemons

MIB = 1 << 20  # bytes
CLIENTS = 10_000
# Far more than a daemon has descriptors for where nobody raises the limit.
MUTE = 1_500  # connections
PATIENCE = 60.0  # seconds


@pytest.fixture
def daemon(daemons: Daemons) -> Daemon:
    """One with as few descriptors as any system gives, as long as it asks for no more."""
    prlimit = shutil.which("prlimit")
    assert prlimit is not None
    made = daemons.make(
        "alice", None, send_to=["bob"], inside=[prlimit, "--nofile=256:8192", "--"]
    )
    made.start()
    return made


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    """As many for the test itself as it needs."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16_384), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))


def is_well(daemon: Daemon) -> bool:
    """Whether it answers, and is the one that was started."""
    pong = ask(daemon.socket, PingRequest(), timeout=PATIENCE)
    return pong.pid == daemon.process.pid


def test_c18_ten_thousand_clients_in_a_minute_are_served_or_refused(daemon: Daemon) -> None:
    """Each a connection of its own; nobody waits in vain, and nothing is left of them."""
    threads = 8
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, 0)
        for _ in range(200):
            one_client(context, daemon.socket)
        before, open_before = resident(daemon.process.pid), descriptors(daemon)
        with ThreadPoolExecutor(threads) as pool:
            work = [
                pool.submit(some_clients, context, daemon.socket, CLIENTS // threads)
                for _ in range(threads)
            ]
            kinds = [kind for each in work for kind in each.result(PATIENCE)]
    assert len(kinds) == CLIENTS
    assert set(kinds) <= {"Pong", "busy"}
    assert kinds.count("Pong") > CLIENTS // 2
    assert resident(daemon.process.pid) - before < 20 * MIB
    until(lambda: descriptors(daemon) <= open_before + 10, "their connections are closed")
    assert is_well(daemon)


def some_clients(context: zmq.Context[zmq.Socket[bytes]], path: Path, count: int) -> list[str]:
    return [one_client(context, path) for _ in range(count)]


def one_client(context: zmq.Context[zmq.Socket[bytes]], path: Path) -> str:
    """Come, ask, and go; what the answer was."""
    with context.socket(zmq.REQ) as asking:
        asking.rcvtimeo = int(1_000 * PATIENCE)
        asking.connect(f"ipc://{path}")
        asking.send(encode_request(PingRequest()))
        reply = decode_reply(asking.recv())
    return reply.code if isinstance(reply, Refusal) else type(reply).__name__


def test_c18_connections_that_say_nothing_end_nobody(daemon: Daemon) -> None:
    """More than it had descriptors for at its start; after five seconds they are closed."""
    before = descriptors(daemon)
    with ExitStack() as stack:
        for _ in range(MUTE):
            connect(daemon, stack)
        assert is_well(daemon)
        until(lambda: descriptors(daemon) < before + 50, "silent connections are closed")
    assert is_well(daemon)


def test_c18_clients_that_stay_end_nobody(daemon: Daemon) -> None:
    """A script that forgets to close what it opens, for a day."""
    before = resident(daemon.process.pid)
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, 0)
        context.set(zmq.MAX_SOCKETS, 2 * MUTE)
        with ExitStack() as stack:
            for _ in range(MUTE):
                idle = stack.enter_context(context.socket(zmq.REQ))
                idle.rcvtimeo = int(1_000 * PATIENCE)
                idle.connect(f"ipc://{daemon.socket}")
                idle.send(encode_request(PingRequest()))
                idle.recv()
            assert descriptors(daemon) > MUTE
            assert resident(daemon.process.pid) - before < 100 * MIB
            assert is_well(daemon)
    until(lambda: descriptors(daemon) < 200, "they are closed once they have gone")
    assert is_well(daemon)


def connect(daemon: Daemon, stack: ExitStack) -> socket.socket:
    connection = stack.enter_context(socket.socket(socket.AF_UNIX))
    # Blocking, so that a full backlog is waited for.
    connection.connect(str(daemon.socket))
    connection.settimeout(PATIENCE)
    return connection


# ZMTP 3.0: the signature, the version, the mechanism, and what follows a greeting.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 32)
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ\x08Identity\x00\x00\x00\x00"
GARBAGE = {
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(1_000),
    "noise": bytes(range(256)) * 40,
    "a greeting and noise": GREETING + b"\xff" * 1_000,
    "a frame without end": GREETING + READY + b"\x02" + b"\x7f" + b"\xff" * 7 + b"x" * 1_000,
    "frames without number": GREETING + READY + b"\x01\x00" * 50_000,
    "a frame too long": GREETING + READY + b"\x02" + (MAX_REQUEST + 1).to_bytes(8, "big"),
    "an endless greeting": b"\xff" + bytes(8) + b"\x7f" + b"\x03" * 5_000,
    "another mechanism": GREETING.replace(b"NULL", b"CURV") + b"\x04\x05HELLO" * 100,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_c18_garbage_harms_nobody(daemon: Daemon, kind: str) -> None:
    """Below the messages, where only libzmq looks; that it holds is checked with it."""
    before = resident(daemon.process.pid)
    for _ in range(50):
        with ExitStack() as stack, suppress(OSError):
            connect(daemon, stack).sendall(GARBAGE[kind])
    assert is_well(daemon)
    assert resident(daemon.process.pid) - before < 20 * MIB


def test_c18_who_asks_and_never_reads_fills_no_memory(daemon: Daemon) -> None:
    """Its answers are dropped; the others get theirs."""
    ask(daemon.socket, StatusRequest(), timeout=PATIENCE)
    before = resident(daemon.process.pid)
    with zmq.Context() as context:
        context.setsockopt(zmq.LINGER, 0)
        with ExitStack() as stack:
            greedy = [stack.enter_context(context.socket(zmq.DEALER)) for _ in range(20)]
            for each in greedy:
                each.rcvhwm = 1
                each.sndtimeo = 100
                each.connect(f"ipc://{daemon.socket}")
            for _ in range(500):
                for each in greedy:
                    # What does not fit is not taken from us: that is what is to be.
                    with suppress(zmq.Again):
                        each.send_multipart(
                            [b"", encode_request(StatusRequest())], flags=zmq.NOBLOCK
                        )
            assert is_well(daemon)
            assert resident(daemon.process.pid) - before < 30 * MIB
    assert is_well(daemon)


def test_c18_slow_clients_delay_no_other(daemon: Daemon) -> None:
    """A byte now and then, from many: an answer takes as long as without them."""
    stop = threading.Event()
    with ExitStack() as stack:
        slow = [connect(daemon, stack) for _ in range(100)]

        def drip() -> None:
            for byte in GREETING + READY:
                for each in slow:
                    with suppress(OSError):
                        each.send(bytes([byte]))
                if stop.wait(0.02):
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            for _ in range(50):
                assert is_well(daemon)
        finally:
            stop.set()
            dripping.join()


_AS_NOBODY = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(30)
try:
    connection.connect(sys.argv[1])
    print("heard", len(connection.recv(100)))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_c18_another_user_is_refused_by_every_lock(daemon: Daemon) -> None:
    """By the directory; and when that is left open, by the socket; and then by the kernel."""

    def as_nobody() -> str:
        done = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, str(daemon.socket)],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    home = daemon.socket.parent.parent
    for directory in (home.parent, home):
        directory.chmod(0o755)
    assert as_nobody() == "PermissionError"
    daemon.socket.parent.chmod(0o755)
    assert as_nobody() == "PermissionError"
    daemon.socket.chmod(0o777)
    # It is hung up on, before libzmq says its own greeting.
    assert as_nobody() in {"heard 0", "ConnectionResetError"}
    assert is_well(daemon)
