from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import ErrorType, StanzaError
from syncd.wiring.allowances import (
    DAY,
    HOUR,
    OFFER_BURST,
    OFFER_RATE,
    Allowance,
    Allowances,
)
from syncd.xmpp.jid import JID

BOB = JID.parse("bob@example.org")
CAROL = JID.parse("carol@example.org")
WAIT, NEVER = (
    (ErrorType.WAIT, "resource-constraint"),
    (ErrorType.CANCEL, "not-acceptable"),
)


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def allowance(clock: Clock, *, max_file: int = 0, quota: int = 0) -> Allowance:
    return Allowance(clock, max_file=max_file, quota=quota)


def refused(error: StanzaError) -> tuple[ErrorType, str]:
    return error.type, error.condition


def offers(given: Allowance) -> int:
    """How many offers are taken until one is refused, for the right reason."""
    for count in range(OFFER_BURST + 2):
        try:
            given.admit()
        except StanzaError as error:
            return count if refused(error) == WAIT else -1
    raise AssertionError("there is no end of them")


def test_offers_beyond_any_disk_are_to_come_later() -> None:
    clock = Clock()
    bob = allowance(clock)
    assert offers(bob) == OFFER_BURST
    clock.now += 0.5
    assert offers(bob) == OFFER_RATE / 2
    clock.now += 1e6
    assert offers(bob) == OFFER_BURST


def test_one_who_floods_takes_nothing_from_others() -> None:
    all_of_them = Allowances(Clock(), {})
    assert offers(all_of_them.of(BOB)) == OFFER_BURST
    assert offers(all_of_them.of(CAROL)) == OFFER_BURST
    assert all_of_them.of(BOB) is all_of_them.of(BOB)


def test_without_limits_any_file_may_come() -> None:
    bob = allowance(Clock())
    bob.check(2**63 - 1)
    for _ in range(3):
        assert bob.reserve(2**63 - 1, known=True) == 2**63 - 1
        assert bob.reserve(1 << 40, known=False) == 1 << 40


def test_a_file_that_can_never_come_is_refused_for_good() -> None:
    for bob in (allowance(Clock(), max_file=10), allowance(Clock(), quota=10)):
        bob.check(10)
        with pytest.raises(StanzaError, match="11 bytes; 10 are accepted") as caught:
            bob.check(11)
        assert refused(caught.value) == NEVER


def test_limits_are_those_of_their_peer() -> None:
    all_of_them = Allowances(Clock(), {BOB: (10, 0)})
    all_of_them.of(CAROL).check(11)
    with pytest.raises(StanzaError):
        all_of_them.of(BOB).check(11)


def test_what_was_accepted_counts_before_it_comes() -> None:
    """Or many offers at once would bring many times the quota."""
    bob = allowance(Clock(), quota=100)
    assert bob.reserve(60, known=True) == 60
    with pytest.raises(StanzaError) as caught:
        bob.reserve(41, known=True)
    assert refused(caught.value) == WAIT
    assert bob.reserve(40, known=True) == 40
    assert bob.reserve(0, known=True) == 0


def test_what_did_not_come_may_still_come() -> None:
    bob = allowance(Clock(), quota=100)
    bob.settle(bob.reserve(100, known=True), 30)
    assert bob.reserve(70, known=True) == 70
    with pytest.raises(StanzaError):
        bob.reserve(1, known=True)


def test_of_a_file_of_unknown_length_only_so_much_may_come() -> None:
    bob = allowance(Clock(), max_file=50, quota=80)
    assert bob.reserve(1 << 40, known=False) == 50
    assert bob.reserve(1 << 40, known=False) == 30
    with pytest.raises(StanzaError) as caught:
        bob.reserve(1 << 40, known=False)
    assert refused(caught.value) == WAIT


def test_a_day_later_it_is_forgotten() -> None:
    clock = Clock()
    bob = allowance(clock, quota=100)
    for _ in range(4):
        bob.settle(bob.reserve(25, known=True), 25)
        clock.now += HOUR
    with pytest.raises(StanzaError):
        bob.reserve(1, known=True)
    clock.now += (DAY - 3) * HOUR
    bob.settle(bob.reserve(25, known=True), 25)
    with pytest.raises(StanzaError):
        bob.reserve(1, known=True)


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 60), st.floats(0, 5 * HOUR)), max_size=60
    )
)
def test_no_more_than_the_quota_comes_in_any_day(steps: list[tuple[int, int, float]]) -> None:
    clock = Clock()
    bob = allowance(clock, quota=100)
    came: list[tuple[float, int]] = []
    for wanted, part, pause in steps:
        try:
            granted = bob.reserve(wanted, known=True)
        except StanzaError:
            granted = 0
        count = min(granted, part)
        bob.settle(granted, count)
        came.append((clock.now, count))
        assert sum(each for when, each in came if when > clock.now - DAY * HOUR) <= 100
        clock.now += pause
        assert len(bob._came) <= DAY + 2
