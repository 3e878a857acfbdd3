"""TLS with the server: whose certificate is good, in words why one is not; channel binding.

Nothing is said inside TLS before the certificate is known to be good: either for the domain of
the JID, under a certificate authority that we trust, or it is the very one that the user named.
There is no third way.

A man in the middle who has got hold of a certificate that we trust still has another one than
the server: with ``tls-server-end-point`` (RFC 5929 section 4) the proof of the password covers
the certificate, so that passing it on is of no use to him.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from typing import TYPE_CHECKING

import trio
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from syncd.errors import ErrorType, OfflineError, RemoteProtocolError

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

log = logging.getLogger(__name__)

# XEP-0368: servers of several protocols on one port tell us apart by this.
ALPN = "xmpp-client"
# A message names so many of a certificate's names, and so much of each. They are a stranger's.
MAX_NAMES = 4  # names
MAX_NAME = 80  # characters

# What OpenSSL calls the reasons (x509_vfy.h); `ssl` has no names for them.
_NOT_YET_VALID = 9
_EXPIRED = 10
_SELF_SIGNED = 18
# No issuer at hand, self-signed root not trusted, issuer not trusted, first of a broken chain.
_UNKNOWN_ISSUER = frozenset({2, 19, 20, 21})
_WRONG_NAME = frozenset({62, 64})  # the latter: of an IP address

_NO_TLS = (
    "what answers there is no TLS",
    'is the port one of direct TLS? 5222 wants account.tls = "starttls"',
)
_TOO_OLD = ("it can only what is older than TLS 1.2", "update the server")
# By OpenSSL's name of the failure (ssl.h, sslerr.h), which changes with its version.
_TLS_FAILURES = {
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "PACKET_LENGTH_TOO_LONG": _NO_TLS,
    "UNSUPPORTED_PROTOCOL": _TOO_OLD,
    "TLSV1_ALERT_PROTOCOL_VERSION": _TOO_OLD,
    "UNEXPECTED_EOF_WHILE_READING": ("the server hung up", ""),
    # RFC 6066 section 3, such as by Prosody with direct TLS.
    "TLSV1_UNRECOGNIZED_NAME": (
        "it does not serve this domain",
        "are account.jid and account.server right?",
    ),
}

# What reading a certificate raises that OpenSSL minds less.
_UNREADABLE = (
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def make_context(*, ca_file: Path | None, verify: bool, direct: bool) -> ssl.SSLContext:
    """Prepare TLS; blocks on the disk.

    Args:
      ca_file: Further trust anchors, PEM.
      verify: Whether TLS itself judges the certificate; else the caller must.
      direct: TLS begins with the first byte, so ALPN tells the protocol.

    Raises:
      OfflineError: The file cannot be used.
    """
    context = ssl.create_default_context()
    # RFC 9525 section 2: the common name is no name of a server any more. Name constraints do
    # not reach it: a CA that may certify only names of its own could put any domain there.
    context.hostname_checks_common_name = False
    # RFC 9325 section 3.1.1: nothing older.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if direct:
        context.set_alpn_protocols([ALPN])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise OfflineError(
                f"account.ca_file {ca_file} cannot be used: {error}",
                hint="it must be a readable PEM file of certificates",
            ) from error
    return context


async def start_tls(
    transport: trio.abc.Stream, context: ssl.SSLContext, name: str
) -> tuple[trio.SSLStream[trio.abc.Stream], bytes]:
    """Shake hands.

    Args:
      transport: Stays the caller's to close if this fails.
      context: From `make_context`.
      name: Of the JID's domain, as A-labels or an IP address: what is asked for (SNI), and
        what the certificate must be for (RFC 6120 section 13.7.2), whatever the host.

    Returns:
      The connection inside TLS, and the server's certificate as DER.

    Raises:
      ssl.SSLCertVerificationError: The certificate is not good; see `explain`.
      OfflineError: There is no TLS with whoever is there.
    """
    tls = trio.SSLStream(transport, context, server_hostname=name, https_compatible=True)
    try:
        await tls.do_handshake()
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise cause from None
        reason = str(getattr(cause, "reason", None))  # none if it is not of OpenSSL
        why, hint = _TLS_FAILURES.get(reason, (str(cause or error), ""))
        raise OfflineError(f"TLS with the server failed: {why}", hint=hint) from error
    der = tls.getpeercert(binary_form=True)
    assert der is not None, "every suite that the default context allows has a certificate"
    return tls, der


def check_fingerprint(der: bytes, fingerprint: bytes) -> None:
    """Compare the server's certificate with the one that the user named.

    Args:
      der: As it came.
      fingerprint: SHA-256 of what it must be.

    Raises:
      RemoteProtocolError: It is another one.
    """
    seen = hashlib.sha256(der).digest()
    if seen != fingerprint:
        raise RemoteProtocolError(
            "the server's certificate is not the one in account.certificate_fingerprint: "
            f"its fingerprint is {colons(seen)}, not {colons(fingerprint)}",
            hint="somebody may be listening, or the server has a new certificate: compare "
            "with the server's administrator before you change the key",
            # Coming back would not help; a person must look.
            type=ErrorType.CANCEL,
        )


def tls_server_end_point(der: bytes) -> bytes | None:
    """Hash a certificate by the hash function of its own signature (RFC 5929 section 4.1).

    Args:
      der: The server's certificate, as it came.

    Returns:
      The hash, or None where the RFC leaves it open: a signature without a single hash
      function, such as Ed25519.
    """
    try:
        algorithm = x509.load_der_x509_certificate(der).signature_hash_algorithm
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        # OpenSSL is satisfied with certificates that break the letter of RFC 5280.
        log.info("no channel binding with the server's certificate: %s", error)
        return None
    if algorithm is None:
        return None
    # Broken as they are, these two only say which certificate; the RFC replaces them.
    if isinstance(algorithm, hashes.MD5 | hashes.SHA1):
        algorithm = hashes.SHA256()
    digest = hashes.Hash(algorithm)
    digest.update(der)
    return digest.finalize()


def explain(
    error: ssl.SSLCertVerificationError, domain: str, der: bytes | None, now: datetime
) -> RemoteProtocolError:
    """Say in words why a certificate is not good, and what to do.

    Args:
      error: OpenSSL's verdict.
      domain: For which it should have been.
      der: The certificate, if it could be had. Nobody vouches for what is in it.
      now: Aware.
    """
    try:
        why, hint = _judge(error, domain, der, now)
    except _UNREADABLE:
        why, hint = (
            error.verify_message,
            "mend it on the server, or name its CA in account.ca_file",
        )
    return RemoteProtocolError(
        f"the server's certificate is not good for {domain}: {why}", hint=hint
    )


def _judge(
    error: ssl.SSLCertVerificationError, domain: str, der: bytes | None, now: datetime
) -> tuple[str, str]:
    """Why, and what to do."""
    if der is None:
        raise ValueError("there is none")
    certificate = x509.load_der_x509_certificate(der)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    names, issuer = _names(certificate), _shown(certificate.issuer)
    today = f"is the clock of this machine right (today is {now:%Y-%m-%d})?"
    pin = (
        "or, if the server is your own, compare the fingerprint there and set "
        f'account.certificate_fingerprint = "{colons(hashlib.sha256(der).digest())}"'
    )
    code = error.verify_code
    if code == _EXPIRED and end < now:
        return f"it expired on {end:%Y-%m-%d}", f"renew it on the server; {today}"
    if code == _NOT_YET_VALID and begin > now:
        return f"it is not valid before {begin:%Y-%m-%d}", today
    if code in _WRONG_NAME:
        return f"it is for {names}", f"the server needs one for {domain}, {pin}"
    if code == _SELF_SIGNED:
        return "it is self-signed, and not known here", f"name it in account.ca_file, {pin}"
    if code in _UNKNOWN_ISSUER:
        why = f"its issuer, {issuer}, is not known here"
        return why, f"name the CA in account.ca_file, {pin}"
    # Among the rest: not this one, but one on the way to its CA has expired.
    why = f"{error.verify_message} (it is for {names}, issued by {issuer})"
    return why, f"mend it on the server, {pin}"


def colons(digest: bytes) -> str:
    """A fingerprint as people compare it."""
    return digest.hex(":").upper()


def _names(certificate: x509.Certificate) -> str:
    """For whom a certificate is, as a list in words."""
    try:
        extension = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        ).value
    except x509.ExtensionNotFound:
        # It may even be the right one.
        subject = _shown(certificate.subject)
        return f"{subject} by its subject, and for nobody by a subject alternative name"
    names = [
        *extension.get_values_for_type(x509.DNSName),
        *(str(address) for address in extension.get_values_for_type(x509.IPAddress)),
    ]
    shown = [_printable(name) for name in names[:MAX_NAMES]]
    if more := len(names) - len(shown):
        shown.append(f"{more} more")
    return ", ".join(shown) or "no domain"


def _shown(name: x509.Name) -> str:
    """The one part of a distinguished name that people know it by."""
    for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME):
        for attribute in name.get_attributes_for_oid(oid):
            return _printable(str(attribute.value))
    return _printable(name.rfc4514_string())


def _printable(text: str) -> str:
    # It goes to logs and terminals, and a stranger wrote it.
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= MAX_NAME else f"{clean[: MAX_NAME - 1]}…"
