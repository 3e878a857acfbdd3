from __future__ import annotations

import datetime
import hashlib
import ssl

import pytest
from cryptography import x509

from syncd.demo.server import VALIDITY, Certificate, make_certificate

NOW = datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC)


def shake(certificate: Certificate, name: str) -> str:
    """A whole TLS handshake in memory, as strict as a client can be; gives the version."""
    client_context = ssl.create_default_context(cadata=certificate.ca_pem.decode())
    client_context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = certificate.server_context().wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.version() or ""


def test_a_strict_client_that_trusts_the_ca_takes_the_certificate() -> None:
    made = make_certificate("demo.example", datetime.datetime.now(datetime.UTC))
    assert shake(made, "demo.example") == "TLSv1.3"


def test_a_certificate_is_good_for_its_domain_only() -> None:
    made = make_certificate("demo.example", datetime.datetime.now(datetime.UTC))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(made, "other.example")


def test_validity_begins_before_now_and_ends_soon() -> None:
    made = make_certificate("demo.example", NOW)
    for pem in (made.ca_pem, made.certificate_pem):
        read = x509.load_pem_x509_certificate(pem)
        assert read.not_valid_before_utc < NOW
        assert read.not_valid_after_utc == NOW + VALIDITY


def test_every_certificate_has_its_own_authority() -> None:
    assert (
        make_certificate("a.example", NOW).ca_pem != make_certificate("a.example", NOW).ca_pem
    )


def test_a_domain_may_be_long() -> None:
    domain = ".".join(["a" * 60] * 4)
    made = make_certificate(domain, NOW)
    leaf = x509.load_pem_x509_certificate(made.certificate_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [domain]


def test_what_a_login_is_bound_to_is_what_clients_see() -> None:
    """RFC 5929 section 4.1: ECDSA with SHA-256 is hashed by SHA-256."""
    made = make_certificate("demo.example", NOW)
    der = ssl.PEM_cert_to_DER_cert(made.certificate_pem.decode())
    assert made.end_point == hashlib.sha256(der).digest()
