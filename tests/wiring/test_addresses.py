"""Changes of the machine's addresses: who is told of them, with a kernel of our own."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from syncd.wiring.addresses import SETTLE, is_ours, watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock


class Machine:
    """What has addresses, and a kernel that tells when that changes."""

    def __init__(self, listening: socket.socket | None = None) -> None:
        self.addresses = ["192.0.2.1"]
        self.told: list[float] = []
        self.kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        if listening is not None:
            ours.close()
        self.listening = listening or ours

    def changed(self) -> None:
        self.told.append(trio.current_time())

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: watch(
                    self.changed,
                    addresses=lambda: list(self.addresses),
                    listen=lambda: self.listening,
                )
            )
            await wait_all_tasks_blocked()
            with self.kernel:
                yield
            nursery.cancel_scope.cancel()


async def test_another_address_is_told_once_when_it_is_of_use(
    autojump_clock: MockClock,
) -> None:
    machine = Machine()
    async with machine.watched():
        machine.kernel.send(b"one went")
        machine.kernel.send(b"another came")
        await trio.sleep(SETTLE / 2)
        machine.addresses = ["198.51.100.7"]
        await trio.sleep(10 * SETTLE)
        assert machine.told == [SETTLE]
        machine.addresses = []
        machine.kernel.send(b"it went")
        await trio.sleep(10 * SETTLE)
        assert machine.told == [SETTLE, 11.5 * SETTLE]


async def test_an_address_that_only_stays_for_longer_is_no_change(
    autojump_clock: MockClock,
) -> None:
    """Routers renew those of IPv6 every few minutes."""
    machine = Machine()
    async with machine.watched():
        machine.kernel.send(b"for another hour")
        await trio.sleep(10 * SETTLE)
        assert machine.told == []


async def test_what_the_kernel_could_not_keep_for_us_counts_as_well(
    autojump_clock: MockClock,
) -> None:
    """An error instead of a message: here because what was sent has reached nobody."""
    listening, gone = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with gone:
        gone.bind(("127.0.0.1", 0))
        listening.connect(gone.getsockname())
    machine = Machine(listening)
    async with machine.watched():
        listening.send(b"to nobody")
        machine.addresses = []
        await trio.sleep(10 * SETTLE)
        assert machine.told == [SETTLE]


async def test_where_the_kernel_cannot_be_asked_nothing_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def forbidden() -> socket.socket:
        raise PermissionError("Operation not permitted")

    caplog.set_level("INFO")
    machine = Machine()
    with machine.kernel, machine.listening:
        await watch(machine.changed, listen=forbidden)
    assert machine.told == []
    assert "go unnoticed: Operation not permitted" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1", "::1"])
def test_an_address_of_this_machine_is_known(host: str) -> None:
    assert is_ours(host)


@pytest.mark.parametrize("host", ["192.0.2.77", "::ffff:192.0.2.77", "2001:db8::77"])
def test_an_address_of_nobody_here_is_not_ours(host: str) -> None:
    """Of the ranges that documentation may use, and no machine has."""
    assert not is_ours(host)


@pytest.mark.skipif(not hasattr(socket, "AF_NETLINK"), reason="netlink is of Linux")
async def test_the_real_kernel_can_be_asked(caplog: pytest.LogCaptureFixture) -> None:
    """By anybody; that it tells is proved by the daemons that change their network."""
    caplog.set_level("INFO")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, lambda: None)
        await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        nursery.cancel_scope.cancel()
    assert caplog.messages == []
