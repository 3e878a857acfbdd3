from __future__ import annotations

import pytest

from syncd.errors import DeclinedError, ErrorType, TransferError
from syncd.trust.pins import Decision, Pin, Policy, Shown, Standing, decide, is_sealed_offer
from syncd.trust.words import fingerprint
from tests.support.sealing import ALICE, BOB, MALLORY

PEER = "bob@example.net"
PIN = Pin(key=BOB.public, verified=True)
SAME = Shown(key=BOB.public)
NEW_BOB = BOB.succeeded_by(bytes(32))
ROTATED = Shown(key=NEW_BOB.public, successions=NEW_BOB.successions)
OTHER = Shown(key=MALLORY.public)
BLOCKED = Pin(key=BOB.public, blocked=True)
STRANGER = Pin(key=None, blocked=True)

on = pytest.mark.parametrize("policy", [Policy.PREFERRED, Policy.REQUIRED])
always = pytest.mark.parametrize("policy", Policy)
shows = pytest.mark.parametrize("shown", [None, SAME, ROTATED, OTHER])


@on
def test_a_key_that_is_seen_first_is_pinned_unverified(policy: Policy) -> None:
    expected = Decision(standing=Standing.FIRST, pin=Pin(key=BOB.public))
    assert expected == decide(PEER, None, SAME, policy)
    assert expected.sealed


@on
def test_a_known_key_goes_on_and_nothing_changes(policy: Policy) -> None:
    decision = decide(PEER, PIN, SAME, policy)
    assert Decision(standing=Standing.SAME) == decision
    assert decision.sealed


@on
@pytest.mark.parametrize("verified", [False, True])
def test_another_key_is_a_stop_that_shows_both(policy: Policy, verified: bool) -> None:
    decision = decide(PEER, Pin(key=BOB.public, verified=verified), OTHER, policy)
    assert (decision.standing, decision.pin) == (Standing.CHANGED, None)
    assert not decision.sealed
    with pytest.raises(TransferError, match="another key") as caught:
        decision.check()
    assert caught.value.type is ErrorType.AUTH
    assert fingerprint(BOB.public) in str(caught.value)
    assert fingerprint(MALLORY.public) in str(caught.value)
    assert f"syncctl peer reset-key {PEER}" in caught.value.hint


@on
@pytest.mark.parametrize("verified", [False, True])
def test_a_key_named_by_the_old_one_takes_its_place(policy: Policy, verified: bool) -> None:
    decision = decide(PEER, Pin(key=BOB.public, verified=verified), ROTATED, policy)
    expected = Pin(key=NEW_BOB.public, verified=verified)
    assert Decision(standing=Standing.ROTATED, pin=expected) == decision
    assert decision.sealed


def test_rotations_that_were_missed_are_made_up_for() -> None:
    third = NEW_BOB.succeeded_by(bytes([1]) * 32)
    shown = Shown(key=third.public, successions=third.successions)
    assert (
        Pin(key=third.public) == decide(PEER, Pin(key=BOB.public), shown, Policy.REQUIRED).pin
    )


def test_the_old_key_does_not_come_back() -> None:
    new = Pin(key=NEW_BOB.public)
    assert Standing.CHANGED is decide(PEER, new, SAME, Policy.PREFERRED).standing


def test_a_key_named_by_somebody_else_s_old_one_is_another_key() -> None:
    new = ALICE.succeeded_by(bytes(32))
    shown = Shown(key=new.public, successions=new.successions)
    assert Standing.CHANGED is decide(PEER, PIN, shown, Policy.PREFERRED).standing


@on
def test_plain_is_refused_once_a_key_was_seen(policy: Policy) -> None:
    decision = decide(PEER, Pin(key=BOB.public), None, policy)
    assert (decision.standing, decision.pin) == (Standing.DOWNGRADED, None)
    with pytest.raises(TransferError, match="has encrypted before") as caught:
        decision.check()
    assert caught.value.type is ErrorType.AUTH


