"""Keys between real daemons: the first one, the same one, another one, and what people decide.

The words, the stop over a changed key, the block and the change that the old key has signed,
as `syncctl` shows and takes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from syncd.trust.identity import FILE
from tests.support.daemons import DELIVERY_TIMEOUT
from tests.support.processes import until
from tests.support.servers import DOMAIN

if TYPE_CHECKING:
    from tests.support.daemons import Daemon, Daemons
    from tests.support.servers import Server

ALICE, BOB = f"alice@{DOMAIN}", f"bob@{DOMAIN}"


def couple(
    server: Server, daemons: Daemons, policy: str = "preferred"
) -> tuple[Daemon, Daemon]:
    """Alice, who sends to Bob; both run."""
    extra = f'\n[transfer]\nencryption = "{policy}"\n'
    alice = daemons.make("alice", server, send_to=["bob"], only_direct=True, extra=extra)
    bob = daemons.make("bob", server, accept_from=["alice"], only_direct=True, extra=extra)
    for daemon in (bob, alice):
        daemon.start()
    return alice, bob


def deliver(alice: Daemon, bob: Daemon, name: str) -> None:
    alice.drop(name, name.encode())
    alice.wait_delivered()
    assert (bob.folder / name).read_bytes() == name.encode()


def until_parked(alice: Daemon, text: str) -> str:
    """Wait until something needs a person; returns the hint."""
    until(lambda: alice.peer("bob").parked, "a delivery is parked", DELIVERY_TIMEOUT)
    bob = alice.peer("bob")
    assert text in bob.problem
    return bob.hint


def said(daemon: Daemon, *arguments: str) -> list[str]:
    """What syncctl prints, which must succeed."""
    done = daemon.ctl(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.splitlines()


def value(lines: list[str], name: str) -> str:
    [found] = [line for line in lines if line.strip().startswith(f"{name}:")]
    return found.partition(":")[2].strip()


def verify(daemon: Daemon, peer: str) -> None:
    """Say that the key is the peer's, whichever it is."""
    seen = value(said(daemon, "peer", "show", peer), "fingerprint")
    said(daemon, "peer", "verify", peer, "--fingerprint", seen)


def renew(daemon: Daemon) -> None:
    """Let a daemon come back as somebody who has set it up anew: with another key."""
    assert daemon.terminate() == 0
    (daemon.folder.parent / "state" / FILE).unlink()
    daemon.start()


def test_both_ends_show_the_same_words_and_each_the_key_of_the_other(
    server: Server, daemons: Daemons
) -> None:
    alice, bob = couple(server, daemons, "required")
    deliver(alice, bob, "a")
    at_alice, at_bob = said(alice, "peer", "show", BOB), said(bob, "peer", "show", ALICE)
    assert value(at_alice, "words") == value(at_bob, "words")
    assert len(value(at_alice, "words").split()) == 6
    assert value(at_alice, "fingerprint") == value(said(bob, "key", "show"), "our own key")
    assert value(at_bob, "fingerprint") == value(said(alice, "peer", "list"), "our own key")
    assert alice.peer("bob").encryption == "unverified"

    wrong = alice.ctl("peer", "verify", BOB, "--fingerprint", value(at_bob, "fingerprint"))
    assert wrong.returncode == 1
    assert alice.peer("bob").encryption == "unverified"
    said(alice, "peer", "verify", BOB, "--fingerprint", value(at_alice, "fingerprint"))
    assert alice.peer("bob").encryption == "verified"
    deliver(alice, bob, "b")


def test_changed_key_of_the_receiver_stops_the_sender_until_a_person_decides(
    server: Server, daemons: Daemons
) -> None:
    alice, bob = couple(server, daemons)
    deliver(alice, bob, "a")
    known = value(said(bob, "key", "show"), "our own key")
    renew(bob)
    shown = value(said(bob, "key", "show"), "our own key")
    alice.drop("b", b"b")
    hint = until_parked(alice, "shows another key than before")
    assert f"syncctl peer reset-key {BOB}" in hint
    assert not (bob.folder / "b").exists()
    assert alice.peer("bob").encryption == "changed"
    lines = said(alice, "peer", "show", BOB)
    assert (value(lines, "fingerprint"), value(lines, "it shows now")) == (known, shown)

    said(alice, "peer", "reset-key", BOB)
    alice.wait_delivered()
    assert (bob.folder / "b").read_bytes() == b"b"
    assert value(said(alice, "peer", "show", BOB), "fingerprint") == shown


def test_changed_key_of_the_sender_stops_at_the_receiver(
    server: Server, daemons: Daemons
) -> None:
    alice, bob = couple(server, daemons)
    deliver(alice, bob, "a")
    renew(alice)
    alice.drop("b", b"b")
    until_parked(alice, "shows another key than before")
    assert not (bob.folder / "b").exists()
    assert bob.ctl("peer", "show", ALICE).stdout.startswith(f"{ALICE}: CHANGED")

    said(bob, "peer", "reset-key", ALICE)
    # The sender was refused; it tries again when a person there has decided something, too.
    verify(alice, BOB)
    alice.wait_delivered()
    assert (bob.folder / "b").read_bytes() == b"b"


def test_key_that_the_old_one_has_signed_is_taken_over_by_itself(
    server: Server, daemons: Daemons
) -> None:
    alice, bob = couple(server, daemons)
    deliver(alice, bob, "a")
    verify(alice, BOB)
    verify(bob, ALICE)
    old = value(said(alice, "key", "show"), "our own key")
    new = value(said(alice, "key", "rotate"), "our own key")
    assert new != old
    deliver(alice, bob, "b")
    said(bob, "key", "rotate")
    deliver(alice, bob, "c")
    assert value(said(bob, "peer", "show", ALICE), "fingerprint") == new
    assert bob.peer("alice").encryption == alice.peer("bob").encryption == "verified"
    # It is the new one that is on disk.
    assert alice.terminate() == 0
    alice.start()
    assert value(said(alice, "key", "show"), "our own key") == new
    deliver(alice, bob, "d")


def test_who_is_blocked_gets_nothing_until_the_block_is_lifted(
    server: Server, daemons: Daemons
) -> None:
    alice, bob = couple(server, daemons)
    deliver(alice, bob, "a")
    said(bob, "peer", "block", ALICE)
    alice.drop("b", b"b")
    until_parked(alice, "is blocked")
    assert not (bob.folder / "b").exists()
    assert said(bob, "peer", "list")[1].startswith(f"{ALICE}: blocked")
    said(bob, "peer", "reset-key", ALICE)
    verify(alice, BOB)
    alice.wait_delivered()
    assert (bob.folder / "b").read_bytes() == b"b"


def test_nothing_is_plain_where_that_is_not_wanted(server: Server, daemons: Daemons) -> None:
    """Nor is a file that must be sealed given to somebody who does not seal."""
    required, off = '[transfer]\nencryption = "required"\n', '[transfer]\nencryption = "off"\n'
    alice = daemons.make("alice", server, send_to=["bob"], only_direct=True, extra=required)
    bob = daemons.make("bob", server, accept_from=["alice"], only_direct=True, extra=off)
    for daemon in (bob, alice):
        daemon.start()
    alice.drop("a", b"a")
    until_parked(alice, "cannot encrypt, and encryption is required")
    assert alice.peer("bob").encryption == "impossible"
    assert not (bob.folder / "a").exists()
