"""A machine that changes its network: its address goes, and it gets another one.

Nobody tells the connections. Packets from the old address cannot leave any more, and those to
it are lost, so each end only hears silence. The kernel tells whoever asks, and so syncd leaves
at once whatever hung on the address that has gone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support import networks as nets
from tests.support import servers
from tests.support.daemons import DELIVERY_TIMEOUT, digests
from tests.support.pair import MIB, noise, offset
from tests.support.processes import free_ports, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.daemons import Daemon, Daemons
    from tests.support.networks import Networks

# Slow enough to be caught in its middle, quick enough to end within the test.
SIZE = 16 * MIB  # bytes
SLOWLY = '[transfer]\nlimit_up = "2 MiB"\n'
CAUGHT = 4 * MIB  # bytes

# Beyond the time after which silence is found (50 s for a session, 60 s for a bytestream): then
# the logs tell what it was that was waited for.
PATIENCE = 3 * DELIVERY_TIMEOUT  # seconds


class Roaming:
    """Alice, who sends and who roams, and bob, who watches her."""

    def __init__(self, networks: Networks, alice: Daemon, bob: Daemon) -> None:
        self.networks = networks
        self.alice = alice
        self.bob = bob
        self._seen = {True}

    def until(self, true: Callable[[], object], what: str) -> None:
        """Wait for something; bob must see alice all the while."""

        def look() -> object:
            self._seen.add(self.bob.peer("alice").online)
            assert self._seen == {True}, "bob saw alice go"
            return true()

        until(look, what, PATIENCE)

    def said(self, words: str) -> int:
        """How often alice's log has something."""
        return self.alice.process.log_file.read_text(encoding="utf-8").count(words)

    def assert_delivered_in_one_session(self) -> None:
        """All of alice's files are at bob's, once, and hers is the session of the start."""
        self.until(lambda: self.alice.peer("bob").pending == 0, "nothing is owed")
        assert digests(self.bob.folder) == digests(self.alice.folder)
        assert self.alice.peer("bob").delivered == len(digests(self.alice.folder))
        assert (self.said("online as"), self.said(": resumed\n")) == (1, 1)
        assert self.said("may be lost") == 0
        assert self.said("this machine has other addresses") > 0


@pytest.fixture
def networks() -> Iterator[Networks]:
    """Two ends that reach each other and the server."""
    if lack := nets.missing() or servers.missing("prosody"):
        # As in test_networks: where it is to be there, its absence is a fault.
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(lack, pytrace=False)
        pytest.skip(lack)
    with nets.networks(routed=True) as made:
        yield made


@pytest.fixture
def roaming(networks: Networks, daemons: Daemons, tmp_path: Path) -> Iterator[Roaming]:
    """Both are there, and see each other."""
    with servers.prosody(
        tmp_path, address=networks.address, inside=networks.server, proxy=False
    ) as server:
        ports = free_ports(2)
        alice = daemons.make(
            "alice",
            server,
            send_to=["bob"],
            listen=ports[0],
            inside=networks.alice,
            extra=SLOWLY,
        )
        bob = daemons.make(
            "bob", server, accept_from=["alice"], listen=ports[1], inside=networks.bob
        )
        bob.start()
        alice.start()
        until(lambda: alice.peer("bob").online, "alice sees bob")
        until(lambda: bob.peer("alice").online, "bob sees alice")
        yield Roaming(networks, alice, bob)


def test_what_is_sent_into_the_gap_arrives_once_when_there_is_another_address(
    roaming: Roaming,
) -> None:
    """The offer is written to a connection that is dead, and nobody knows that yet."""
    roaming.networks.take_address("alice")
    roaming.alice.drop("in-the-gap", b"Hello, Bob!\n")
    roaming.until(lambda: roaming.alice.peer("bob").pending == 1, "the file is owed")
    roaming.networks.give_address("alice", 3)
    roaming.assert_delivered_in_one_session()
    assert roaming.said("was silent") == 0


def test_a_direct_transfer_survives_another_address(roaming: Roaming) -> None:
    roaming.alice.drop("big.bin", noise(SIZE))
    roaming.until(lambda: offset(roaming.bob) >= CAUGHT, "some of the file has arrived")
    roaming.networks.take_address("alice")
    roaming.networks.give_address("alice", 3)
    roaming.assert_delivered_in_one_session()
    assert (roaming.said("was silent"), roaming.said("no byte has moved")) == (0, 0)
