"""Fixtures of the tests between two real daemons."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support import servers
from tests.support.daemons import DELIVERY_TIMEOUT
from tests.support.gate import open_gate
from tests.support.pair import ARRIVED, BIG, FIRST, Pair, noise, offset
from tests.support.processes import free_ports, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemons import Daemons
    from tests.support.servers import Server


@pytest.fixture(
    params=[pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in servers.KINDS]
)
def kind(request: pytest.FixtureRequest) -> str:
    """One kind of server after the other, for tests that configure their own."""
    name: str = request.param
    if lack := servers.missing(name):
        # As in tests/conftest.py: where it is to be there, its absence is a fault.
        if os.environ.get("CI"):
            pytest.fail(lack, pytrace=False)
        pytest.skip(lack)
    return name


@pytest.fixture
def pair(server: Server, daemons: Daemons) -> Iterator[Pair]:
    """A pair whose gate is open; neither is started."""
    listen, advertise = free_ports(2)
    with open_gate(advertise, listen) as gate:
        yield Pair(
            alice=daemons.make(
                "alice",
                server,
                send_to=["bob"],
                listen=listen,
                advertise=advertise,
                only_direct=True,
            ),
            bob=daemons.make("bob", server, accept_from=["alice"], only_direct=True),
            gate=gate,
        )


@pytest.fixture
def held(pair: Pair) -> Pair:
    """A pair, started, in the middle of a big file that the gate holds."""
    pair.gate.hold_after(FIRST)
    pair.start()
    pair.alice.drop("big.bin", noise(BIG))
    until(lambda: offset(pair.bob) >= ARRIVED, "some of the file has arrived", DELIVERY_TIMEOUT)
    return pair
