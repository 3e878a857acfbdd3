"""What both ends say when a sealed transfer is through. Sans-IO.

The sender says what the whole file is when it asks for the receipt: a part that arrived
earlier is checked against nothing else. It seals that to the receiver, and signs it, as it did
with the content key. The receiver signs the same when the file is durable: no server can say
"it has arrived" in its place.

Neither shows the hash of the file, or anything that a guess could be tried on: what is sealed
differs each time, and what is signed at the end has the salt in it, which only both ends know.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.errors import IntegrityError
from syncd.trust.signing import (
    SIGNATURE_SIZE,
    digest,
    read_base64,
    statement,
    verify,
    write_base64,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from syncd.trust.handshake import Answer
    from syncd.trust.kem import Ephemeral
    from syncd.trust.signing import Identity

DIGEST_SIZE = 32  # bytes of a BLAKE3
SALT_SIZE = 32  # bytes; nobody tries them all, whatever else he guesses

_PURPOSE = "content"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What the whole file is; for the two ends alone.

    Attributes:
      digest: BLAKE3 of it, `DIGEST_SIZE` bytes.
      salt: `SALT_SIZE` random bytes, made for this transfer.
    """

    digest: bytes
    salt: bytes


class Said(enum.StrEnum):
    """What the receiver signs."""

    RECEIPT = "receipt"  # I hold it durably
    BESIDE = "beside"  # the same, but beside another file of this name


def seal_finish(answer: Answer, content: Content, identity: Identity) -> dict[str, str]:
    """Say what the whole file is.

    Args:
      answer: What both ends agreed on.
      content: Of the file as it was sent.
      identity: The sender's, that of the offer.

    Returns:
      Attributes for ``<finish/>``: ``sealed`` and ``signature``.

    Raises:
      ValueError: The digest or the salt has another length.
    """
    if (len(content.digest), len(content.salt)) != (DIGEST_SIZE, SALT_SIZE):
        raise ValueError("no digest, or no salt")
    sealed = answer.seal(_PURPOSE, content.digest + content.salt)
    signature = identity.sign(_finish_statement(answer, sealed))
    return {"sealed": write_base64(sealed), "signature": write_base64(signature)}


def open_finish(answer: Answer, attributes: Mapping[str, str], ephemeral: Ephemeral) -> Content:
    """Hear what the whole file is.

    Args:
      answer: What both ends agreed on.
      attributes: Of ``<finish/>``.
      ephemeral: The key of the answer.

    Raises:
      RemoteProtocolError: It is not understood.
      IntegrityError: The sender did not sign it, or for another transfer.
    """
    size = answer.kem.sealed_size(DIGEST_SIZE + SALT_SIZE)
    sealed = read_base64("sealed", attributes.get("sealed"), [size])
    signature = read_base64("signature", attributes.get("signature"), [SIGNATURE_SIZE])
    # First who, then what: of anybody else nothing is put to the key at all.
    if not verify(answer.offer.identity, signature, _finish_statement(answer, sealed)):
        raise IntegrityError("the finish was not signed by the peer of this transfer")
    opened = answer.open(_PURPOSE, sealed, ephemeral)
    return Content(digest=opened[:DIGEST_SIZE], salt=opened[DIGEST_SIZE:])


def sign(said: Said, answer: Answer, content: Content, identity: Identity) -> str:
    """Sign how a transfer ended.

    Args:
      said: What.
      answer: What both ends agreed on.
      content: From `open_finish`, once it lies durably on the disk.
      identity: The receiver's, that of the answer.

    Returns:
      The value of the attribute ``signature``.
    """
    return write_base64(identity.sign(_statement(said, answer, content)))


def check(said: Said, answer: Answer, content: Content, signature: str | None) -> None:
    """Verify how the receiver says a transfer ended.

    Args:
      said: What.
      answer: What both ends agreed on.
      content: What was said to it in the finish.
      signature: The attribute, or None if there is none.

    Raises:
      RemoteProtocolError: There is no signature.
      IntegrityError: It is not the receiver's, or for something else.
    """
    data = read_base64("signature", signature, [SIGNATURE_SIZE])
    if not verify(answer.identity, data, _statement(said, answer, content)):
        raise IntegrityError(f"the {said} was not signed by the peer of this transfer")


def _finish_statement(answer: Answer, sealed: bytes) -> bytes:
    return statement("finish", *_about(answer), sealed)


def _statement(said: Said, answer: Answer, content: Content) -> bytes:
    return statement(str(said), *_about(answer), _commitment(answer, content))


def _commitment(answer: Answer, content: Content) -> bytes:
    """Stands for the content, and tells nothing of it to who lacks the salt."""
    size = answer.offer.terms.size
    return digest("commitment", answer.transcript, size, content.digest, content.salt)


def _about(answer: Answer) -> tuple[bytes | str | int, ...]:
    terms = answer.offer.terms
    return answer.transcript, terms.sid, terms.sender, terms.receiver, terms.size
