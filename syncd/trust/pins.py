"""What to do about a peer, by what it showed before and what it shows now. Sans-IO.

=========  ==============  ==============  ================  ==========
stored     shows the same  shows another   shows no key      `off`
=========  ==============  ==============  ================  ==========
nothing    --              FIRST: pinned   PLAIN, or         PLAIN
                                           REQUIRED: stop
a key      SAME            ROTATED, if     DOWNGRADED: stop  PLAIN
                           the stored key
                           signed it, or
                           CHANGED: stop
a block    BLOCKED         BLOCKED         BLOCKED           BLOCKED
=========  ==============  ==============  ================  ==========

A key that is shown has proved itself already (`syncd.trust.handshake`): nothing that anybody
merely claims gets this far. A stop lasts until a person has decided. Only `off`, which a
person has written as well, sends plain to a peer whose key is known.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from syncd.errors import DeclinedError, ErrorType, TransferError
from syncd.trust.signing import predecessors
from syncd.trust.words import fingerprint


class Policy(enum.StrEnum):
    """`transfer.encryption` of the configuration."""

    PREFERRED = "preferred"  # plain only to peers that never showed a key
    REQUIRED = "required"  # never plain
    OFF = "off"  # never sealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What is stored of a peer, under its bare JID.

    Attributes:
      key: Its public key, 32 bytes; None for a peer that was blocked before it showed one.
      verified: A person has compared words or fingerprints.
      blocked: Nothing is sent to it or taken from it.
    """

    key: bytes | None
    verified: bool = False
    blocked: bool = False

    @property
    def trust(self) -> str:
        """For the status, in one word."""
        if self.blocked:
            return "blocked"
        if self.key is None:
            return "unknown"
        return "verified" if self.verified else "unverified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a peer has proved in an offer or an answer.

    Attributes:
      key: Its public key, 32 bytes.
      successions: As received; empty if it has replaced no key.
    """

    key: bytes
    successions: bytes = b""


class Standing(enum.StrEnum):
    """How what a peer shows stands to what is stored."""

    FIRST = "first"
    SAME = "same"
    ROTATED = "rotated"
    PLAIN = "plain"
    CHANGED = "changed"
    DOWNGRADED = "downgraded"
    REQUIRED = "required"
    BLOCKED = "blocked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do.

    Attributes:
      standing: Why.
      pin: What is to be stored before a byte is sent or taken; None if nothing changes.
      error: Why not; None to go on.
    """

    standing: Standing
    pin: Pin | None = None
    error: TransferError | None = None

    @property
    def sealed(self) -> bool:
        """Whether to go on sealed; otherwise plain, or not at all."""
        return self.standing in (Standing.FIRST, Standing.SAME, Standing.ROTATED)

    def check(self) -> None:
        """Raise the error, if there is one.

        Raises:
          TransferError: The peer is not to be sent to, or taken from; waiting does not help.
        """
        if self.error is not None:
            raise self.error


def decide(peer: str, pin: Pin | None, shown: Shown | None, policy: Policy) -> Decision:
    """Decide what to do about a peer.

    Args:
      peer: Its bare JID, for messages.
      pin: What is stored; None if nothing is.
      shown: What it has proved; None if it seals nothing.
      policy: The configuration's.
    """
    known = pin.key if pin is not None else None
    if pin is not None and pin.blocked:
        return Decision(standing=Standing.BLOCKED, error=_blocked(peer))
    if policy is Policy.OFF:
        return Decision(standing=Standing.PLAIN)
    if shown is None:
        if known is not None:
            return Decision(standing=Standing.DOWNGRADED, error=_downgraded(peer, known))
        if policy is Policy.REQUIRED:
            return Decision(standing=Standing.REQUIRED, error=_required(peer))
        return Decision(standing=Standing.PLAIN)
    if pin is None or known is None:
        return Decision(standing=Standing.FIRST, pin=Pin(key=shown.key))
    if shown.key == known:
        return Decision(standing=Standing.SAME)
    if known in predecessors(shown.key, shown.successions):
        return Decision(standing=Standing.ROTATED, pin=replace(pin, key=shown.key))
    return Decision(standing=Standing.CHANGED, error=_changed(peer, known, shown.key))


def is_sealed_offer(peer: str, pin: Pin | None, policy: Policy, *, can_seal: bool) -> bool:
    """Decide, before anything goes out, whether an offer is to carry a seal.

    Args:
      peer: Its bare JID, for messages.
      pin: What is stored; None if nothing is.
      policy: The configuration's.
      can_seal: Whether the peer has the feature ``urn:syncd:seal:1``.

    Raises:
      TransferError: Nothing is to be offered to this peer, or to this client of it.
    """
    if can_seal and policy is not Policy.OFF and not (pin is not None and pin.blocked):
        return True
    decision = decide(peer, pin, None, policy)
    if decision.standing is Standing.DOWNGRADED and pin is not None and pin.key is not None:
        # Nothing has been shown: it may be another client of theirs, while their syncd is away.
        raise _away(peer, pin.key)
    decision.check()
    return False


def _blocked(peer: str) -> TransferError:
    return DeclinedError(
        f"{peer} is blocked", hint=f"to unblock it, run `syncctl peer reset-key {peer}`"
    )


def _required(peer: str) -> TransferError:
    return TransferError(
        f"{peer} cannot encrypt, and encryption is required",
        hint="its client is no syncd, or encryption is off there; to send to it in the clear, "
        'set transfer.encryption = "preferred"',
        type=ErrorType.AUTH,
    )


def _away(peer: str, known: bytes) -> TransferError:
    return TransferError(
        f"{peer} has encrypted before, and no client that is there now does; its files wait. "
        f"Its key is {fingerprint(known)}",
        hint="start syncd there; if it was given up, or encryption was switched off, run "
        f"`syncctl peer reset-key {peer}`: files then go in the clear",
    )


def _downgraded(peer: str, known: bytes) -> TransferError:
    return TransferError(
        f"{peer} has encrypted before, and now does not: it is another client of theirs, or "
        f"somebody in between has taken that away. Its key is {fingerprint(known)}",
        hint="ask them; files of an account with a syncd are taken from that syncd only. If it "
        "was given up, or encryption was switched off there, run "
        f"`syncctl peer reset-key {peer}`: files then come and go in the clear",
        type=ErrorType.AUTH,
    )


def _changed(peer: str, known: bytes, shown: bytes) -> TransferError:
    return TransferError(
        f"{peer} shows another key than before: somebody may stand in between. "
        f"Known: {fingerprint(known)}. Shown: {fingerprint(shown)}",
        hint="ask them for their fingerprint (`syncctl key show` there); if it is the one "
        f"shown now, run `syncctl peer reset-key {peer}`; if it is the known one, run "
        f"`syncctl peer verify {peer}`",
        type=ErrorType.AUTH,
    )
