"""Limits of bandwidth between real daemons: what is configured holds, what is said counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.daemons import digests
from tests.support.pair import MIB, noise, transfers
from tests.support.processes import until

if TYPE_CHECKING:
    from tests.support.daemons import Daemon, Daemons
    from tests.support.servers import Server

# At this rate the file would take minutes, longer than anything here is waited for.
SLOW = 64 * 1024  # bytes per second
SIZE = 32 * MIB


def has_begun(bob: Daemon) -> bool:
    return any(each.offset for each in transfers(bob))


def held_back(bob: Daemon) -> bool:
    """Whether some of the file has come, and hardly more than the limit lets through."""
    [transfer] = transfers(bob)
    return 0 < transfer.offset < SIZE // 4 and not (bob.folder / "big").exists()


def test_a_limit_of_the_sender_holds_until_it_is_lifted(
    server: Server, daemons: Daemons
) -> None:
    slow = f"[transfer]\nlimit_up = {SLOW}\n"
    alice = daemons.make("alice", server, send_to=["bob"], extra=slow)
    bob = daemons.make("bob", server, accept_from=["alice"])
    bob.start()
    alice.start()
    alice.drop("big", noise(SIZE))
    until(lambda: has_begun(bob), "the file is on its way")
    assert held_back(bob)
    assert alice.status().limit.up == SLOW
    lifted = alice.ctl("limit", "--up", "0")
    assert lifted.returncode == 0, lifted.stderr
    alice.wait_delivered()
    assert digests(bob.folder) == digests(alice.folder)


def test_a_limit_for_one_peer_of_the_receiver_holds_until_it_is_lifted(
    server: Server, daemons: Daemons
) -> None:
    peer = f'[[peer]]\njid = "alice@{server.domain}"\nlimit_down = {SLOW}\n'
    alice = daemons.make("alice", server, send_to=["bob"])
    bob = daemons.make("bob", server, accept_from=["alice"], extra=peer)
    bob.start()
    alice.start()
    alice.drop("big", noise(SIZE))
    until(lambda: has_begun(bob), "the file is on its way")
    assert held_back(bob)
    lifted = bob.ctl("limit", "--down", "0", f"alice@{server.domain}")
    assert lifted.returncode == 0, lifted.stderr
    alice.wait_delivered()
    assert digests(bob.folder) == digests(alice.folder)
