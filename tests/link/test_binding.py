"""Against certificates of every kind that is signed in a way of its own."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from syncd.link.tls import tls_server_end_point

RSA = rsa.generate_private_key(65_537, 2_048)
EC = ec.generate_private_key(ec.SECP256R1())

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
# DER of OIDs: ecdsa-with-SHA256, with -SHA1, and one that nobody knows; of equal length each.
ECDSA_SHA256 = bytes.fromhex("06082a8648ce3d040302")
ECDSA_UNKNOWN = bytes.fromhex("06082a8648ce3d04037f")
# sha256-, sha1- and md5WithRSAEncryption.
RSA_SHA256 = bytes.fromhex("06092a864886f70d01010b")
RSA_SHA1 = bytes.fromhex("06092a864886f70d010105")
RSA_MD5 = bytes.fromhex("06092a864886f70d010104")


def certificate(
    key: Key | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey,
    algorithm: hashes.SHA224 | hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None,
    rsa_padding: padding.PSS | None = None,
) -> bytes:
    """A self-signed one, as DER."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "example.org")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2027, 1, 1, tzinfo=UTC))
        .sign(key, algorithm, rsa_padding=rsa_padding)
        .public_bytes(Encoding.DER)
    )


PSS = padding.PSS(padding.MGF1(hashes.SHA384()), padding.PSS.DIGEST_LENGTH)


@pytest.mark.parametrize(
    ("der", "name"),
    [
        (certificate(RSA, hashes.SHA224()), "sha224"),
        (certificate(RSA, hashes.SHA256()), "sha256"),
        (certificate(RSA, hashes.SHA384()), "sha384"),
        (certificate(EC, hashes.SHA512()), "sha512"),
        (certificate(RSA, hashes.SHA384(), PSS), "sha384"),
        # RFC 5929 section 4.1: these two become SHA-256.
        (certificate(RSA, hashes.SHA256()).replace(RSA_SHA256, RSA_SHA1), "sha256"),
        (certificate(RSA, hashes.SHA256()).replace(RSA_SHA256, RSA_MD5), "sha256"),
    ],
)
def test_the_hash_is_the_one_of_the_signature(der: bytes, name: str) -> None:
    assert tls_server_end_point(der) == hashlib.new(name, der).digest()


@pytest.mark.parametrize(
    "der",
    [
        certificate(ed25519.Ed25519PrivateKey.generate(), None),
        certificate(ed448.Ed448PrivateKey.generate(), None),
        certificate(EC, hashes.SHA256()).replace(ECDSA_SHA256, ECDSA_UNKNOWN),
        b"no certificate",
    ],
)
def test_what_the_rfc_leaves_open_is_not_bound_to(der: bytes) -> None:
    assert tls_server_end_point(der) is None
