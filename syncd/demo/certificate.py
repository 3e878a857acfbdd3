"""A certificate authority and a certificate for one domain, made on the spot."""

from __future__ import annotations

import datetime
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# Long enough for any demo that is kept running, short enough that a forgotten CA file in
# somebody's trust store soon means nothing.
VALIDITY = datetime.timedelta(days=30)
# Clocks of containers and virtual machines are sometimes behind.
_BACKDATE = datetime.timedelta(days=1)

_SIGNING = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,
    crl_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A server's certificate with its key, and the authority that signed it; all PEM.

    Attributes:
      ca_pem: What clients must trust.
      certificate_pem: The server's own certificate.
      key_pem: Its private key, not encrypted.
    """

    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes

    def server_context(self) -> ssl.SSLContext:
        """A TLS context that serves this certificate (TLS 1.2 or later)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # The ssl module reads keys from files only; the directory is 0700 and soon gone.
        with tempfile.TemporaryDirectory() as name:
            both = Path(name, "both.pem")
            both.write_bytes(self.key_pem + self.certificate_pem)
            context.load_cert_chain(both)
        return context


def make_certificate(domain: str, now: datetime.datetime) -> Certificate:
    """Make an authority, and let it sign one certificate; its key is then thrown away.

    Args:
      domain: The server's name, as clients check it (RFC 6125).
      now: The time, with its zone; the certificate is valid for `VALIDITY` from here.
    """
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"syncd demo CA for {domain}")]
    )
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _builder(ca_name, ca_name, ca_key, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_SIGNING, critical=True)
        .add_extension(ca_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    # Since Python 3.13 clients check strictly (RFC 5280), hence all these extensions.
    leaf = (
        _builder(_name("syncd demo server"), ca_name, key, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(domain)]), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    return Certificate(
        ca_pem=ca.public_bytes(serialization.Encoding.PEM),
        certificate_pem=leaf.public_bytes(serialization.Encoding.PEM),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _name(text: str) -> x509.Name:
    # RFC 5280 allows 64 characters; only the alternative name is checked by clients.
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, text[:64])])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + VALIDITY)
    )
