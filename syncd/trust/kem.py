"""The ephemeral key of one transfer, and the secrets that are sealed to it. Sans-IO.

HPKE (RFC 9180) in base mode, single-shot, with HKDF-SHA256 and AES-256-GCM. Who sealed is
said by a signature around it, not by HPKE's own authenticated modes: the hybrid has none.
The randomness is `cryptography`'s own, which takes it from the kernel.
"""

from __future__ import annotations

import enum
from functools import cache
from typing import Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)

from syncd.errors import IntegrityError

_X25519_SIZE = 32  # bytes of a public and of a private key; RFC 7748 section 5
_MLKEM_SIZE = 1_184  # bytes of a public key; FIPS 203 table 3
_MLKEM_SEED_SIZE = 64  # bytes; FIPS 203 section 7.1


class Kem(enum.StrEnum):
    """How the secrets of a transfer are sealed; the better one first."""

    # What a proxy records today stays closed, even to one who can break X25519 one day.
    # HPKE's KEM 0x647a, also known as X-Wing.
    HYBRID = "mlkem768-x25519"
    X25519 = "x25519"  # HPKE's KEM 0x0020

    @property
    def public_size(self) -> int:
        """Length of an ephemeral public key, bytes."""
        return _X25519_SIZE + (_MLKEM_SIZE if self is Kem.HYBRID else 0)

    def sealed_size(self, size: int) -> int:
        """Length of a sealed secret: HPKE's ``enc``, the secret, and its tag; bytes.

        Args:
          size: Of the secret, bytes.
        """
        encapsulated = 1_120 if self is Kem.HYBRID else 32
        return encapsulated + size + 16

    @property
    def suite(self) -> hpke.Suite:
        """The HPKE suite."""
        kem = hpke.KEM.MLKEM768_X25519 if self is Kem.HYBRID else hpke.KEM.X25519
        return hpke.Suite(kem, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@cache
def supported() -> tuple[Kem, ...]:
    """What this `cryptography` can do, the best first."""
    try:
        MLKEM768PrivateKey.generate()
    except UnsupportedAlgorithm:  # built on an OpenSSL before 3.5
        return (Kem.X25519,)
    return (Kem.HYBRID, Kem.X25519)


class Ephemeral:
    """The receiver's key of one transfer; forgotten with it, and the transfer is closed.

    Args:
      kem: What it is for.
      private: X25519's private key (32 bytes), for the hybrid behind ML-KEM's seed (64).

    Attributes:
      kem: As given.
      public: The public key, as the answer carries it.
    """

    __slots__ = ("_key", "kem", "public")

    def __init__(self, kem: Kem, private: bytes) -> None:
        self.kem = kem
        ecdh = X25519PrivateKey.from_private_bytes(private[-_X25519_SIZE:])
        self.public = ecdh.public_key().public_bytes_raw()
        self._key: X25519PrivateKey | hpke.MLKEM768X25519PrivateKey = ecdh
        if kem is Kem.HYBRID:
            lattice = MLKEM768PrivateKey.from_seed_bytes(private[:_MLKEM_SEED_SIZE])
            self.public = lattice.public_key().public_bytes_raw() + self.public
            self._key = hpke.MLKEM768X25519PrivateKey(lattice, ecdh)

    def __repr__(self) -> str:
        return f"<Ephemeral {self.kem}>"

    @classmethod
    def generate(cls, kem: Kem) -> Self:
        """Make a new one."""
        private = X25519PrivateKey.generate().private_bytes_raw()
        if kem is Kem.HYBRID:
            private = MLKEM768PrivateKey.generate().private_bytes_raw() + private
        return cls(kem, private)

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Open a sealed secret.

        Args:
          sealed: From `seal`.
          info: What it is for, and bound to.

        Raises:
          IntegrityError: It was not sealed to this key for this purpose.
        """
        try:
            return self.kem.suite.decrypt(sealed, self._key, info=info)
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(
                "what was sealed is for another transfer, or was changed"
            ) from error


def seal(secret: bytes, kem: Kem, public: bytes, info: bytes) -> bytes:
    """Seal a secret to an ephemeral key.

    Args:
      secret: What nobody else may know; its length can be seen.
      kem: What the ephemeral key is for.
      public: The ephemeral public key, `Kem.public_size` bytes.
      info: What it is for, and bound to.

    Returns:
      `Kem.sealed_size` bytes.

    Raises:
      IntegrityError: Nothing can be sealed to such a key.
    """
    try:
        ecdh = X25519PublicKey.from_public_bytes(public[-_X25519_SIZE:])
        if kem is Kem.X25519:
            return kem.suite.encrypt(secret, ecdh, info=info)
        lattice = MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_SIZE])
        hybrid = hpke.MLKEM768X25519PublicKey(lattice, ecdh)
        return kem.suite.encrypt(secret, hybrid, info=info)
    except ValueError as error:  # a point of small order, or no lattice key
        raise IntegrityError("the peer's ephemeral key is none") from error
