"""Where there is no IPv4: the stream, the proxy and the direct way over IPv6 alone."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.support import servers
from tests.support.daemons import digests
from tests.support.pair import MIB, noise
from tests.support.ways import WAYS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.daemons import Daemons
    from tests.support.servers import Server

LISTEN = 'listen = "[::1]:0"'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Prosody that IPv4 does not lead to."""
    lack = servers.missing("prosody")
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        lack = f"there is no IPv6 here: {error}"
    if lack and os.environ.get("CI"):
        pytest.fail(lack, pytrace=False)
    if lack:
        pytest.skip(lack)
    with servers.prosody(tmp_path, address="::1") as running:
        yield running


@pytest.mark.prosody
@pytest.mark.parametrize("way", WAYS)
def test_over_ipv6_alone_a_file_arrives(server: Server, daemons: Daemons, way: str) -> None:
    bob = daemons.make("bob", server, accept_from=["alice"], bytestreams=WAYS[way])
    alice = daemons.make("alice", server, send_to=["bob"], bytestreams=WAYS[way])
    for daemon in (bob, alice):
        text = daemon.config_file.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith(("listen", "adv"))]
        lines.insert(lines.index("[bytestreams]") + 1, LISTEN)
        daemon.config_file.write_text("\n".join(lines), encoding="utf-8")
        daemon.start()
    alice.drop("file", noise(MIB))
    alice.wait_delivered()
    assert digests(bob.folder) == digests(alice.folder)
    assert alice.status().connection.server == f"[::1]:{server.port}"
