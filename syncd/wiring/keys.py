"""Whose keys are known, and how far they are trusted: for transfers, and for ``syncctl``."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import trio

from syncd.control.messages import Key, Keys
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
    """

    def __init__(
        self,
        identity: Identity,
        own: JID,
        pins: stored.Pins,
        known: list[stored.Pin],
        policy: Policy,
        decided: Callable[[str], Awaitable[None]],
    ) -> None:
        self.identity = identity
        self.policy = policy
        self._own = own
        self._pins = pins
        self._known = {pin.peer: pin for pin in known}
        self._decided = decided
        self._offered: dict[str, bytes] = {}  # instead of the known one

    # --- For the transfers

    async def read(self, peer: JID) -> Pin | None:
        """What is stored of a bare JID; None if nothing is."""
        pin = self._known.get(str(peer))
        await trio.lowlevel.checkpoint()
        if pin is None:
            return None
        return Pin(
            key=pin.public_key, verified=pin.state == "verified", blocked=pin.state == "blocked"
        )

    async def write(self, peer: JID, pin: Pin) -> None:
        """Store what a peer has proved; a key that replaces one keeps its standing."""
        log.info("the key of %s is now %s", peer, fingerprint(pin.key or b""))
        await self._set(str(peer), pin.key, "verified" if pin.verified else "unverified")

    def changed(self, peer: JID, key: bytes) -> None:
        """Note that a peer shows another key than the stored one."""
        if str(peer) in self._known:
            self._offered[str(peer)] = key

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

    async def answer(self, request: PeerRequest) -> Keys:
        """Show keys, or take a person's decision about one.

        Raises:
          NotFoundError: The peer has never shown a key.
          ControlError: It is not the key that was compared, or no such address.
        """
        peer = _bare(request.peer) if request.peer else ""
        match request.action:
            case "list":
                return await self._listed(list(self._known)[:MAX_LISTED])
            case "verify":
                await self._verify(peer, request.fingerprint)
            case "block":
                pin = self._known.get(peer)
                await self._set(peer, pin.public_key if pin else None, "blocked")
            case "reset-key":
                self._found(peer)
                del self._known[peer]
                self._offered.pop(peer, None)
                await self._pins.forget_pin(peer)
                log.info("the key of %s is forgotten", peer)
            case "show":
                self._found(peer)
        if request.action != "show":
            await self._decided(peer)
        return await self._listed([peer] if peer in self._known else [])

    async def _verify(self, peer: str, compared: str) -> None:
        pin = self._found(peer)
        if pin.public_key is None or not is_fingerprint(compared, pin.public_key):
            raise ControlError(
                f"that is not the fingerprint of the key of {peer}",
                hint=f"compare once more with `syncctl peer show {peer}`",
            )
        await self._set(peer, pin.public_key, "verified")

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
        keys = [await self._key(self._known[peer]) for peer in peers]
        return Keys(own=fingerprint(self.identity.public), keys=tuple(keys))

    async def _key(self, pin: stored.Pin) -> Key:
        key, offered = pin.public_key, self._offered.get(pin.peer)
        own, public = str(self._own), self.identity.public
        same: tuple[str, ...] = ()
        if key is not None:
            same = await trio.to_thread.run_sync(words, own, public, pin.peer, key)
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


def _bare(text: str) -> str:
    try:
        return str(JID.parse(text).bare)
    except ValueError as error:
        raise ControlError(f"{text} is no address of a peer: {error}") from error