def test_a_peer_that_never_showed_a_key_gets_plain_if_that_is_allowed() -> None:
    assert Decision(standing=Standing.PLAIN) == decide(PEER, None, None, Policy.PREFERRED)
    assert not Decision(standing=Standing.PLAIN).sealed


@pytest.mark.parametrize("pin", [None, Pin(key=None)])
def test_required_never_goes_plain(pin: Pin | None) -> None:
    decision = decide(PEER, pin, None, Policy.REQUIRED)
    assert Standing.REQUIRED is decision.standing
    with pytest.raises(TransferError, match="encryption is required") as caught:
        decision.check()
    assert caught.value.type is ErrorType.AUTH


@shows
@pytest.mark.parametrize("pin", [None, PIN])
def test_off_is_plain_and_stores_nothing(pin: Pin | None, shown: Shown | None) -> None:
    assert Decision(standing=Standing.PLAIN) == decide(PEER, pin, shown, Policy.OFF)


@shows
@always
@pytest.mark.parametrize("pin", [BLOCKED, STRANGER])
def test_a_blocked_peer_gets_nothing(pin: Pin, shown: Shown | None, policy: Policy) -> None:
    decision = decide(PEER, pin, shown, policy)
    assert (decision.standing, decision.pin) == (Standing.BLOCKED, None)
    with pytest.raises(DeclinedError, match="is blocked"):
        decision.check()


@always
@shows
@pytest.mark.parametrize("pin", [None, PIN, Pin(key=BOB.public), BLOCKED, STRANGER])
def test_whoever_goes_on_unsealed_is_plain_and_nothing_else(
    pin: Pin | None, shown: Shown | None, policy: Policy
) -> None:
    """What a caller relies on, over all cases: an error, or sealed, or PLAIN."""
    decision = decide(PEER, pin, shown, policy)
    ways = decision.error is not None, decision.sealed, decision.standing is Standing.PLAIN
    assert sum(ways) == 1
    assert decision.pin is None or decision.sealed
    plain_may = policy is Policy.OFF or (
        policy is Policy.PREFERRED and shown is None and pin is None
    )
    assert ways[2] <= plain_may


@on
@pytest.mark.parametrize("pin", [None, PIN])
def test_an_offer_is_sealed_to_whoever_can(pin: Pin | None, policy: Policy) -> None:
    assert is_sealed_offer(PEER, pin, policy, can_seal=True)


@pytest.mark.parametrize(
    ("pin", "policy", "can_seal"),
    [
        (None, Policy.PREFERRED, False),
        (None, Policy.OFF, False),
        (None, Policy.OFF, True),
        (PIN, Policy.OFF, True),
    ],
)
def test_an_offer_is_plain_where_it_may_be(
    pin: Pin | None, policy: Policy, can_seal: bool
) -> None:
    assert not is_sealed_offer(PEER, pin, policy, can_seal=can_seal)


@pytest.mark.parametrize(
    ("pin", "policy", "can_seal"),
    [
        (PIN, Policy.PREFERRED, False),
        (PIN, Policy.REQUIRED, False),
        (None, Policy.REQUIRED, False),
        (BLOCKED, Policy.PREFERRED, True),
        (BLOCKED, Policy.OFF, False),
        (STRANGER, Policy.PREFERRED, True),
    ],
)
def test_no_offer_goes_out_where_none_may(
    pin: Pin | None, policy: Policy, can_seal: bool
) -> None:
    with pytest.raises(TransferError):
        is_sealed_offer(PEER, pin, policy, can_seal=can_seal)


@pytest.mark.parametrize(
    ("pin", "expected"),
    [
        (PIN, "verified"),
        (Pin(key=BOB.public), "unverified"),
        (BLOCKED, "blocked"),
        (Pin(key=None), "unknown"),
    ],
)
def test_trust_is_one_word(pin: Pin, expected: str) -> None:
    assert expected == pin.trust
