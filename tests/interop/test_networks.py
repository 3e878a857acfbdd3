"""Two daemons far apart: the way that the network leaves open is the way that is taken.

This is the trouble that syncd grew from: one end in a LAN, the other outside.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support import networks as nets
from tests.support import servers
from tests.support.daemons import DELIVERY_TIMEOUT, digests
from tests.support.pair import MIB, noise, transfers
from tests.support.processes import free_ports, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.daemons import Daemons
    from tests.support.networks import Networks

# What passes at once is seen by nobody: each way has a file that takes it a moment.
SIZES = {"direct": 96 * MIB, "proxy": 48 * MIB, "ibb": 1 * MIB}


@pytest.fixture(scope="session")
def _can_be_made() -> None:
    lack = nets.missing() or servers.missing("prosody")
    if lack:
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(lack, pytrace=False)
        pytest.skip(lack)


@pytest.fixture
def apart(_can_be_made: None) -> Iterator[Networks]:
    """Two ends that reach the server, and not each other."""
    with nets.networks(routed=False) as made:
        yield made


@pytest.fixture
def near(_can_be_made: None) -> Iterator[Networks]:
    """Two ends that reach each other too."""
    with nets.networks(routed=True) as made:
        yield made


def deliver(
    networks: Networks, daemons: Daemons, directory: Path, way: str, *, proxy: bool = True
) -> None:
    """Send a file from alice to bob; it takes this way, with no configuration for that."""
    with servers.prosody(
        directory, address=networks.address, inside=networks.server, proxy=proxy
    ) as server:
        ports = free_ports(2)
        alice = daemons.make(
            "alice", server, send_to=["bob"], listen=ports[0], inside=networks.alice
        )
        bob = daemons.make(
            "bob", server, accept_from=["alice"], listen=ports[1], inside=networks.bob
        )
        bob.start()
        alice.start()
        alice.drop("big.bin", noise(SIZES[way]))
        seen: set[str] = set()

        def arrived() -> bool:
            seen.update(each.method for each in transfers(bob) if each.method)
            return (bob.folder / "big.bin").exists()

        until(arrived, "the file is there", 2 * DELIVERY_TIMEOUT)
        alice.wait_delivered()
        assert seen == {way}
        assert digests(bob.folder) == digests(alice.folder)


def test_ends_that_reach_each_other_are_connected_directly(
    near: Networks, daemons: Daemons, tmp_path: Path
) -> None:
    deliver(near, daemons, tmp_path, "direct")


def test_ends_that_only_reach_the_proxy_use_it(
    apart: Networks, daemons: Daemons, tmp_path: Path
) -> None:
    deliver(apart, daemons, tmp_path, "proxy")


def test_ends_without_a_proxy_go_through_the_server(
    apart: Networks, daemons: Daemons, tmp_path: Path
) -> None:
    deliver(apart, daemons, tmp_path, "ibb", proxy=False)


@pytest.mark.usefixtures("_can_be_made")
def test_a_receiver_that_nobody_can_connect_to_connects_to_the_sender(
    daemons: Daemons, tmp_path: Path
) -> None:
    with nets.networks(routed=True, closed="bob") as networks:
        deliver(networks, daemons, tmp_path, "direct")


@pytest.mark.usefixtures("_can_be_made")
def test_a_sender_that_nobody_can_connect_to_uses_the_proxy(
    daemons: Daemons, tmp_path: Path
) -> None:
    with nets.networks(routed=True, closed="alice") as networks:
        deliver(networks, daemons, tmp_path, "proxy")


@pytest.mark.usefixtures("_can_be_made")
def test_a_sender_that_nobody_can_connect_to_goes_through_the_server_without_a_proxy(
    daemons: Daemons, tmp_path: Path
) -> None:
    with nets.networks(routed=True, closed="alice") as networks:
        deliver(networks, daemons, tmp_path, "ibb", proxy=False)
