from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import ErrorType, StanzaError
from syncd.wiring.allowances import (
    DAY,
    ENTRY,
    HOUR,
    OFFER_BURST,
    OFFER_RATE,
    Allowance,
    Allowances,
    Terms,
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


def allowance(
    clock: Clock, *, max_file: int = 0, quota: int = 0, max_files: int = 0
) -> Allowance:
    return Allowance(clock, Terms(max_file=max_file, quota=quota, max_files=max_files))


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
        assert bob.reserve(2**63 - 1, known=True, entries=0) == 2**63 - 1
        assert bob.reserve(1 << 40, known=False, entries=0) == 1 << 40


def test_a_file_that_can_never_come_is_refused_for_good() -> None:
    for bob in (allowance(Clock(), max_file=10), allowance(Clock(), quota=10)):
        bob.check(10)
        with pytest.raises(StanzaError, match="11 bytes; 10 are accepted") as caught:
            bob.check(11)
        assert refused(caught.value) == NEVER


def test_limits_are_those_of_their_peer() -> None:
    all_of_them = Allowances(Clock(), {BOB: Terms(max_file=10)})
    all_of_them.of(CAROL).check(11)
    with pytest.raises(StanzaError):
        all_of_them.of(BOB).check(11)


def test_what_was_accepted_counts_before_it_comes() -> None:
    """Or many offers at once would bring many times the quota."""
    bob = allowance(Clock(), quota=100)
    assert bob.reserve(60, known=True, entries=0) == 60
    with pytest.raises(StanzaError) as caught:
        bob.reserve(41, known=True, entries=0)
    assert refused(caught.value) == WAIT
    assert bob.reserve(40, known=True, entries=0) == 40
    assert bob.reserve(0, known=True, entries=0) == 0


def test_what_did_not_come_may_still_come() -> None:
    bob = allowance(Clock(), quota=100)
    bob.settle(bob.reserve(100, known=True, entries=0), 30, entries=0, made=0)
    assert bob.reserve(70, known=True, entries=0) == 70
    with pytest.raises(StanzaError):
        bob.reserve(1, known=True, entries=0)


def test_of_a_file_of_unknown_length_only_so_much_may_come() -> None:
    bob = allowance(Clock(), max_file=50, quota=80)
    assert bob.reserve(1 << 40, known=False, entries=0) == 50
    assert bob.reserve(1 << 40, known=False, entries=0) == 30
    with pytest.raises(StanzaError) as caught:
        bob.reserve(1 << 40, known=False, entries=0)
    assert refused(caught.value) == WAIT


def test_a_day_later_it_is_forgotten() -> None:
    clock = Clock()
    bob = allowance(clock, quota=100)
    for _ in range(4):
        bob.settle(bob.reserve(25, known=True, entries=0), 25, entries=0, made=0)
        clock.now += HOUR
    with pytest.raises(StanzaError):
        bob.reserve(1, known=True, entries=0)
    clock.now += (DAY - 3) * HOUR
    bob.settle(bob.reserve(25, known=True, entries=0), 25, entries=0, made=0)
    with pytest.raises(StanzaError):
        bob.reserve(1, known=True, entries=0)


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
            granted = bob.reserve(wanted, known=True, entries=0)
        except StanzaError:
            granted = 0
        count = min(granted, part)
        bob.settle(granted, count, entries=0, made=0)
        came.append((clock.now, count))
        assert sum(each for when, each in came if when > clock.now - DAY * HOUR) <= 100
        clock.now += pause
        assert len(bob._came) <= DAY + 2


# Files and directories


def test_a_file_takes_something_of_the_quota_however_short_it_is() -> None:
    """Or a million empty ones would be free. What was not made in the end takes nothing."""
    bob = allowance(Clock(), quota=3 * ENTRY)
    for made in (1, 0, 1):
        assert bob.reserve(1, known=True, entries=1) == 1
        bob.settle(1, made, entries=1, made=made)
    with pytest.raises(StanzaError, match="as much as is accepted") as caught:
        bob.reserve(ENTRY + 1, known=True, entries=1)
    assert refused(caught.value) == WAIT
    assert bob.reserve(ENTRY, known=True, entries=1) == ENTRY
    with pytest.raises(StanzaError):
        bob.reserve(0, known=True, entries=1)
    # A file that lies there already makes nothing.
    assert bob.reserve(0, known=True, entries=0) == 0


def test_each_directory_that_is_made_takes_as_much() -> None:
    bob = allowance(Clock(), quota=10 * ENTRY)
    bob.settle(bob.reserve(2 * ENTRY, known=True, entries=4), 2 * ENTRY, entries=4, made=4)
    with pytest.raises(StanzaError):
        bob.reserve(0, known=True, entries=6)
    bob.settle(bob.reserve(0, known=True, entries=5), 0, entries=5, made=0)
    assert bob.reserve(ENTRY, known=True, entries=5) == ENTRY


def test_no_more_files_come_in_a_day_than_are_accepted() -> None:
    clock = Clock()
    bob = allowance(clock, max_files=3)
    bob.settle(bob.reserve(5, known=True, entries=2), 5, entries=2, made=2)
    bob.settle(bob.reserve(5, known=True, entries=1), 3, entries=1, made=0)
    assert bob.reserve(5, known=False, entries=1) == 5
    with pytest.raises(StanzaError, match="as many files as are accepted") as caught:
        bob.reserve(5, known=True, entries=1)
    assert refused(caught.value) == WAIT
    clock.now += (DAY + 1) * HOUR
    assert bob.reserve(5, known=True, entries=2) == 5


def test_what_no_day_allows_is_refused_for_good() -> None:
    bob = allowance(Clock(), quota=2 * ENTRY, max_files=4)
    with pytest.raises(StanzaError, match="needs 4 new directories; 4 files") as caught:
        bob.reserve(0, known=True, entries=5)
    assert refused(caught.value) == NEVER
    with pytest.raises(
        StanzaError, match="2 new directories count as 12288 bytes; 8192 are"
    ) as caught:
        bob.reserve(1, known=True, entries=3)
    assert refused(caught.value) == NEVER
    # Of unknown length, it takes what there is.
    assert bob.reserve(1 << 40, known=False, entries=2) == ENTRY
