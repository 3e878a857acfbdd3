"""Two peers that agree on sealed transfers, for tests of the seal and of what uses it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from syncd.trust import seal
from syncd.trust.handshake import Answer, Offer, Terms
from syncd.trust.kem import Ephemeral, Kem
from syncd.trust.seal import Opener, Sealer
from syncd.trust.signing import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator

# Never to be used for anything else.
ALICE = Identity(bytes(range(32)))
BOB = Identity(bytes(range(32, 64)))
MALLORY = Identity(bytes(range(64, 96)))
PRIVATE = {
    Kem.X25519: bytes(range(100, 132)),
    Kem.HYBRID: bytes(range(132, 228)),
}

TERMS = Terms(
    sid="0123456789abcdef0123456789abcdef",
    sender="alice@example.org/laptop",
    receiver="bob@example.net/desk",
    profile="http://jabber.org/protocol/si/profile/file-transfer",
    folder="photos",
    path="2024/Zürich/see.jpg",
    size=5,
    mtime_ns=1_700_000_000_123_456_789,
)


@dataclass(frozen=True, slots=True)
class Agreed:
    """One agreed transfer."""

    answer: Answer
    ephemeral: Ephemeral
    sender: Identity

    def sealer(self) -> Sealer:
        """The sender's end."""
        return Sealer(self.answer, self.sender)

    def opener(self) -> Opener:
        """The receiver's end."""
        return Opener(self.answer, self.ephemeral)


def agree(
    size: int = TERMS.size,
    offset: int = 0,
    *,
    kem: Kem = Kem.X25519,
    terms: Terms = TERMS,
    sender: Identity = ALICE,
    receiver: Identity = BOB,
    ephemeral: Ephemeral | None = None,
) -> Agreed:
    """Let two peers agree; the same arguments, the same transcript."""
    offer = Offer.make(replace(terms, size=size), sender, [Kem.HYBRID, Kem.X25519])
    own = ephemeral or Ephemeral(kem, PRIVATE[kem])
    return Agreed(Answer.make(offer, offset, receiver, own), own, sender)


def plaintext(size: int) -> bytes:
    """Bytes that do not repeat with the segments."""
    return bytes(number % 251 for number in range(size))


def sealed(agreed: Agreed, data: bytes, *, at_once: int = 1) -> list[bytes]:
    """Seal all of it.

    Args:
      agreed: The transfer.
      data: As long as agreed.
      at_once: Segments in one call.

    Returns:
      The header, then what each call made.
    """
    sealer = agreed.sealer()
    pieces, view = [sealer.header], memoryview(data)
    while True:
        part = view[: at_once * seal.SEGMENT]
        view = view[len(part) :]
        pieces.append(bytes(sealer.seal(part, final=not view)))
        if not view:
            return pieces


def opened(opener: Opener, stream: bytes, *, at_once: int = 1) -> Iterator[bytes]:
    """Open a bytestream as a data thread does, and then whatever else there is.

    Args:
      opener: The receiver's end.
      stream: All that came.
      at_once: Segments in one call.

    Yields:
      What each call made.
    """
    opener.header(stream[: opener.header_size])
    rest = memoryview(stream)[opener.header_size :]
    while rest or not opener.complete:
        plain = min(opener.left, at_once * seal.SEGMENT)
        part = rest[: seal.sealed_length(plain)]
        rest = rest[len(part) :]
        yield bytes(opener.open(part, final=plain == opener.left))
