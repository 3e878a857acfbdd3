"""An identity, and the canonical bytes that it signs (Ed25519, RFC 8032). Sans-IO.

Whatever is signed or hashed here is a *statement*: a label that says what it is about and no
other statement has, then fields, each behind its length. So no two statements have the same
bytes, and a signature given for one thing never counts for another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import TYPE_CHECKING, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from syncd.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

NS_SEAL = "urn:syncd:seal:1"

# RFC 8032 section 5.1.5 and 5.1.6.
KEY_SIZE = 32  # bytes of an Ed25519 public key, and of a private one
SIGNATURE_SIZE = 64  # bytes
# A peer that was away while more keys were replaced than this asks its user.
MAX_SUCCESSIONS = 8  # keys before the present one

_LINK = KEY_SIZE + SIGNATURE_SIZE


def statement(label: str, *fields: bytes | str | int) -> bytes:
    """Make the canonical bytes of a statement.

    Args:
      label: What it is about.
      fields: Text is UTF-8; a number is unsigned, 8 bytes, big-endian.

    Returns:
      Namespace and label, then all fields, each behind its length as 4 bytes, big-endian.

    Raises:
      ValueError: A text is no valid Unicode, or a number is negative or too large for a file.
    """
    parts = []
    for field in (f"{NS_SEAL} {label}", *fields):
        match field:
            case str():
                data = field.encode()
            case int():
                if not 0 <= field < 1 << 63:
                    raise ValueError(f"{field} is no length or time of a file")
                data = field.to_bytes(8, "big")
            case bytes():
                data = field
        parts += [len(data).to_bytes(4, "big"), data]
    return b"".join(parts)


def digest(label: str, *fields: bytes | str | int) -> bytes:
    """Hash a statement with SHA-256."""
    return hashlib.sha256(statement(label, *fields)).digest()


def verify(public: bytes, signature: bytes, said: bytes) -> bool:
    """Whether a key has signed a statement.

    Args:
      public: An Ed25519 public key, 32 bytes.
      signature: 64 bytes.
      said: From `statement`.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, said)
    except (InvalidSignature, ValueError):  # ValueError: 32 bytes that are no point
        return False
    return True


class Identity:
    """The key by which a daemon is known, and the proofs that it replaced others.

    Args:
      private: The private key, 32 bytes.
      successions: One for each key that was replaced, the latest last: the old public key,
        and its signature that names the next.

    Attributes:
      public: The public key, 32 bytes.
      successions: All of them, joined, as peers get to see them.
    """

    __slots__ = ("_private", "public", "successions")

    def __init__(self, private: bytes, successions: bytes = b"") -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes_raw()
        self.successions = successions

    def __repr__(self) -> str:
        return f"<Identity {self.public.hex()[:8]}>"

    def sign(self, said: bytes) -> bytes:
        """Sign a statement."""
        return self._private.sign(said)

    def private_bytes(self) -> bytes:
        """The private key, 32 bytes; for the file it is kept in, and for nobody else."""
        return self._private.private_bytes_raw()

    @classmethod
    def generate(cls) -> Self:
        """Make a new one."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def succeeded_by(self, private: bytes) -> Identity:
        """Replace this key: the old one signs the name of the new one.

        Args:
          private: The new private key, 32 bytes.
        """
        new = Identity(private)
        link = self.public + self.sign(_succession(self.public, new.public))
        links = [*_links(self.successions), link][-MAX_SUCCESSIONS:]
        return Identity(private, b"".join(links))


def predecessors(public: bytes, successions: bytes) -> tuple[bytes, ...]:
    """Which keys have named this one as their successor, directly or over others.

    Args:
      public: The key that is shown now, 32 bytes.
      successions: What is shown with it; not more than can be proved counts.

    Returns:
      Public keys, the latest last.
    """
    proved: list[bytes] = []
    for link in reversed(_links(successions)):
        old, signature = link[:KEY_SIZE], link[KEY_SIZE:]
        if not verify(old, signature, _succession(old, public)):
            break
        proved.append(old)
        public = old
    return tuple(reversed(proved))


def write_base64(data: bytes) -> str:
    """Write bytes as the value of an attribute (RFC 4648 section 4)."""
    return base64.b64encode(data).decode("ascii")


def read_base64(name: str, text: str | None, sizes: Iterable[int]) -> bytes:
    """Read the value of an attribute that has one spelling and a known length.

    Args:
      name: Of the attribute, for the message.
      text: Its value, or None if it is missing.
      sizes: How many bytes it may have.

    Raises:
      RemoteProtocolError: It is missing, or not what it must be.
    """
    sizes = tuple(sizes)
    # Before anything is decoded: nobody makes us look at more than we can use.
    if text is not None and len(text) <= 4 * -(-max(sizes) // 3):
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):  # ValueError: other than ASCII
            data = b""
        # Decoding alone takes spare bits and pads in more than one spelling.
        if data and len(data) in sizes and write_base64(data) == text:
            return data
    raise RemoteProtocolError(f"the peer's seal is not understood: bad or no {name!r}")


def read_successions(text: str | None) -> bytes:
    """Read the attribute that proves a change of keys; empty if there is none.

    Raises:
      RemoteProtocolError: It is not what it must be.
    """
    if text is None:
        return b""
    sizes = range(_LINK, _LINK * MAX_SUCCESSIONS + 1, _LINK)
    return read_base64("successions", text, sizes)


def _succession(old: bytes, new: bytes) -> bytes:
    return statement("succession", old, new)


def _links(successions: bytes) -> list[bytes]:
    return [successions[i : i + _LINK] for i in range(0, len(successions), _LINK)]
