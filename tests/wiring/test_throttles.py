from __future__ import annotations

from syncd.sync.limits import Rates
from syncd.wiring.throttles import Throttles
from syncd.xmpp.jid import JID

BOB, CAROL = JID.parse("bob@example.org"), JID.parse("carol@example.org")
MIB = 1 << 20  # bytes


def test_without_a_limit_nobody_waits() -> None:
    throttles = Throttles()
    assert throttles.up(BOB).take(1000 * MIB) == 0.0


def test_limit_of_all_holds_for_each_and_for_all_together() -> None:
    throttles = Throttles()
    throttles.change("", Rates(up=MIB))
    throttles.up(BOB).take(10 * MIB)
    assert 9.0 < throttles.up(CAROL).take(1) < 10.1


def test_limit_of_a_peer_holds_for_nobody_else() -> None:
    throttles = Throttles()
    throttles.change(str(BOB), Rates(up=MIB))
    assert throttles.up(BOB).take(10 * MIB) > 9.0
    assert throttles.up(CAROL).take(10 * MIB) == 0.0


def test_directions_have_limits_of_their_own() -> None:
    throttles = Throttles()
    throttles.change("", Rates(up=MIB))
    assert throttles.down(BOB).take(10 * MIB) == 0.0


def test_limit_that_is_set_later_holds_for_a_transfer_that_runs() -> None:
    throttles = Throttles()
    running = throttles.down(BOB)
    assert running.take(MIB) == 0.0
    throttles.change(str(BOB), Rates(down=MIB))
    assert running.take(10 * MIB) > 9.0


def test_limit_that_is_lifted_holds_no_more() -> None:
    throttles = Throttles()
    throttles.change("", Rates(up=MIB))
    throttles.change("", Rates())
    assert throttles.up(BOB).take(10 * MIB) == 0.0


def test_limit_that_changes_leaves_nothing_to_wait_for() -> None:
    throttles = Throttles()
    throttles.change("", Rates(up=MIB))
    running = throttles.up(BOB)
    before = running.limits
    assert running.take(80 * MIB) > 70.0
    throttles.change("", Rates(up=50 * 1024))
    assert running.take(MIB, before) == 0.0
    assert running.take(0) == 0.0


def test_limit_below_the_least_is_the_least() -> None:
    """A bytestream on which nothing moves for long would be given up by the peer."""
    throttles = Throttles()
    throttles.change("", Rates(up=1))
    assert throttles.up(BOB).take(2048) < 3.0
