"""Drives another client (`tests.support.slixmpp_peer`), which runs in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tests.support.daemons import DELIVERY_TIMEOUT
from tests.support.processes import END_TIMEOUT, TAIL
from tests.support.servers import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.servers import Server
    from tests.support.slixmpp_peer import Ended

_ROOT = Path(__file__).parents[2]


class PlainClient:
    """Another client, logged in.

    Args:
      jid: Its full JID.
      process: It, with pipes to both sides.
      log_file: What it says to people.

    Attributes:
      jid: As given.
    """

    def __init__(self, jid: str, process: subprocess.Popen[bytes], log_file: Path) -> None:
        self.jid = jid
        self._process = process
        self._log_file = log_file
        self._said = b""

    def next(self, timeout: float = DELIVERY_TIMEOUT) -> Ended:
        """Wait until something has ended there."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._said:
                assert selector.select(timeout), f"it says nothing:\n{self._log()}"
                data = os.read(self._process.stdout.fileno(), 65_536)
                assert data, f"it has ended:\n{self._log()}"
                self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return cast("Ended", json.loads(line))

    def send(self, to: str, file: Path, *, method: str, name: str = "") -> Ended:
        """Let it send a file, and wait until it has; other events must not be due.

        Args:
          to: A full JID.
          file: Whose content is sent.
          method: ``s5b`` or ``ibb``.
          name: What it is called in the offer, if not as on disk.
        """
        assert self._process.stdin is not None
        order = {"to": to, "file": str(file), "name": name or file.name, "method": method}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self.next()

    def _log(self) -> str:
        return self._log_file.read_bytes()[-TAIL:].decode(errors="backslashreplace")


@contextlib.contextmanager
def open_plain_client(server: Server, user: str, directory: Path) -> Iterator[PlainClient]:
    """Have it logged in for as long as the block lasts; it does not die without goodbye.

    Args:
      server: Where.
      user: Whose account.
      directory: For what it receives.
    """
    jid = f"{user}@{DOMAIN}/plain"
    log_file = directory / "log"
    received = directory / "received"
    received.mkdir()
    argv = [sys.executable, "-m", "tests.support.slixmpp_peer", jid, server.password(user)]
    argv += [server.host, str(server.port), str(server.ca_file), str(received)]
    with (
        log_file.open("wb") as log,
        subprocess.Popen(
            argv, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        client = PlainClient(jid, process, log_file)
        try:
            assert client.next()["event"] == "online"
            yield client
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
