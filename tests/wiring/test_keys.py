from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.control.messages import KeyRequest, PeerRequest
from syncd.errors import ControlError, NotFoundError
from syncd.sync.journal import open_journal
from syncd.trust.pins import Pin, Policy
from syncd.trust.signing import Identity
from syncd.trust.words import fingerprint, words
from syncd.wiring.keys import PeerKeys
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ALICE, BOB = JID.parse("alice@example.org"), JID.parse("bob@example.org")
OURS, THEIRS, OTHER = Identity.generate(), Identity.generate(), Identity.generate()


class World:
    """Alice's keys, and who was told of her decisions."""

    def __init__(self, keys: PeerKeys, decided: list[str], against: list[JID]) -> None:
        self.keys = keys
        self.decided = decided
        self.against = against

    async def ask(self, action: str, peer: str = "", compared: str = "") -> str:
        """What is said of the only peer: its standing, or empty if it is not known."""
        request = PeerRequest(action=action, peer=peer, fingerprint=compared)  # type: ignore[arg-type] # checked on its way from the socket
        answered = await self.keys.answer(request)
        assert answered.own == fingerprint(OURS.public)
        return answered.keys[0].state if answered.keys else ""

    async def learn(self, key: Identity = THEIRS) -> None:
        """Bob proves his first key."""
        assert await self.keys.write(BOB, None, Pin(key=key.public))


@asynccontextmanager
async def world(home: Path, policy: Policy = Policy.PREFERRED) -> AsyncIterator[World]:
    decided: list[str] = []
    against: list[JID] = []

    async def told(peer: str) -> None:
        decided.append(peer)

    async def replace() -> Identity:
        await trio.lowlevel.checkpoint()
        return OTHER

    async with open_journal(home) as journal:
        known = await journal.pins.pins()
        keys = PeerKeys(
            OURS,
            ALICE,
            journal.pins,
            known,
            policy,
            decided=told,
            against=against.append,
            replace=replace,
        )
        yield World(keys, decided, against)


async def test_key_that_was_shown_outlives_a_restart(tmp_path: Path) -> None:
    for first in (True, False):
        async with world(tmp_path) as alice:
            assert (await alice.keys.read(BOB) is None) == first
            if first:
                await alice.learn()
            assert await alice.keys.read(BOB) == Pin(key=THEIRS.public)


