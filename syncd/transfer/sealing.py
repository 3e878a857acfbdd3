"""How one transfer is sealed: what `syncd.trust` decides, at the ends of a transfer.

Offer, answer, bytes, finish and receipt each carry their part; see ``docs/sealing.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.transfer import si
from syncd.trust import handshake, receipt
from syncd.trust.handshake import Terms
from syncd.trust.kem import Ephemeral, supported
from syncd.trust.pins import Policy, Shown, Standing, decide, is_sealed_offer
from syncd.trust.seal import Opener, Sealer, header_size, sealed_length
from syncd.trust.signing import read_base64, write_base64

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from syncd.trust.pins import Pin
    from syncd.trust.signing import Identity
    from syncd.xmpp.jid import JID

# Ed25519, RFC 8032.
SIGNATURE = 64  # bytes


@dataclass(frozen=True, slots=True)
class Seal:
    """What both ends of one transfer have agreed on, and signed.

    Attributes:
      answer: Ends the handshake.
      identity: Ours.
      ephemeral: The receiver's half of this transfer's key; None at the sender's.
    """

    answer: handshake.Answer
    identity: Identity
    ephemeral: Ephemeral | None = None

    @property
    def length(self) -> int:
        """How many bytes the sealed stream has."""
        return header_size(self.answer.kem) + sealed_length(self.answer.length)

    def sealer(self) -> Sealer:
        """What the sender's bytes go through."""
        return Sealer(self.answer, self.identity)

    def opener(self) -> Opener:
        """What they go through at the receiver's."""
        assert self.ephemeral is not None
        return Opener(self.answer, self.ephemeral)

    def sign(self, said: receipt.Said, digest: bytes) -> bytes:
        """Sign how it ended, with the BLAKE3 of the whole file."""
        signature = receipt.sign(said, self.answer, digest, self.identity)
        return read_base64("signature", signature, [SIGNATURE])

    def check(self, said: receipt.Said, finish: si.Finish) -> None:
        """Verify how the other end says that it ended.

        Raises:
          RemoteProtocolError: It is not signed.
          IntegrityError: Somebody else signed it.
        """
        signature = write_base64(finish.signature) if finish.signature else None
        receipt.check(said, self.answer, finish.digest, signature)


def _nobody_hears(_peer: JID, _key: bytes) -> None:
    pass


class Seals:
    """Decides which transfers are sealed, and remembers with whom.

    Args:
      identity: Ours.
      policy: The user's.
      read_pin: What is stored of a bare JID, or None.
      write_pin: Stores it durably.
      changed: Told who shows another key than the stored one, and which.
    """

    def __init__(
        self,
        identity: Identity,
        policy: Policy,
        *,
        read_pin: Callable[[JID], Awaitable[Pin | None]],
        write_pin: Callable[[JID, Pin], Awaitable[None]],
        changed: Callable[[JID, bytes], None] = _nobody_hears,
    ) -> None:
        self._identity = identity
        self._policy = policy
        self._read_pin = read_pin
        self._write_pin = write_pin
        self._changed = changed

    @property
    def can_seal(self) -> bool:
        """Whether peers may expect it of us."""
        return self._policy is not Policy.OFF

    # --- At the sender's

    async def offer(
        self, offer: si.Offer, own: JID, target: JID, *, can_seal: bool
    ) -> handshake.Offer | None:
        """Sign an offer, if it is to be sealed.

        Args:
          offer: Complete but for this.
          own: Our full JID.
          target: The receiver's.
          can_seal: It has the feature.

        Raises:
          TransferError: Nothing is to be offered to this peer; a person must decide.
        """
        pin = await self._read_pin(target.bare)
        if not is_sealed_offer(str(target.bare), pin, self._policy, can_seal=can_seal):
            return None
        return handshake.Offer.make(_terms(offer, own, target), self._identity, supported())

    async def take_answer(
        self, offered: handshake.Offer | None, answer: si.Answer, target: JID
    ) -> Seal | None:
        """Decide on an answer: sealed, plain, or not at all.

        Raises:
          RemoteProtocolError, IntegrityError: It is not what the peer signed.
          TransferError: The peer is not who it was; a person must decide.
        """
        if offered is None or answer.seal is None:
            await self._decide(target, None)
            return None
        agreed = handshake.Answer.read(answer.seal, offered, answer.offset)
        shown = Shown(key=agreed.identity, successions=agreed.successions)
        await self._decide(target, shown)
        return Seal(agreed, self._identity)

    # --- At the receiver's

    async def take_offer(
        self, offer: si.Offer, sender: JID, own: JID
    ) -> handshake.Offer | None:
        """Decide on an offer from somebody whose files are wanted.

        Args:
          offer: As it came.
          sender: Full JID.
          own: Ours, as the offer was addressed.

        Raises:
          RemoteProtocolError, IntegrityError: It is not what the sender signed.
          TransferError: The peer is not who it was; a person must decide.
        """
        if offer.seal is None or self._policy is Policy.OFF:
            await self._decide(sender, None)
            return None
        offered = handshake.Offer.read(offer.seal, _terms(offer, sender, own))
        await self._decide(sender, Shown(key=offered.identity, successions=offered.successions))
        return offered

    def answer(self, offered: handshake.Offer, offset: int) -> Seal:
        """Agree, with a key that is used for nothing else.

        Args:
          offered: From `take_offer`.
          offset: Where the bytes are to begin.
        """
        ephemeral = Ephemeral.generate(offered.choose(supported()))
        agreed = handshake.Answer.make(offered, offset, self._identity, ephemeral)
        return Seal(agreed, self._identity, ephemeral)

    async def _decide(self, peer: JID, shown: Shown | None) -> None:
        decision = decide(str(peer.bare), await self._read_pin(peer.bare), shown, self._policy)
        if shown is not None and decision.standing is Standing.CHANGED:
            self._changed(peer.bare, shown.key)
        decision.check()
        if decision.pin is not None:
            await self._write_pin(peer.bare, decision.pin)


def _terms(offer: si.Offer, sender: JID, receiver: JID) -> Terms:
    """What both ends read out of the offer."""
    sync = offer.sync
    return Terms(
        sid=offer.sid,
        sender=str(sender),
        receiver=str(receiver),
        profile=si.NS_FILE,
        folder=sync.folder if sync else "",
        path=sync.path if sync else offer.name,
        size=offer.size or 0,
        mtime_ns=sync.mtime_ns if sync else 0,
    )
