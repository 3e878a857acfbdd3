"""What syncd promises, between real daemons over real servers.

The bytes of most tests go through a `Gate`, which can hold them back: so a transfer is met in
its middle for certain, and every bytestream is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import digests, identities
from tests.support.gate import open_gate
from tests.support.pair import (
    ARRIVED,
    BIG,
    MIB,
    ODD_NAMES,
    Pair,
    assert_delivered,
    noise,
    until_all_there,
    visible,
)
from tests.support.processes import free_ports, until

if TYPE_CHECKING:
    from tests.support.daemons import Daemons
    from tests.support.servers import Server


# --- Whole files, whatever they are


def test_a_file_dropped_lies_at_the_peer(pair: Pair) -> None:
    pair.start()
    pair.alice.drop("hello.txt", b"Hello, Bob!\n")
    assert_delivered(pair)
    assert pair.alice.peer("bob").delivered == 1
    assert (pair.bob.folder / "hello.txt").read_bytes() == b"Hello, Bob!\n"


def test_files_that_lie_there_before_the_start_are_delivered(pair: Pair) -> None:
    pair.alice.drop("before.txt", b"early")
    pair.start()
    assert_delivered(pair)


def test_an_empty_file_is_delivered(pair: Pair) -> None:
    pair.start()
    pair.alice.drop("empty", b"")
    assert_delivered(pair)
    assert (pair.bob.folder / "empty").stat().st_size == 0


def test_a_tree_is_delivered_with_its_directories(pair: Pair) -> None:
    pair.start()
    for number, path in enumerate(["a", "d/a", "d/e/a", "d/e/f/g/h/a", "d2/b", "d2/c"]):
        pair.alice.drop(path, noise(1 + 5000 * number, seed=number))
    assert_delivered(pair)
    assert pair.alice.peer("bob").delivered == 6


def test_a_tree_moved_in_as_a_whole_is_delivered(pair: Pair) -> None:
    """One event tells of the directory, none of what is in it."""
    pair.start()
    outside = pair.alice.folder.parent / "outside"
    for number in range(20):
        file = outside / f"{number % 4}" / f"{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(noise(1000 + number, seed=number))
    outside.rename(pair.alice.folder / "moved")
    assert_delivered(pair)
    assert len(digests(pair.bob.folder)) == 20


def test_odd_names_arrive_as_they_are(pair: Pair) -> None:
    pair.start()
    for number, name in enumerate(ODD_NAMES):
        pair.alice.drop(name, noise(100 + number, seed=number))
    assert_delivered(pair)
    assert set(digests(pair.bob.folder)) == set(ODD_NAMES)


def test_a_name_that_cannot_be_sent_is_said_and_holds_nothing_up(pair: Pair) -> None:
    pair.start()
    pair.alice.drop("new\nline", b"never sent")
    pair.alice.drop("other", b"sent")
    until(lambda: (pair.bob.folder / "other").exists(), "the other file is there")
    until(lambda: pair.alice.peer("bob").parked == 1, "the odd file is put aside")
    status = pair.alice.status()
    assert status.state == "problem"
    assert "no file name should have" in status.summary
    assert set(digests(pair.bob.folder)) == {"other"}


def test_a_large_file_arrives_byte_for_byte(pair: Pair) -> None:
    pair.start()
    pair.alice.drop("large.bin", noise(64 * MIB))
    until_all_there(pair)
    assert_delivered(pair)


def test_the_time_of_the_last_change_arrives_too(pair: Pair) -> None:
    pair.start()
    sent = pair.alice.drop("dated", b"content")
    assert_delivered(pair)
    assert (pair.bob.folder / "dated").stat().st_mtime_ns == sent.stat().st_mtime_ns


# --- A changed file


@pytest.mark.parametrize("how", ["renamed", "in place"])
def test_a_new_version_replaces_the_old_one(pair: Pair, how: str) -> None:
    pair.start()
    file = pair.alice.drop("report", noise(3 * MIB, seed=1))
    assert_delivered(pair)
    if how == "renamed":
        pair.alice.drop("report", noise(2 * MIB, seed=2))
    else:
        file.write_bytes(noise(2 * MIB, seed=2))
    assert_delivered(pair)
    assert (pair.bob.folder / "report").read_bytes() == noise(2 * MIB, seed=2)


def test_what_the_receiver_changed_is_kept_beside_the_new_version(pair: Pair) -> None:
    pair.start()
    pair.alice.drop("report", b"first")
    assert_delivered(pair)
    (pair.bob.folder / "report").write_bytes(b"bob's own notes")
    pair.alice.drop("report", b"second")
    pair.alice.wait_delivered()
    kept = {file.read_bytes() for file in pair.bob.folder.iterdir() if file.is_file()}
    assert kept == {b"bob's own notes", b"second"}


# --- Peers and servers that come and go


def test_files_wait_for_a_peer_that_is_offline(pair: Pair) -> None:
    pair.alice.start()
    for number in range(3):
        pair.alice.drop(f"{number}.txt", noise(1000, seed=number))
    until(lambda: pair.alice.peer("bob").pending == 3, "three files are owed")

    status = pair.alice.status()
    assert status.state == "waiting"
    assert "bob@example.test" in status.summary
    assert not pair.alice.peer("bob").online
    shown = pair.alice.ctl("status")
    assert shown.returncode == 4
    assert "bob@example.test" in shown.stdout
    assert pair.alice.ctl("wait", "--timeout", "0.5").returncode == 3

    pair.bob.start()
    assert_delivered(pair)
    assert pair.alice.peer("bob").delivered == 3


def test_files_that_wait_survive_a_restart_of_the_sender(pair: Pair) -> None:
    pair.alice.start()
    pair.alice.drop("file", b"content")
    until(lambda: pair.alice.peer("bob").pending == 1, "the file is owed")
    pair.alice.kill9()
    pair.start()
    assert_delivered(pair)


def test_both_come_back_when_the_server_was_restarted(server: Server, pair: Pair) -> None:
    pair.start()
    pair.alice.drop("before", b"1")
    assert_delivered(pair)
    server.restart()
    pair.alice.drop("after", b"2")
    assert_delivered(pair)


# --- Killed in the middle


@pytest.mark.parametrize("victim", ["receiver", "sender"])
def test_a_transfer_goes_on_after_a_crash(held: Pair, victim: str) -> None:
    """The whole file arrives, is never seen before, and what had arrived is not sent again."""
    killed = held.bob if victim == "receiver" else held.alice
    assert visible(held.bob) == set()
    killed.kill9()
    assert visible(held.bob) == set()
    held.gate.open()
    killed.start()
    until_all_there(held)
    assert_delivered(held)
    assert held.gate.passed[-1] <= BIG - ARRIVED


def test_a_transfer_goes_on_when_both_crashed(held: Pair) -> None:
    held.bob.kill9()
    held.alice.kill9()
    held.gate.open()
    held.start()
    until_all_there(held)
    assert_delivered(held)


def test_a_transfer_goes_on_after_an_orderly_restart(held: Pair) -> None:
    assert held.bob.terminate() == 0
    assert held.alice.terminate() == 0
    assert visible(held.bob) == set()
    held.gate.open()
    held.start()
    until_all_there(held)
    assert_delivered(held)


def test_a_transfer_survives_a_restart_of_the_server(held: Pair, server: Server) -> None:
    """Direct bytes need no server."""
    server.stop()
    held.gate.open()
    server.start()
    until_all_there(held)
    assert_delivered(held)


def test_a_file_changed_on_its_way_arrives_in_its_new_version(held: Pair) -> None:
    held.alice.drop("big.bin", noise(3 * MIB, seed=9))
    held.gate.open()
    until_all_there(held)
    assert_delivered(held)


# --- Nothing twice


def test_a_restart_sends_nothing_twice(pair: Pair) -> None:
    """A file dropped after the restart shows that the others were looked at, too."""
    pair.start()
    for number in range(5):
        pair.alice.drop(f"{number}/file", noise(20_000, seed=number))
    assert_delivered(pair)
    there, streams = identities(pair.bob.folder), len(pair.gate.passed)

    assert pair.alice.terminate() == 0
    assert pair.bob.terminate() == 0
    pair.start()
    pair.alice.drop("marker", b"after the restart")
    assert_delivered(pair)

    now = identities(pair.bob.folder)
    del now["marker"]
    assert now == there
    assert len(pair.gate.passed) == streams + 1


def test_what_arrived_is_not_sent_back(server: Server, daemons: Daemons) -> None:
    """Between two folders that both send and receive, every file travels once."""
    ports = iter(free_ports(4))
    with (
        open_gate(next(ports), next(ports)) as out,
        open_gate(next(ports), next(ports)) as back,
    ):
        alice, bob = (
            daemons.make(
                user,
                server,
                send_to=[other],
                accept_from=[other],
                listen=gate.target,
                advertise=gate.port,
                only_direct=True,
            )
            for user, other, gate in [("alice", "bob", out), ("bob", "alice", back)]
        )
        alice.start()
        bob.start()
        alice.drop("from/alice", noise(30_000, seed=1))
        alice.wait_delivered()
        own = identities(alice.folder)
        bob.drop("from/bob", noise(40_000, seed=2))
        bob.wait_delivered()
        bobs = identities(bob.folder)
        # Asked again, both look through their folders anew.
        alice.wait_delivered()
        bob.wait_delivered()

        assert digests(alice.folder) == digests(bob.folder)
        assert set(digests(alice.folder)) == {"from/alice", "from/bob"}
        assert identities(alice.folder)["from/alice"] == own["from/alice"]
        assert identities(bob.folder) == bobs
        assert (alice.peer("bob").delivered, bob.peer("alice").delivered) == (1, 1)
        assert (len(out.passed), len(back.passed)) == (1, 1)


def test_a_file_is_edited_in_turns(server: Server, daemons: Daemons) -> None:
    """Each edits what it had from the other; nothing is kept twice."""
    alice, bob = (
        daemons.make(user, server, send_to=[other], accept_from=[other])
        for user, other in [("alice", "bob"), ("bob", "alice")]
    )
    alice.start()
    bob.start()
    alice.drop("report", b"alice's")
    alice.wait_delivered()
    bob.drop("report", b"alice's, and bob's")
    bob.wait_delivered()
    assert digests(alice.folder) == digests(bob.folder)
    alice.drop("report", b"alice's, and bob's, and alice's again")
    alice.wait_delivered()
    expected = b"alice's, and bob's, and alice's again"
    for end in (alice, bob):
        assert list(digests(end.folder)) == ["report"]
        assert (end.folder / "report").read_bytes() == expected


def test_one_file_goes_to_every_peer(server: Server, daemons: Daemons) -> None:
    alice = daemons.make("alice", server, send_to=["bob", "carol"])
    others = [daemons.make(user, server, accept_from=["alice"]) for user in ("bob", "carol")]
    for daemon in (alice, *others):
        daemon.start()
    alice.drop("file", noise(MIB))
    alice.wait_delivered()
    assert [digests(other.folder) for other in others] == 2 * [digests(alice.folder)]
