"""What both ends sign when a sealed transfer is through. Sans-IO.

The sender signs the hash of the whole file when it asks for the receipt: a part that arrived
earlier is checked against nothing else. The receiver signs the same when the file is durable:
no server can say "it has arrived" in its place.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from syncd.errors import IntegrityError
from syncd.trust.signing import SIGNATURE_SIZE, read_base64, statement, verify, write_base64

if TYPE_CHECKING:
    from syncd.trust.handshake import Answer
    from syncd.trust.signing import Identity


class Said(enum.StrEnum):
    """What is signed, and by whom."""

    FINISH = "finish"  # the sender: this is the whole file
    RECEIPT = "receipt"  # the receiver: I hold it durably
    BESIDE = "beside"  # the receiver: the same, but beside another file of this name


def sign(said: Said, answer: Answer, file_digest: bytes, identity: Identity) -> str:
    """Sign how a transfer ended.

    Args:
      said: What.
      answer: What both ends agreed on.
      file_digest: BLAKE3 of the whole file, 32 bytes.
      identity: The sender's for a finish, the receiver's for a receipt.

    Returns:
      The value of the attribute ``signature``.
    """
    return write_base64(identity.sign(_statement(said, answer, file_digest)))


def check(said: Said, answer: Answer, file_digest: bytes, signature: str | None) -> None:
    """Verify how the other end says a transfer ended.

    Args:
      said: What.
      answer: What both ends agreed on.
      file_digest: BLAKE3 of the whole file, as the element has it.
      signature: The attribute, or None if there is none.

    Raises:
      RemoteProtocolError: There is no signature.
      IntegrityError: It is not the other end's, or for something else.
    """
    signer = answer.offer.identity if said is Said.FINISH else answer.identity
    data = read_base64("signature", signature, [SIGNATURE_SIZE])
    if not verify(signer, data, _statement(said, answer, file_digest)):
        raise IntegrityError(f"the {said} was not signed by the peer of this transfer")


def _statement(said: Said, answer: Answer, file_digest: bytes) -> bytes:
    terms = answer.offer.terms
    return statement(
        str(said),
        answer.transcript,
        terms.sid,
        terms.sender,
        terms.receiver,
        terms.size,
        file_digest,
    )