async def test_both_ends_are_shown_the_same_words(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        await alice.learn()
        shown = await alice.keys.answer(PeerRequest(action="show", peer=str(BOB)))
        at_bobs = words(str(BOB), THEIRS.public, str(ALICE), OURS.public)
        assert [key.words for key in shown.keys] == [at_bobs]
        assert [key.fingerprint for key in shown.keys] == [fingerprint(THEIRS.public)]


async def test_only_the_key_that_was_compared_is_verified(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        await alice.learn()
        with pytest.raises(ControlError, match="not the fingerprint"):
            await alice.ask("verify", str(BOB), fingerprint(OTHER.public))
        assert alice.keys.standing(str(BOB), can_seal=True) == "unverified"
        assert await alice.ask("verify", str(BOB), fingerprint(THEIRS.public)) == "verified"
        assert await alice.keys.read(BOB) == Pin(key=THEIRS.public, verified=True)
        assert alice.decided == [str(BOB)]


async def test_changed_key_is_shown_beside_the_known_one_until_a_person_decides(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as alice:
        await alice.learn()
        alice.keys.shown(BOB, OTHER.public)
        [key] = (await alice.keys.answer(PeerRequest(action="list"))).keys
        assert (key.state, key.offered) == ("changed", fingerprint(OTHER.public))
        assert alice.keys.standing(str(BOB), can_seal=True) == "changed"
        assert await alice.ask("reset-key", str(BOB)) == ""
        assert await alice.keys.read(BOB) is None
        assert alice.decided == [str(BOB)]
        await alice.learn(OTHER)
        assert alice.keys.standing(str(BOB), can_seal=True) == "unverified"


async def test_alarm_is_over_when_the_known_key_is_shown_again(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        await alice.learn()
        alice.keys.shown(BOB, OTHER.public)
        alice.keys.shown(BOB, THEIRS.public)
        assert alice.keys.standing(str(BOB), can_seal=True) == "unverified"


async def test_who_verifies_the_known_key_has_decided_about_the_other(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        await alice.learn()
        alice.keys.shown(BOB, OTHER.public)
        assert await alice.ask("verify", str(BOB), fingerprint(THEIRS.public)) == "verified"
        assert alice.keys.standing(str(BOB), can_seal=True) == "verified"
        assert alice.against == []


async def test_of_two_first_keys_at_once_only_one_is_stored(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        stored = {}

        async def learn(key: bytes) -> None:
            stored[key] = await alice.keys.write(BOB, None, Pin(key=key))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(learn, THEIRS.public)
            nursery.start_soon(learn, OTHER.public)
        [first] = [key for key, is_stored in stored.items() if is_stored]
        assert await alice.keys.read(BOB) == Pin(key=first)
        assert sorted(stored.values()) == [False, True]


async def test_first_key_does_not_undo_a_block_of_the_same_moment(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        decided = await alice.keys.read(BOB)
        await alice.ask("block", str(BOB))
        assert not await alice.keys.write(BOB, decided, Pin(key=THEIRS.public))
        assert await alice.ask("show", str(BOB)) == "blocked"


@pytest.mark.parametrize("action", ["block", "reset-key"])
async def test_who_was_decided_against_has_transfers_ended(tmp_path: Path, action: str) -> None:
    async with world(tmp_path) as alice:
        await alice.learn()
        await alice.ask(action, str(BOB))
        assert alice.against == [BOB]


async def test_who_is_blocked_cannot_be_verified_into_being_unblocked(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        await alice.learn()
        await alice.ask("block", str(BOB))
        with pytest.raises(ControlError, match="is blocked"):
            await alice.ask("verify", str(BOB), fingerprint(THEIRS.public))
        assert await alice.ask("show", str(BOB)) == "blocked"


async def test_our_own_key_is_shown_and_replaced(tmp_path: Path) -> None:
    """And the words with it, which are the same at both ends again."""
    async with world(tmp_path) as alice:
        await alice.learn()
        shown = await alice.keys.answer(KeyRequest(action="show"))
        assert (shown.own, shown.keys) == (fingerprint(OURS.public), ())
        rotated = await alice.keys.answer(KeyRequest(action="rotate"))
        assert (rotated.own, rotated.keys) == (fingerprint(OTHER.public), ())
        [bob] = (await alice.keys.answer(PeerRequest(action="list"))).keys
        assert bob.words == words(str(BOB), THEIRS.public, str(ALICE), OTHER.public)


async def test_key_that_rotates_keeps_its_standing(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        await alice.learn()
        await alice.ask("verify", str(BOB), fingerprint(THEIRS.public))
        verified = await alice.keys.read(BOB)
        assert await alice.keys.write(BOB, verified, Pin(key=OTHER.public, verified=True))
        assert await alice.ask("show", str(BOB)) == "verified"


@pytest.mark.parametrize("known", [True, False])
async def test_anybody_can_be_blocked_and_let_in_again(tmp_path: Path, known: bool) -> None:
    async with world(tmp_path) as alice:
        if known:
            await alice.learn()
        assert await alice.ask("block", str(BOB)) == "blocked"
        stored = await alice.keys.read(BOB)
        assert stored is not None
        assert stored.blocked
        assert alice.keys.standing(str(BOB), can_seal=True) == "blocked"
    async with world(tmp_path) as alice:
        assert await alice.ask("show", str(BOB)) == "blocked"
        await alice.ask("reset-key", str(BOB))
        assert await alice.keys.read(BOB) is None


@pytest.mark.parametrize("action", ["show", "verify", "reset-key"])
async def test_who_never_showed_a_key_has_none_to_decide_about(
    tmp_path: Path, action: str
) -> None:
    async with world(tmp_path) as alice:
        with pytest.raises(NotFoundError, match="never shown a key"):
            await alice.ask(action, str(BOB))


async def test_what_is_no_address_is_told(tmp_path: Path) -> None:
    async with world(tmp_path) as alice:
        with pytest.raises(ControlError, match="no address"):
            await alice.ask("show", "@")


@pytest.mark.parametrize(
    ("policy", "can_seal", "standing"),
    [
        (Policy.PREFERRED, True, "unverified"),
        (Policy.PREFERRED, False, "plain"),
        (Policy.REQUIRED, True, "unverified"),
        (Policy.REQUIRED, False, "impossible"),
        (Policy.OFF, True, "plain"),
    ],
)
async def test_standing_of_who_is_not_known_yet(
    tmp_path: Path, policy: Policy, can_seal: bool, standing: str
) -> None:
    async with world(tmp_path, policy) as alice:
        assert alice.keys.standing(str(BOB), can_seal=can_seal) == standing
