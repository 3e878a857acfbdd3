"""Whose keys are known, and how far they are trusted: for transfers, and for ``syncctl``."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import trio

from syncd.control.messages import Key, KeyRequest, Keys
from syncd.errors import ControlError, NotFoundError
from syncd.trust.pins import Pin, Policy
from syncd.trust.words import fingerprint, is_fingerprint, words
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Literal

    from syncd.control.messages import PeerRequest
    from syncd.sync import pins as stored
    from syncd.trust.signing import Identity

log = logging.getLogger(__name__)

# The words of a pair of keys take a tenth of a second, and a person looks at a screenful.
MAX_LISTED = 100  # peers


class PeerKeys:
    """The keys of peers; every decision about them is on disk before it counts.

    Args:
      identity: Ours.
      own: Our bare JID.
      pins: Where they are stored.
      known: All that is stored there.
      policy: The user's.
      decided: Told the bare JID when a person has decided about a peer: what waits for that
        may go on.
      against: Told it before, when that was against the peer: what runs with it must end.
      replace: Replaces our own key, durably, by one that it has signed; returns that.
    """

    def __init__(
        self,
        identity: Identity,
        own: JID,
        pins: stored.Pins,
        known: list[stored.Pin],
        policy: Policy,
        *,
        decided: Callable[[str], Awaitable[None]],
        against: Callable[[JID], None],
        replace: Callable[[], Awaitable[Identity]],
    ) -> None:
        self.identity = identity
        self.policy = policy
        self._own = own
        self._pins = pins
        self._known = {pin.peer: pin for pin in known}
        self._decided = decided
        self._against = against
        self._replace = replace
        # One decision at a time, a person's or a transfer's: none is made about what another
        # has just changed.
        self._deciding = trio.Lock()
        self._offered: dict[str, bytes] = {}  # instead of the known one
        # On a slow machine a list of many takes more than one question's time.
        self._words: dict[tuple[str, bytes, str, bytes], tuple[str, ...]] = {}

    # --- For the transfers

    async def read(self, peer: JID) -> Pin | None:
        """What is stored of a bare JID; None if nothing is."""
        await trio.lowlevel.checkpoint()
        return self._pin(peer)

    async def write(self, peer: JID, old: Pin | None, new: Pin) -> bool:
        """Store what a peer has proved; a key that replaces one keeps its standing.

        Args:
          peer: Its bare JID.
          old: What was stored when that was decided.
          new: What is to be stored now.

        Returns:
          Whether it is: not if something else than the old is stored by now.
        """
        async with self._deciding:
            if self._pin(peer) != old:
                return False
            assert new.key is not None
            log.info("the key of %s is now %s", peer, fingerprint(new.key))
            await self._set(str(peer), new.key, "verified" if new.verified else "unverified")
            return True

    def shown(self, peer: JID, key: bytes) -> None:
        """Note which key a peer shows now that has one stored."""
        pin = self._known.get(str(peer))
        if pin is None or pin.public_key == key:
            self._offered.pop(str(peer), None)
        else:
            self._offered[str(peer)] = key

    def _pin(self, peer: JID) -> Pin | None:
        pin = self._known.get(str(peer))
        if pin is None:
            return None
        return Pin(
            key=pin.public_key, verified=pin.state == "verified", blocked=pin.state == "blocked"
        )

    # --- For people

    def standing(self, peer: str, *, can_seal: bool) -> str:
        """What the next transfer with a peer uses, in one word for the status.

        Args:
          peer: A bare JID.
          can_seal: Whether its client can.
        """
        pin = self._known.get(peer)
        if pin is not None and pin.state == "blocked":
            return "blocked"
        if self.policy is Policy.OFF:
            return "plain"
        if peer in self._offered:
            return "changed"
        if pin is not None:
            return pin.state
        if can_seal:
            return "unverified"
        return "impossible" if self.policy is Policy.REQUIRED else "plain"

    async def answer(self, request: PeerRequest | KeyRequest) -> Keys:
        """Show keys, or take a person's decision about one.

        Raises:
          NotFoundError: The peer has never shown a key.
          ControlError: It is not the key that was compared, or no such address.
          ConfigError: Our own key cannot be replaced.
        """
        if isinstance(request, KeyRequest):
            if request.action == "rotate":
                await self._rotate()
            return await self._listed([])
        peer = _bare(request.peer) if request.peer else ""
        if request.action == "list":
            return await self._listed(list(self._known)[:MAX_LISTED])
        async with self._deciding:
            await self._decide(request, peer)
        if request.action != "show":
            await self._decided(peer)
        return await self._listed([peer] if peer in self._known else [])

    async def _rotate(self) -> None:
        async with self._deciding:
            old, self.identity = self.identity, await self._replace()
        log.warning(
            "our own key was %s, and is now %s",
            fingerprint(old.public),
            fingerprint(self.identity.public),
        )

    async def _decide(self, request: PeerRequest, peer: str) -> None:
        match request.action:
            case "verify":
                await self._verify(peer, request.fingerprint)
            case "block":
                pin = self._known.get(peer)
                await self._set(peer, pin.public_key if pin else None, "blocked")
                self._against(JID.parse(peer))
            case "reset-key":
                self._found(peer)
                await self._pins.forget_pin(peer)
                del self._known[peer]
                self._offered.pop(peer, None)
                log.info("the key of %s is forgotten", peer)
                self._against(JID.parse(peer))
            case _:
                self._found(peer)

    async def _verify(self, peer: str, compared: str) -> None:
        pin = self._found(peer)
        if pin.state == "blocked":
            raise ControlError(
                f"{peer} is blocked",
                hint=f"to let it in again, run `syncctl peer reset-key {peer}`",
            )
        if pin.public_key is None or not is_fingerprint(compared, pin.public_key):
            raise ControlError(
                f"that is not the fingerprint of the key of {peer}",
                hint=f"compare once more with `syncctl peer show {peer}`",
            )
        await self._set(peer, pin.public_key, "verified")
        # Whoever has shown another one was not the peer.
        self._offered.pop(peer, None)

    def _found(self, peer: str) -> stored.Pin:
        pin = self._known.get(peer)
        if pin is None:
            raise NotFoundError(
                f"{peer} has never shown a key", hint="it does at the first transfer"
            )
        return pin

    async def _set(
        self, peer: str, key: bytes | None, state: Literal["unverified", "verified", "blocked"]
    ) -> None:
        self._known[peer] = await self._pins.set_pin(peer, key, state)
        if self._offered.get(peer) == key:
            self._offered.pop(peer, None)

    async def _listed(self, peers: list[str]) -> Keys:
        pins = [self._known[peer] for peer in peers]  # a person may change them meanwhile
        keys = [await self._key(pin) for pin in pins]
        return Keys(own=fingerprint(self.identity.public), keys=tuple(keys))

    async def _key(self, pin: stored.Pin) -> Key:
        key, offered = pin.public_key, self._offered.get(pin.peer)
        same = await self._words_with(pin.peer, key) if key is not None else ()
        return Key(
            peer=pin.peer,
            state="changed" if offered is not None else pin.state,
            fingerprint=fingerprint(key) if key is not None else "",
            words=same,
            first_seen=datetime.fromtimestamp(pin.first_seen, UTC),
            last_seen=datetime.fromtimestamp(pin.last_seen, UTC),
            verified_at=datetime.fromtimestamp(pin.verified_at, UTC)
            if pin.verified_at
            else None,
            offered=fingerprint(offered) if offered is not None else "",
        )

    async def _words_with(self, peer: str, key: bytes) -> tuple[str, ...]:
        ends = str(self._own), self.identity.public, peer, key
        if (known := self._words.get(ends)) is not None:
            return known
        if len(self._words) >= MAX_LISTED:
            self._words.clear()
        self._words[ends] = same = await trio.to_thread.run_sync(words, *ends)
        return same


def _bare(text: str) -> str:
    try:
        return str(JID.parse(text).bare)
    except ValueError as error:
        raise ControlError(f"{text} is no address of a peer: {error}") from error
