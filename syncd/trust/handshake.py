"""What offer and answer say about the seal: made, read, and verified. Sans-IO.

::

    sender    Offer.make   -- <seal identity kems signature/> in the offer -->   Offer.read
    sender    Answer.read  <-- <seal identity kem key signature/> in the answer  Answer.make
    sender    seal.Sealer  -- header, segments on the bytestream -->             seal.Opener
    sender    receipt      -- <finish sealed signature/> -->                     receipt
    sender    receipt      <-- <receipt signature/>                              receipt

Each end signs all that both know by then. The sender has signed the terms before the receiver
does anything for it; the receiver adds the offset and an ephemeral key; what comes of it,
`Answer.transcript`, is bound into everything that follows. Nothing about a peer is stored
before its signature was found good, so nobody can have a wrong key pinned by naming it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from syncd.errors import IntegrityError, RemoteProtocolError
from syncd.trust import kem as hpke
from syncd.trust.kem import Kem
from syncd.trust.signing import (
    KEY_SIZE,
    SIGNATURE_SIZE,
    digest,
    read_base64,
    read_successions,
    statement,
    verify,
    write_base64,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from syncd.trust.kem import Ephemeral
    from syncd.trust.signing import Identity

# Room for some that come after us; what is unknown is skipped.
MAX_KEMS = 256  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a transfer is about; both ends must read the same out of the offer.

    Attributes:
      sid: Of the offer.
      sender: Its full JID.
      receiver: Its full JID, as the offer was addressed.
      profile: Namespace of the SI profile, so that nothing else is made of the bytes.
      folder: Id of the folder; empty if the offer names none.
      path: Below the folder, as on the wire; the file's name if there is no folder.
      size: Length of the whole file, bytes.
      mtime_ns: Time of the last change, nanoseconds since 1970; 0 if the offer has none.
      extension: What else in the offer says how the bytes are to be read, in canonical form;
        empty for a plain file.
    """

    sid: str
    sender: str
    receiver: str
    profile: str
    folder: str
    path: str
    size: int
    mtime_ns: int
    extension: bytes = b""

    def fields(self) -> tuple[bytes | str | int, ...]:
        """All of it, in the order of the protocol."""
        return (
            self.sid,
            self.sender,
            self.receiver,
            self.profile,
            self.folder,
            self.path,
            self.size,
            self.mtime_ns,
            self.extension,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What the sender shows.

    Attributes:
      terms: What it is about.
      identity: The sender's public key, 32 bytes.
      successions: Proof of the keys that it replaced.
      kems: Which it can seal with, as written: names, spaces between them.
      signature: The sender's.
    """

    terms: Terms
    identity: bytes
    successions: bytes
    kems: str
    signature: bytes

    @classmethod
    def make(cls, terms: Terms, identity: Identity, kems: Sequence[Kem]) -> Self:
        """Sign an offer.

        Args:
          terms: What it is about.
          identity: The sender's.
          kems: `syncd.trust.kem.supported`.
        """
        names = " ".join(kems)
        said = _offer_statement(terms, identity.public, identity.successions, names)
        return cls(
            terms=terms,
            identity=identity.public,
            successions=identity.successions,
            kems=names,
            signature=identity.sign(said),
        )

    @classmethod
    def read(cls, attributes: Mapping[str, str], terms: Terms) -> Self:
        """Read and verify what came with an offer.

        Args:
          attributes: Of ``<seal/>``.
          terms: As read from the rest of the offer, and from the stanza's addresses.

        Raises:
          RemoteProtocolError: It is not understood.
          IntegrityError: It was not signed by the key it shows, or for other terms.
        """
        offer = cls(
            terms=terms,
            identity=read_base64("identity", attributes.get("identity"), [KEY_SIZE]),
            successions=read_successions(attributes.get("successions")),
            kems=attributes.get("kems", ""),
            signature=read_base64("signature", attributes.get("signature"), [SIGNATURE_SIZE]),
        )
        if len(offer.kems) > MAX_KEMS or Kem.X25519 not in offer.kems.split(" "):
            raise RemoteProtocolError("the peer's seal is not understood: bad or no 'kems'")
        said = _offer_statement(terms, offer.identity, offer.successions, offer.kems)
        if not verify(offer.identity, offer.signature, said):
            raise IntegrityError(f"the offer was changed on its way: {_FALSE}")
        return offer

    def attributes(self) -> dict[str, str]:
        """Write it, for a childless ``<seal xmlns='urn:syncd:seal:1'/>`` in ``<si/>``."""
        return {
            "identity": write_base64(self.identity),
            "kems": self.kems,
            "signature": write_base64(self.signature),
        } | _written(self.successions)

    def choose(self, own: Sequence[Kem]) -> Kem:
        """Choose the best that both ends can.

        Args:
          own: `syncd.trust.kem.supported`.
        """
        theirs = self.kems.split(" ")
        return next((kem for kem in own if kem in theirs), Kem.X25519)

    def digest(self) -> bytes:
        """The hash by which the answer refers to it."""
        said = _offer_statement(self.terms, self.identity, self.successions, self.kems)
        return digest("offer hash", said, self.signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the receiver shows, and with it all that both ends have agreed on.

    Attributes:
      offer: What is answered.
      offset: Where the bytes begin, bytes.
      identity: The receiver's public key, 32 bytes.
      successions: Proof of the keys that it replaced.
      kem: How secrets are sealed to the receiver: content key, and what the whole file is.
      key: The ephemeral public key to which they are sealed.
      signature: The receiver's.
    """

    offer: Offer
    offset: int
    identity: bytes
    successions: bytes
    kem: Kem
    key: bytes
    signature: bytes

    @classmethod
    def make(cls, offer: Offer, offset: int, identity: Identity, ephemeral: Ephemeral) -> Self:
        """Sign an answer.

        Args:
          offer: What is answered.
          offset: Where the bytes are to begin.
          identity: The receiver's.
          ephemeral: Made for this transfer alone.

        Raises:
          ValueError: The offset lies behind the end of the file, or the sender cannot seal
            to such a key.
        """
        if not 0 <= offset <= offer.terms.size or ephemeral.kem not in offer.kems.split(" "):
            raise ValueError("no answer to this offer")
        said = _answer_statement(
            offer,
            offset,
            identity.public,
            identity.successions,
            ephemeral.kem,
            ephemeral.public,
        )
        return cls(
            offer=offer,
            offset=offset,
            identity=identity.public,
            successions=identity.successions,
            kem=ephemeral.kem,
            key=ephemeral.public,
            signature=identity.sign(said),
        )

    @classmethod
    def read(cls, attributes: Mapping[str, str], offer: Offer, offset: int) -> Self:
        """Read and verify what came with an answer.

        Args:
          attributes: Of ``<seal/>``.
          offer: What was offered.
          offset: As read from the rest of the answer.

        Raises:
          RemoteProtocolError: It is not understood, or not what was offered.
          IntegrityError: It was not signed by the key it shows, or for another offer.
        """
        name = attributes.get("kem")
        if name not in offer.kems.split(" ") or name not in tuple(Kem):
            raise RemoteProtocolError("the peer's seal is not understood: bad or no 'kem'")
        kem = Kem(name)
        if not 0 <= offset <= offer.terms.size:
            raise RemoteProtocolError("the peer asks for bytes behind the end of the file")
        answer = cls(
            offer=offer,
            offset=offset,
            identity=read_base64("identity", attributes.get("identity"), [KEY_SIZE]),
            successions=read_successions(attributes.get("successions")),
            kem=kem,
            key=read_base64("key", attributes.get("key"), [kem.public_size]),
            signature=read_base64("signature", attributes.get("signature"), [SIGNATURE_SIZE]),
        )
        said = _answer_statement(
            offer, offset, answer.identity, answer.successions, kem, answer.key
        )
        if not verify(answer.identity, answer.signature, said):
            raise IntegrityError(f"the answer was changed on its way: {_FALSE}")
        return answer

    def attributes(self) -> dict[str, str]:
        """Write it, for a childless ``<seal xmlns='urn:syncd:seal:1'/>`` in ``<si/>``."""
        return {
            "identity": write_base64(self.identity),
            "kem": str(self.kem),
            "key": write_base64(self.key),
            "signature": write_base64(self.signature),
        } | _written(self.successions)

    @property
    def length(self) -> int:
        """How many bytes of the file follow, bytes."""
        return self.offer.terms.size - self.offset

    @property
    def transcript(self) -> bytes:
        """A hash of all that both ends have signed, 32 bytes."""
        said = _answer_statement(
            self.offer, self.offset, self.identity, self.successions, self.kem, self.key
        )
        return digest("transcript", said, self.signature)

    def seal(self, purpose: str, secret: bytes, *bound: bytes) -> bytes:
        """Seal a secret to the receiver, for this transfer alone; `open` is its other end.

        Args:
          purpose: A label as statements have; it opens for no other.
          secret: What is sealed.
          bound: What else must be the same at both ends.

        Returns:
          `Kem.sealed_size` bytes, from HPKE; who sealed must be said by a signature.

        Raises:
          IntegrityError: Nothing can be sealed to the ephemeral key.
        """
        return hpke.seal(secret, self.kem, self.key, self._info(purpose, bound))

    def open(self, purpose: str, sealed: bytes, ephemeral: Ephemeral, *bound: bytes) -> bytes:
        """Open what was sealed for a purpose.

        Args:
          purpose: As it was sealed for.
          sealed: From `seal`.
          ephemeral: The key of this answer.
          bound: As it was sealed with.

        Raises:
          IntegrityError: It was sealed for another transfer or purpose, or changed.
        """
        return ephemeral.open(sealed, self._info(purpose, bound))

    def _info(self, purpose: str, bound: Sequence[bytes]) -> bytes:
        """What a secret is for, and bound to (RFC 9180 section 8.1)."""
        return statement(purpose, self.transcript, *bound)


_FALSE = "its signature is not by the key that it shows"


def _offer_statement(terms: Terms, identity: bytes, successions: bytes, kems: str) -> bytes:
    return statement("offer", *terms.fields(), identity, successions, kems)


def _answer_statement(
    offer: Offer, offset: int, identity: bytes, successions: bytes, kem: Kem, key: bytes
) -> bytes:
    return statement(
        "answer",
        offer.digest(),
        offer.terms.sid,
        offer.terms.sender,
        offer.terms.receiver,
        offset,
        identity,
        successions,
        str(kem),
        key,
    )


def _written(successions: bytes) -> dict[str, str]:
    return {"successions": write_base64(successions)} if successions else {}
