from __future__ import annotations

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from syncd.errors import IntegrityError
from syncd.trust.kem import Ephemeral, Kem, seal, supported
from tests.support.sealing import PRIVATE

KEY = bytes(range(32))
kems = pytest.mark.parametrize("kem", Kem)


@kems
@pytest.mark.parametrize("secret", [KEY, KEY + KEY, b""], ids=len)
def test_what_is_sealed_to_a_key_is_opened_by_it(kem: Kem, secret: bytes) -> None:
    ephemeral = Ephemeral.generate(kem)
    sealed = seal(secret, kem, ephemeral.public, b"info")
    assert kem.public_size == len(ephemeral.public)
    assert kem.sealed_size(len(secret)) == len(sealed)
    assert ephemeral.open(sealed, b"info") == secret


@kems
def test_every_sealing_is_another(kem: Kem) -> None:
    public = Ephemeral(kem, PRIVATE[kem]).public
    assert seal(KEY, kem, public, b"") != seal(KEY, kem, public, b"")


@kems
def test_every_key_is_another(kem: Kem) -> None:
    assert Ephemeral.generate(kem).public != Ephemeral.generate(kem).public


@kems
def test_it_opens_for_its_purpose_only(kem: Kem) -> None:
    ephemeral = Ephemeral(kem, PRIVATE[kem])
    sealed = seal(KEY, kem, ephemeral.public, b"this")
    with pytest.raises(IntegrityError):
        ephemeral.open(sealed, b"that")


@kems
def test_nobody_else_opens_it(kem: Kem) -> None:
    sealed = seal(KEY, kem, Ephemeral(kem, PRIVATE[kem]).public, b"")
    with pytest.raises(IntegrityError):
        Ephemeral.generate(kem).open(sealed, b"")


@kems
@pytest.mark.parametrize("where", [0, 40, -20, -1])
def test_a_changed_byte_closes_it(kem: Kem, where: int) -> None:
    ephemeral = Ephemeral(kem, PRIVATE[kem])
    sealed = bytearray(seal(KEY, kem, ephemeral.public, b""))
    sealed[where] ^= 1
    with pytest.raises(IntegrityError):
        ephemeral.open(bytes(sealed), b"")


@kems
@pytest.mark.parametrize("end", [0, 1, 31, 79, -1])
def test_a_part_of_it_opens_nothing(kem: Kem, end: int) -> None:
    ephemeral = Ephemeral(kem, PRIVATE[kem])
    with pytest.raises(IntegrityError):
        ephemeral.open(seal(KEY, kem, ephemeral.public, b"")[:end], b"")


@kems
def test_nothing_is_sealed_to_a_key_whose_secret_everybody_knows(kem: Kem) -> None:
    """A point of small order (RFC 7748 section 6.1)."""
    public = Ephemeral(kem, PRIVATE[kem]).public[:-32] + bytes(32)
    with pytest.raises(IntegrityError, match="ephemeral key"):
        seal(KEY, kem, public, b"")


def test_bytes_that_are_no_lattice_key_are_refused() -> None:
    """FIPS 203 section 7.2: each coefficient is below 3329."""
    public = b"\xff" * 1_184 + Ephemeral(Kem.HYBRID, PRIVATE[Kem.HYBRID]).public[-32:]
    with pytest.raises(IntegrityError, match="ephemeral key"):
        seal(KEY, Kem.HYBRID, public, b"")


def test_the_hybrid_needs_both_secrets() -> None:
    """Who has broken only one of the two opens nothing."""
    private = PRIVATE[Kem.HYBRID]
    sealed = seal(KEY, Kem.HYBRID, Ephemeral(Kem.HYBRID, private).public, b"")
    half = Ephemeral(Kem.HYBRID, private[:64] + bytes(range(32)))
    other_half = Ephemeral(Kem.HYBRID, bytes(64) + private[64:])
    for ephemeral in (half, other_half):
        with pytest.raises(IntegrityError):
            ephemeral.open(sealed, b"")


def test_the_hybrid_is_preferred_where_there_is_one() -> None:
    assert Kem.X25519 in supported()
    assert supported() in ((Kem.HYBRID, Kem.X25519), (Kem.X25519,))


def test_without_a_lattice_there_is_x25519(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an OpenSSL before 3.5."""

    def generate() -> None:
        raise UnsupportedAlgorithm("ML-KEM-768 is not supported by this backend.")

    monkeypatch.setattr(MLKEM768PrivateKey, "generate", generate)
    assert supported.__wrapped__() == (Kem.X25519,)


def test_its_repr_keeps_the_secret() -> None:
    assert repr(Ephemeral.generate(Kem.X25519)) == "<Ephemeral x25519>"
