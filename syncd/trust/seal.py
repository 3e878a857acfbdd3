"""The sealed bytestream: a header, then segments; one way, nothing comes back. Sans-IO.

::

    header   version, segment size, content key sealed by HPKE, the sender's signature
    segment  64 KiB of the file, encrypted, and a tag of 16 bytes
    ...
    segment  the rest, 0 to 64 KiB, with the final flag in its nonce, and its tag

This is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár: "Online Authenticated-Encryption and its
Nonce-Reuse Misuse-Resistance", 2015) over AES-256-GCM. The nonce of a segment is its number
and whether it is the last, so a stream that is cut, or whose segments are moved, doubled or
mixed with another's, does not open. The associated data is a hash over the header and all that
both ends have signed: sid, JIDs, folder, path, size, time, offset.

Nothing waits for anything: the header stands at the beginning of the bytestream itself, where
it works with direct connections, one-way proxies and IBB alike. A transfer that is resumed is
another one, with other keys.

64 KiB: a segment that is not whole when the connection breaks is lost, so on a bad line they
must be small; AES-GCM takes 7 µs for one, which is 9 GiB/s, and 1 MiB is hardly faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from syncd.errors import IntegrityError
from syncd.trust.signing import SIGNATURE_SIZE, digest, statement, verify

if TYPE_CHECKING:
    from syncd.trust.handshake import Answer
    from syncd.trust.kem import Ephemeral, Kem
    from syncd.trust.signing import Identity

SEGMENT_BITS: Final = 16
SEGMENT: Final = 1 << SEGMENT_BITS  # bytes of the file in every segment but the last
TAG: Final = 16  # bytes that each segment grows by
CONTENT_KEY_SIZE: Final = 32  # bytes: AES-256
# What one call takes: as much as one read or write of the pump moves.
BATCH: Final = 16  # segments
# With one key AES-GCM should not be called more often (NIST SP 800-38D section 8.3), which
# makes 256 TiB; docs/sealing.md counts what is left of its strength then.
MAX_SEGMENTS: Final = 1 << 32

_VERSION = 1
_PREFIX = bytes([_VERSION, SEGMENT_BITS])
_PURPOSE = "content key"
_CHANGED = "the bytes were changed on their way, or come from another transfer"


def sealed_length(plain: int) -> int:
    """How long a sealed stream is behind its header.

    Args:
      plain: Bytes of the file from the offset to the end; 0 makes a segment, too.
    """
    return plain + TAG * max(1, -(-plain // SEGMENT))


def header_size(kem: Kem) -> int:
    """How long the header is, bytes: 146, or 1,234 for the hybrid."""
    return len(_PREFIX) + kem.sealed_size(CONTENT_KEY_SIZE) + SIGNATURE_SIZE


class Sealer:
    """The sender's end of a sealed stream; for one thread at a time.

    Args:
      answer: What both ends agreed on.
      identity: The sender's, that of the offer.

    Attributes:
      header: The first bytes of the bytestream.

    Raises:
      IntegrityError: Nothing can be sealed to the receiver's ephemeral key.
      ValueError: It is not the identity of the offer, or the file is too long to be sealed.
    """

    def __init__(self, answer: Answer, identity: Identity) -> None:
        if identity.public != answer.offer.identity:
            raise ValueError("another identity than the offer was signed by")
        key = AESGCM.generate_key(8 * CONTENT_KEY_SIZE)
        sealed = answer.seal(_PURPOSE, key, _PREFIX)
        signature = identity.sign(_header_statement(answer, sealed))
        self.header = _PREFIX + sealed + signature
        self._segments = _Segments(answer, self.header, key)
        # Made once: a fresh one for each call costs more than sealing it.
        self._buffer = memoryview(bytearray(_room(answer.length, TAG)))

    @property
    def left(self) -> int:
        """How many bytes of the file are still to be sealed."""
        return self._segments.left

    def seal(self, data: memoryview, *, final: bool) -> memoryview:
        """Seal the next bytes of the file.

        Args:
          data: A whole number of segments, at most `BATCH`; less only at the end of the file.
          final: Whether the file ends with them.

        Returns:
          What goes onto the bytestream; valid until the next call.

        Raises:
          ValueError: Not as many bytes as agreed, or not as described.
        """
        segments = self._segments
        if not segments.takes(len(data)) or final is not (len(data) == segments.left):
            raise ValueError(f"{len(data)} bytes, final={final}, with {segments.left} left")
        end = 0
        for start in range(0, max(1, len(data)), SEGMENT):
            part = data[start : start + SEGMENT]
            nonce = segments.next_nonce(len(part))
            room = self._buffer[end : end + len(part) + TAG]
            end += segments.cipher.encrypt_into(nonce, part, segments.associated, room)
        return self._buffer[:end]


class Opener:
    """The receiver's end of a sealed stream; for one thread at a time.

    After an `IntegrityError` it opens nothing any more.

    Args:
      answer: What both ends agreed on.
      ephemeral: The key of the answer.

    Attributes:
      header_size: How many bytes stand before the first segment.

    Raises:
      ValueError: It is not the key of the answer, or the file is too long to be sealed.
    """

    def __init__(self, answer: Answer, ephemeral: Ephemeral) -> None:
        if ephemeral.public != answer.key:
            raise ValueError("another ephemeral key than the answer names")
        self.header_size = header_size(answer.kem)
        self._answer = answer
        self._ephemeral: Ephemeral | None = ephemeral
        self._segments: _Segments | None = None
        self._buffer = memoryview(bytearray(_room(answer.length, 0)))

    @property
    def left(self) -> int:
        """How many bytes of the file are still to come."""
        return self._answer.length if self._segments is None else self._segments.left

    @property
    def complete(self) -> bool:
        """Whether the final segment was opened, and so the whole stream is good."""
        return self._segments is not None and self._segments.ended

    def header(self, data: bytes | memoryview) -> None:
        """Take the header.

        Args:
          data: The first `header_size` bytes of the bytestream.

        Raises:
          IntegrityError: It is not the sender's, or made for another transfer.
          ValueError: It was called before.
        """
        ephemeral, self._ephemeral = self._ephemeral, None
        if ephemeral is None:
            raise ValueError("there is one header")
        data = bytes(data)
        if len(data) != self.header_size or not data.startswith(_PREFIX):
            raise IntegrityError("the bytestream does not begin with the header of a seal")
        sealed = data[len(_PREFIX) : -SIGNATURE_SIZE]
        said = _header_statement(self._answer, sealed)
        if not verify(self._answer.offer.identity, data[-SIGNATURE_SIZE:], said):
            raise IntegrityError("the bytestream does not come from the peer that offered it")
        key = self._answer.open(_PURPOSE, sealed, ephemeral, _PREFIX)
        self._segments = _Segments(self._answer, data, key)

    def open(self, data: bytes | memoryview, *, final: bool) -> memoryview:
        """Open the next segments.

        Args:
          data: A whole number of sealed segments, at most `BATCH`; less only at the end.
          final: Whether the stream ends with them.

        Returns:
          The bytes of the file; valid until the next call.

        Raises:
          IntegrityError: They are not the ones that come next; none of them counts.
          ValueError: `header` has not succeeded, or an error came before.
        """
        segments = self._segments
        if segments is None:
            raise ValueError("no header was taken, or something was wrong before")
        self._segments = None
        view = memoryview(data)
        length = len(view) - TAG * max(1, -(-len(view) // (SEGMENT + TAG)))
        framed = len(view) == sealed_length(length) and segments.takes(length)
        if not framed or final is not (length == segments.left):
            raise IntegrityError("the bytestream is shorter or longer than was agreed")
        end = 0
        for start in range(0, len(view), SEGMENT + TAG):
            part = view[start : start + SEGMENT + TAG]
            nonce = segments.next_nonce(len(part) - TAG)
            room = self._buffer[end : end + len(part) - TAG]
            try:
                end += segments.cipher.decrypt_into(nonce, part, segments.associated, room)
            except InvalidTag as error:
                self._buffer[:] = bytes(len(self._buffer))  # what has no proof is nobody's
                raise IntegrityError(_CHANGED) from error
        self._segments = segments
        return self._buffer[:end]


class _Segments:
    """Which segment comes next; the same at both ends."""

    def __init__(self, answer: Answer, header: bytes, key: bytes) -> None:
        self.cipher = AESGCM(key)
        self.associated = digest("segments", answer.transcript, header)
        self.left = answer.length
        self.ended = False
        self._number = 0

    def takes(self, length: int) -> bool:
        """Whether so many bytes of the file are a whole number of segments, or the rest."""
        if self.ended or not 0 <= length <= min(self.left, BATCH * SEGMENT):
            return False
        return length == self.left or (length > 0 and length % SEGMENT == 0)

    def next_nonce(self, length: int) -> bytes:
        """Count a segment; its number in 11 bytes, then 1 for the last and 0 for others."""
        self.left -= length
        self.ended = self.left == 0
        nonce = self._number.to_bytes(11, "big") + bytes([self.ended])
        self._number += 1
        return nonce


def _room(length: int, extra: int) -> int:
    """How large a buffer must be, bytes; not larger than the file."""
    if length > MAX_SEGMENTS * SEGMENT:
        raise ValueError("a file this long is not sealed with one key")
    count = max(1, min(BATCH, -(-length // SEGMENT)))
    return min(length, count * SEGMENT) + count * extra


def _header_statement(answer: Answer, sealed: bytes) -> bytes:
    return statement("header", answer.transcript, _PREFIX, sealed)
