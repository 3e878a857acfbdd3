"""How one transfer is sealed: what `syncd.trust` decides, at the ends of a transfer.

Offer, answer, bytes, finish and receipt each carry their part; see ``docs/sealing.md``.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from syncd.errors import (
    DeclinedError,
    ErrorType,
    RemoteProtocolError,
    StanzaError,
    TransferError,
)
from syncd.transfer import si
from syncd.trust import handshake, receipt
from syncd.trust.handshake import Terms
from syncd.trust.kem import Ephemeral, supported
from syncd.trust.pins import Policy, Shown, Standing, decide, is_sealed_offer
from syncd.trust.receipt import Content, Said
from syncd.trust.seal import (
    MAX_SEGMENTS,
    SEGMENT,
    Opener,
    Sealer,
    header_size,
    sealed_length,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import trio

    from syncd.trust.pins import Pin
    from syncd.trust.signing import Identity
    from syncd.xmpp.jid import JID


@dataclass(slots=True)
class Seal:
    """What both ends of one transfer have agreed on, and signed.

    Attributes:
      answer: Ends the handshake.
      identity: Ours, as the other end was shown it.
      peer_key: The public key that the other end has shown.
      ephemeral: The receiver's half of this transfer's key, until the finish was opened or the
        transfer ends; None at the sender's.
      content: What the whole file is, once the sender has said it.
    """

    answer: handshake.Answer
    identity: Identity
    peer_key: bytes
    ephemeral: Ephemeral | None = None
    content: Content | None = None

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

    def forget(self) -> None:
        """Let the ephemeral key go: nothing more can come for it."""
        self.ephemeral = None

    def close_finish(self, finish: si.Finish) -> si.Finish:
        """Seal the hash in the sender's question for the receipt.

        Args:
          finish: With the digest.

        Returns:
          Without; it must be asked again with the very same one.
        """
        salt = secrets.token_bytes(receipt.SALT_SIZE)
        self.content = Content(digest=finish.digest, salt=salt)
        attributes = receipt.seal_finish(self.answer, self.content, self.identity)
        return replace(finish, digest=b"", seal=attributes)

    def check_receipt(self, answer: si.Finish) -> None:
        """Verify that the receiver holds what the sender's finish said.

        Raises:
          RemoteProtocolError: It is not signed.
          IntegrityError: Somebody else signed it, or it is for something else.
        """
        assert self.content is not None
        said = Said.BESIDE if answer.beside else Said.RECEIPT
        signature = (answer.seal or {}).get("signature")
        receipt.check(said, self.answer, self.content, signature)


def open_finish(seal: Seal | None, finish: si.Finish) -> si.Finish:
    """Find out, at the receiver's, what the sender says that the whole file is.

    Args:
      seal: The transfer's, which forgets its ephemeral key; None if it is plain.
      finish: As it came.

    Returns:
      With the digest, and without a seal.

    Raises:
      StanzaError: It is not understood, or is of the other kind than the transfer: what was
        hidden so far is not taken in the clear, and what was not proves no seal.
      IntegrityError: Not the sender signed it, or for another transfer.
    """
    if seal is None:
        if finish.seal is not None:
            raise _bad("a sealed <finish/> for bytes that were not sealed")
        return finish
    if finish.seal is None:
        raise _bad("a <finish/> in the clear for bytes that were sealed")
    ephemeral = seal.ephemeral
    assert ephemeral is not None
    seal.forget()
    try:
        seal.content = receipt.open_finish(seal.answer, finish.seal, ephemeral)
    except RemoteProtocolError as error:
        raise _bad(str(error)) from error
    return replace(finish, digest=seal.content.digest, seal=None)


def make_receipt(seal: Seal | None, finish: si.Finish, *, beside: bool) -> si.Finish:
    """Say, at the receiver's, that the file of a finish is durable.

    Args:
      seal: The transfer's; None if it is plain.
      finish: From `open_finish`.
      beside: It lies beside another file of its name.
    """
    if seal is None:
        return replace(finish, beside=beside)
    assert seal.content is not None
    said = Said.BESIDE if beside else Said.RECEIPT
    signature = receipt.sign(said, seal.answer, seal.content, seal.identity)
    # The hash is known to the sender, and nobody else's business.
    return replace(finish, digest=b"", seal={"signature": signature}, beside=beside)


def _bad(text: str) -> StanzaError:
    return StanzaError(ErrorType.MODIFY, "bad-request", text)


def _nobody_hears(_peer: JID, _key: bytes) -> None:
    pass


class Seals:
    """Decides which transfers are sealed, and remembers with whom.

    Args:
      identity: Ours.
      policy: The user's.
      read_pin: What is stored of a bare JID, or None.
      write_pin: Stores the second durably, if what is stored is still the first; says
        whether it is.
      shown: Told which key a peer has proved, when one is stored of it already.
    """

    def __init__(
        self,
        identity: Identity,
        policy: Policy,
        *,
        read_pin: Callable[[JID], Awaitable[Pin | None]],
        write_pin: Callable[[JID, Pin | None, Pin], Awaitable[bool]],
        shown: Callable[[JID, bytes], None] = _nobody_hears,
    ) -> None:
        self._identity = identity
        self._policy = policy
        self._read_pin = read_pin
        self._write_pin = write_pin
        self._shown = shown
        self._running: dict[trio.CancelScope, JID] = {}

    @property
    def can_seal(self) -> bool:
        """Whether peers may expect it of us."""
        return self._policy is not Policy.OFF

    def replace_identity(self, identity: Identity) -> None:
        """Show this one from now on; what runs ends under the one that it has shown."""
        self._identity = identity

    # --- While a transfer runs

    @contextmanager
    def ending(self, peer: JID, scope: trio.CancelScope) -> Iterator[None]:
        """Have a transfer cancelled if a person decides against its peer meanwhile."""
        self._running[scope] = peer.bare
        try:
            yield
        finally:
            del self._running[scope]

    def end(self, peer: JID) -> None:
        """A person has decided against a bare JID: end what runs with it."""
        for scope, other in self._running.items():
            if other == peer:
                scope.cancel()

    async def check_still(self, peer: JID, seal: Seal | None) -> None:
        """See that nothing was decided against a peer since its transfer began.

        Args:
          peer: Its JID.
          seal: The transfer's; None if it is plain.

        Raises:
          TransferError: The peer is blocked, or its key is another one, or none, by now.
        """
        pin = await self._read_pin(peer.bare)
        if pin is not None and pin.blocked:
            raise DeclinedError(f"{peer.bare} is blocked")
        if seal is not None and (pin is None or pin.key != seal.peer_key):
            raise TransferError(f"the key of {peer.bare} was forgotten meanwhile, or replaced")

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
        identity = self._identity
        if offered.identity != identity.public:
            raise TransferError("our own key was replaced meanwhile; the file is offered again")
        agreed = handshake.Answer.read(answer.seal, offered, answer.offset)
        shown = Shown(key=agreed.identity, successions=agreed.successions)
        await self._decide(target, shown)
        return Seal(agreed, identity, agreed.identity)

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
        if offer.sync is None or offer.size is None or offer.size > MAX_SEGMENTS * SEGMENT:
            # Without them nothing would be signed at the end, and a part that arrived with an
            # earlier transfer be checked against nothing.
            raise RemoteProtocolError("only a file between two syncds can be sealed")
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
        return Seal(agreed, self._identity, offered.identity, ephemeral)

    async def _decide(self, peer: JID, shown: Shown | None) -> None:
        account, stored = peer.bare, False
        while not stored:
            pin = await self._read_pin(account)
            decision = decide(str(account), pin, shown, self._policy)
            if shown is not None and decision.standing in _COMPARED:
                self._shown(account, shown.key)
            decision.check()
            # Another transfer, or a person, may have been faster: then it counts what they did.
            stored = decision.pin is None or await self._write_pin(account, pin, decision.pin)


_COMPARED = frozenset({Standing.SAME, Standing.CHANGED})


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
