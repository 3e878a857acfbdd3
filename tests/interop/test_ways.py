"""Every way on its own, between real daemons over real servers: whole, and whole again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from syncd.disk.blocks import MIN_BLOCK
from tests.support import servers
from tests.support.daemons import DELIVERY_TIMEOUT, digests
from tests.support.pair import MIB, noise, offset, transfers
from tests.support.processes import until
from tests.support.ways import WAYS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemons import Daemon, Daemons
    from tests.support.servers import Server

# How much through the server, whose stanzas are slow, and how much of it before somebody dies.
SMALL = 5 * MIB  # bytes
SMALL_PART = 2 * MIB  # bytes

# How much by a proxy; with the limit it lasts long enough to be met in its middle.
LARGE = 64 * MIB  # bytes
LARGE_PART = 16 * MIB  # bytes
LIMIT = '[transfer]\nlimit_up = "16 MiB"\n'

# A crash loses less than a block of what had arrived.
FORGOTTEN = MIN_BLOCK

# Per second; enough for the test to end soon, and far less than the daemons could do.
RATE = 100_000  # bytes/s


class Couple:
    """Alice, who sends to bob, by one way and no other; neither is started.

    Attributes:
      alice: Her daemon.
      bob: His.
      seen: By which ways bob has received, and the least that was there.
    """

    def __init__(self, daemons: Daemons, server: Server, way: str, *, extra: str = "") -> None:
        settings = WAYS[way]
        self.alice: Daemon = daemons.make(
            "alice", server, send_to=["bob"], bytestreams=settings, extra=extra
        )
        self.bob: Daemon = daemons.make(
            "bob", server, accept_from=["alice"], bytestreams=settings
        )
        self.seen: dict[str, int] = {}

    def start(self) -> None:
        self.bob.start()
        self.alice.start()

    def look(self) -> None:
        for each in transfers(self.bob):
            if each.method:
                before = self.seen.get(each.method, each.offset)
                self.seen[each.method] = min(before, each.offset)

    def arrives(self, name: str) -> None:
        """Wait until a file is there whole, and compare."""

        def there() -> bool:
            self.look()
            return (self.bob.folder / name).exists()

        until(there, "the file is there", 2 * DELIVERY_TIMEOUT)
        self.alice.wait_delivered()
        assert digests(self.bob.folder) == digests(self.alice.folder)
        peer = self.alice.peer("bob")
        assert (peer.pending, peer.problem, peer.delivered) == (0, "", 1)


# --- Through the server


@pytest.fixture
def inband(server: Server, daemons: Daemons) -> Couple:
    """Who can only go through the server."""
    return Couple(daemons, server, "ibb")


def test_a_file_goes_through_the_server(inband: Couple) -> None:
    inband.start()
    inband.alice.drop("file", noise(SMALL))
    inband.arrives("file")
    assert set(inband.seen) == {"ibb"}


@pytest.mark.parametrize("victim", ["receiver", "sender"])
def test_through_the_server_a_transfer_goes_on_after_a_crash(
    inband: Couple, victim: str
) -> None:
    inband.start()
    inband.alice.drop("file", noise(SMALL))
    until(lambda: offset(inband.bob) >= SMALL_PART, "some has arrived", DELIVERY_TIMEOUT)
    killed = inband.bob if victim == "receiver" else inband.alice
    killed.kill9()
    assert digests(inband.bob.folder).get("file") is None
    killed.start()
    inband.arrives("file")
    assert set(inband.seen) == {"ibb"}
    assert inband.seen["ibb"] >= SMALL_PART - FORGOTTEN


def test_through_a_server_that_limits_the_rate_a_file_arrives(
    daemons: Daemons, tmp_path: Path
) -> None:
    if lack := servers.missing("prosody"):
        if os.environ.get("CI"):
            pytest.fail(lack, pytrace=False)
        pytest.skip(lack)
    with servers.prosody(tmp_path, rate=RATE) as server:
        couple = Couple(daemons, server, "ibb")
        couple.start()
        couple.alice.drop("file", noise(6 * RATE))
        couple.arrives("file")
        assert set(couple.seen) == {"ibb"}
        assert couple.alice.peer("bob").last_error == ""


# --- By a proxy


def test_a_large_file_goes_by_the_proxy_of_the_server(server: Server, daemons: Daemons) -> None:
    couple = Couple(daemons, server, "proxy")
    couple.start()
    couple.alice.drop("file", noise(LARGE))
    couple.arrives("file")
    assert set(couple.seen) == {"proxy"}


def test_when_the_proxy_dies_the_transfer_goes_on_by_it_later(
    server: Server, daemons: Daemons
) -> None:
    """It dies with its server, so that nobody can say a word about it meanwhile."""
    couple = Couple(daemons, server, "proxy", extra=LIMIT)
    couple.start()
    couple.alice.drop("file", noise(LARGE))
    until(lambda: offset(couple.bob) >= LARGE_PART, "some has arrived", DELIVERY_TIMEOUT)
    server.kill()
    until(lambda: not transfers(couple.bob), "the transfer is broken off")
    assert digests(couple.bob.folder).get("file") is None
    server.start()
    couple.arrives("file")
    assert set(couple.seen) == {"proxy"}
    # Nobody crashed who had anything to forget.
    assert couple.seen["proxy"] >= LARGE_PART
