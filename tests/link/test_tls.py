"""Handshakes in memory with certificates of every kind, and what is said of bad ones."""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from trio.testing import memory_stream_pair

from syncd.errors import ErrorType, OfflineError, RemoteProtocolError
from syncd.link import tls

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 11, 21, tzinfo=UTC)
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


def serving(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    """A server's context."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*names).configure_cert(context)
    return context


async def shake(
    client: ssl.SSLContext, server: ssl.SSLContext, name: str = "example.org"
) -> tuple[trio.SSLStream[trio.abc.Stream], bytes, trio.SSLStream[trio.abc.Stream]]:
    """Our end, the certificate, and their end, of a handshake that succeeds."""
    ours, theirs = memory_stream_pair()
    accepted = trio.SSLStream[trio.abc.Stream](theirs, server, server_side=True)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepted.do_handshake)
            connected, der = await tls.start_tls(ours, client, name)
    return connected, der, accepted


async def shake_in_vain(
    client: ssl.SSLContext, server: ssl.SSLContext, name: str = "example.org"
) -> Exception:
    """Why a handshake fails."""
    ours, theirs = memory_stream_pair()
    accepted = trio.SSLStream[trio.abc.Stream](theirs, server, server_side=True)

    async def accept() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await accepted.do_handshake()
        await theirs.aclose()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            with pytest.raises((ssl.SSLCertVerificationError, OfflineError)) as caught:
                await tls.start_tls(ours, client, name)
            await ours.aclose()
    return caught.value


# --- The handshake


@pytest.mark.parametrize("name", ["example.org", "192.0.2.1", "xn--strae-oqa.example"])
async def test_a_certificate_for_the_domain_under_a_known_ca_is_good(
    authority: trustme.CA, ca_file: Path, name: str
) -> None:
    client = tls.make_context(ca_file=ca_file, verify=True, direct=False)
    ours, der, theirs = await shake(client, serving(authority, name), name)
    assert name in str(x509.load_der_x509_certificate(der).extensions)
    assert ours.selected_alpn_protocol() is None
    assert theirs.selected_alpn_protocol() is None


@pytest.mark.parametrize("name", ["strasse.example", "*.example.org", "xmpp.example.org"])
async def test_no_other_name_is_good(authority: trustme.CA, ca_file: Path, name: str) -> None:
    """Neither what IDNA 2003 makes of straße, nor names below the domain."""
    client = tls.make_context(ca_file=ca_file, verify=True, direct=False)
    asked = "xn--strae-oqa.example" if name == "strasse.example" else "example.org"
    error = await shake_in_vain(client, serving(authority, name), asked)
    assert isinstance(error, ssl.SSLCertVerificationError)
    assert error.verify_message.startswith("Hostname mismatch")


@pytest.mark.parametrize(
    ("offered", "selected"),
    [([], None), (["h2"], None), (["h2", "xmpp-client"], "xmpp-client")],
)
async def test_direct_tls_tells_the_protocol_and_insists_on_nothing(
    authority: trustme.CA, ca_file: Path, offered: list[str], selected: str | None
) -> None:
    """XEP-0368: servers that share a port need ALPN, and many others do not know it."""
    asked: list[str | None] = []
    server = serving(authority, "example.org")
    if offered:
        server.set_alpn_protocols(offered)
    server.sni_callback = lambda _, name, __: asked.append(name)
    client = tls.make_context(ca_file=ca_file, verify=True, direct=True)
    ours, _, theirs = await shake(client, server)
    assert ours.selected_alpn_protocol() == theirs.selected_alpn_protocol() == selected
    assert asked == ["example.org"]


@pytest.mark.parametrize(
    ("alert", "words", "hint"),
    [
        (70, "it can only what is older than TLS 1.2", "update the server"),
        (112, "it does not serve this domain", "are account.jid and account.server right?"),
        (80, "[SSL: TLSV1_ALERT_INTERNAL_ERROR]", ""),
    ],
)
async def test_the_servers_alerts_are_told_in_words(alert: int, words: str, hint: str) -> None:
    """RFC 8446 section 6.2; only frequent ones in our own words."""
    ours, theirs = memory_stream_pair()

    async def refuse() -> None:
        await theirs.receive_some()
        # Section 5.1: an alert (21), TLS 1.2, of two bytes: fatal, and which.
        await theirs.send_all(bytes([21, 3, 3, 0, 2, 2, alert]))

    client = tls.make_context(ca_file=None, verify=True, direct=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse)
        with pytest.raises(OfflineError) as caught:
            await tls.start_tls(ours, client, "example.org")
    assert str(caught.value).startswith(f"TLS with the server failed: {words}")
    assert caught.value.hint == hint


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
async def test_what_is_older_than_tls_1_2_is_refused(
    authority: trustme.CA, ca_file: Path
) -> None:
    server = serving(authority, "example.org")
    server.minimum_version = ssl.TLSVersion.TLSv1_1
    server.maximum_version = ssl.TLSVersion.TLSv1_1
    server.set_ciphers("DEFAULT:@SECLEVEL=0")
    client = tls.make_context(ca_file=ca_file, verify=True, direct=False)
    assert client.minimum_version == ssl.TLSVersion.TLSv1_2
    error = await shake_in_vain(client, server)
    assert isinstance(error, OfflineError)


async def test_the_common_name_alone_is_nobodys_name(tmp_path: Path) -> None:
    """RFC 9525 section 2: whatever it says, name constraints of the CA do not reach it."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    common = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "example.org")])
    signed = (
        x509.CertificateBuilder()
        .subject_name(common)
        .issuer_name(common)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "self-signed.pem"
    path.write_bytes(signed.public_bytes(Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(path, tmp_path / "key.pem")
    client = tls.make_context(ca_file=path, verify=True, direct=False)
    error = await shake_in_vain(client, server)
    assert isinstance(error, ssl.SSLCertVerificationError)
    told = tls.explain(error, "example.org", signed.public_bytes(Encoding.DER), now)
    assert str(told) == (
        "the server's certificate is not good for example.org: it is for example.org by its "
        "subject, and for nobody by a subject alternative name"
    )
    assert "account.certificate_fingerprint" in told.hint


async def test_tls_that_judges_nothing_still_gives_the_certificate(
    authority: trustme.CA,
) -> None:
    client = tls.make_context(ca_file=None, verify=False, direct=False)
    _, der, __ = await shake(client, serving(authority, "evil.example"))
    names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["evil.example"]


async def test_a_connection_that_ends_in_the_handshake_is_an_outage() -> None:
    ours, theirs = memory_stream_pair()
    await theirs.aclose()
    client = tls.make_context(ca_file=None, verify=True, direct=False)
    with pytest.raises(OfflineError, match="TLS with the server failed"):
        await tls.start_tls(ours, client, "example.org")


@pytest.mark.parametrize("content", [None, "not PEM"])
def test_the_ca_file_must_be_usable(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OfflineError) as caught:
        tls.make_context(ca_file=path, verify=True, direct=False)
    assert str(path) in str(caught.value)
    assert "PEM" in caught.value.hint


# --- The pin


def test_the_named_certificate_is_good() -> None:
    tls.check_fingerprint(b"DER", hashlib.sha256(b"DER").digest())


def test_another_certificate_than_the_named_one_shows_both() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        tls.check_fingerprint(b"DER", bytes(32))
    assert "its fingerprint is " + tls.colons(hashlib.sha256(b"DER").digest()) in str(
        caught.value
    )
    assert "not 00:00" in str(caught.value)
    assert "administrator" in caught.value.hint
    assert caught.value.type is ErrorType.CANCEL


# --- Words


def certificate(
    names: list[x509.GeneralName] | None,
    *,
    subject: x509.Name | None = None,
    issuer: str = "Example CA",
    begin: datetime = NOW - timedelta(days=90),
    end: datetime = NOW + timedelta(days=90),
) -> bytes:
    """One as DER, which nobody has to trust."""
    common = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old.example.org")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject or common)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(end)
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def verdict(code: int, message: str = "OpenSSL's words") -> ssl.SSLCertVerificationError:
    """What OpenSSL found."""
    error = ssl.SSLCertVerificationError(message)
    error.verify_code, error.verify_message = code, message
    return error


def explained(code: int, der: bytes | None) -> tuple[str, str]:
    """The reason, without what every one begins with, and the hint."""
    error = tls.explain(verdict(code), "example.org", der, NOW)
    subject = "the server's certificate is not good for example.org: "
    assert str(error).startswith(subject)
    assert error.type is ErrorType.WAIT
    return str(error).removeprefix(subject), error.hint


CHAT: list[x509.GeneralName] = [x509.DNSName("chat.example.net")]
FINE = certificate(CHAT)
PIN = f'account.certificate_fingerprint = "{tls.colons(hashlib.sha256(FINE).digest())}"'
BY_SUBJECT = " by its subject, and for nobody by a subject alternative name"
CLOCK = "is the clock of this machine right (today is 2026-11-21)?"


def test_an_expired_certificate_is_told_with_the_date() -> None:
    der = certificate(CHAT, end=datetime(2026, 10, 1, tzinfo=UTC))
    assert explained(10, der) == (
        "it expired on 2026-10-01",
        f"renew it on the server; {CLOCK}",
    )


def test_a_certificate_of_the_future_is_told_with_the_date() -> None:
    der = certificate(CHAT, begin=datetime(2027, 1, 2, tzinfo=UTC), end=NOW + timedelta(999))
    assert explained(9, der) == ("it is not valid before 2027-01-02", CLOCK)


@pytest.mark.parametrize("code", [9, 10])
def test_dates_of_another_certificate_in_the_chain_are_not_blamed_on_this_one(
    code: int,
) -> None:
    why, hint = explained(code, FINE)
    assert why == "OpenSSL's words (it is for chat.example.net, issued by Example CA)"
    assert PIN in hint


@pytest.mark.parametrize("code", [62, 64])
def test_a_wrong_name_is_told_with_the_names(code: int) -> None:
    why, hint = explained(code, FINE)
    assert why == "it is for chat.example.net"
    assert hint.startswith("the server needs one for example.org, or, ")
    assert PIN in hint


def test_a_self_signed_certificate_is_told_with_what_would_make_it_good() -> None:
    why, hint = explained(18, FINE)
    assert why == "it is self-signed, and not known here"
    assert "account.ca_file" in hint
    assert PIN in hint


@pytest.mark.parametrize("code", [2, 19, 20, 21])
def test_an_unknown_issuer_is_named(code: int) -> None:
    why, hint = explained(code, FINE)
    assert why == "its issuer, Example CA, is not known here"
    assert "account.ca_file" in hint
    assert PIN in hint


def test_names_are_told_in_bounds() -> None:
    names: list[x509.GeneralName] = [
        x509.DNSName("evil\x1b[2Jname"),
        x509.IPAddress(ipaddress.ip_address("192.0.2.1")),
        x509.RFC822Name("a@example.org"),
        x509.DNSName("x" * 200),
        *(x509.DNSName(f"{number}.example.org") for number in range(9)),
    ]
    why, _ = explained(62, certificate(names))
    assert why == f"it is for evil?[2Jname, {'x' * 79}…, 0.example.org, 1.example.org, 8 more"


def test_a_certificate_for_no_domain_is_told_as_such() -> None:
    """Some are for a person, or for an SRV name, which OpenSSL cannot check."""
    assert explained(62, certificate([x509.RFC822Name("a@b")]))[0] == "it is for no domain"


def test_a_certificate_of_old_names_its_subject() -> None:
    """Without a subject alternative name; browsers and we ignore the common name."""
    assert explained(62, certificate(None))[0] == f"it is for old.example.org{BY_SUBJECT}"


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        (
            [(NameOID.COUNTRY_NAME, "DE"), (NameOID.ORGANIZATION_NAME, "Example Inc.")],
            "Example Inc.",
        ),
        ([(NameOID.COUNTRY_NAME, "DE")], "C=DE"),
    ],
)
def test_a_subject_without_a_common_name_is_told_by_the_next_best(
    attributes: list[tuple[x509.ObjectIdentifier, str]], words: str
) -> None:
    subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])
    why, _ = explained(62, certificate(None, subject=subject))
    assert why == f"it is for {words}{BY_SUBJECT}"


@pytest.mark.parametrize(
    "der", [None, b"no DER", FINE.replace(b"chat.example.net", b"chat.example.n\xff\xff")]
)
def test_without_a_certificate_to_be_read_openssl_has_the_word(der: bytes | None) -> None:
    why, hint = explained(62, der)
    assert why == "OpenSSL's words"
    assert "account.ca_file" in hint
