"""`open_server`: a whole XMPP server on this machine, with a certificate made on the spot."""

from __future__ import annotations

import datetime
import secrets
import ssl
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from syncd.demo.connection import MAX_QUEUE, Connection
from syncd.demo.faults import Faults
from syncd.demo.login import DEFAULT_MECHANISMS, NOTHING_MORE, Abilities, Accounts
from syncd.demo.proxy65 import Proxy65
from syncd.demo.routing import Router
from syncd.demo.stream import MAX_STANZA
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from syncd.demo.presence import Sessions
    from syncd.xmpp.stanza import Iq

# Connections that have not logged in are anybody's; each holds a few KiB.
MAX_HALF_OPEN = 128
# Each may queue up to its limit; the tests need a few dozen.
MAX_CONNECTIONS = 1_024
# How long the clients together may take to read that we stop.
SHUTDOWN_TIMEOUT = 0.5  # seconds
# Stanzas that wait for their delay to pass; what is more is lost.
MAX_LATER = 10_000

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

    @property
    def end_point(self) -> bytes:
        """Its hash, by the hash function that it is signed with (RFC 5929 section 4.1)."""
        certificate = x509.load_pem_x509_certificate(self.certificate_pem)
        algorithm = certificate.signature_hash_algorithm
        assert algorithm is not None, "the authority here signs with ECDSA"
        return certificate.fingerprint(algorithm)

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


class Server:
    """The running server; `open_server` makes it.

    Attributes:
      domain: Its name.
      port: Where clients connect.
      proxy: The bytestreams proxy; None if there is none.
      ca_pem: The certificate authority that clients must trust.
      faults: What it does wrong; to be changed at will.
      sessions: Who is connected.
    """

    def __init__(
        self,
        *,
        domain: str,
        port: int,
        proxy: Proxy65 | None,
        ca_pem: bytes,
        faults: Faults,
        sessions: Sessions,
    ) -> None:
        self.domain = domain
        self.port = port
        self.proxy = proxy
        self.ca_pem = ca_pem
        self.faults = faults
        self.sessions = sessions
        self._changes = trio.Event()

    def cut(self, jid: JID | str) -> None:
        """Cut the connection of a full JID, or all of a bare JID's, by TCP RST."""
        for session in self.sessions.matching(_jid(jid)):
            session.cut()

    def end(self, jid: JID | str, condition: str = "") -> None:
        """Close the stream of a full JID, or all of a bare JID's, by the book.

        Args:
          jid: Whose.
          condition: The stream error to send first, such as ``system-shutdown``
            (RFC 6120 section 4.9.3); an empty string: none.
        """
        for session in self.sessions.matching(_jid(jid)):
            session.end(condition)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true about who is connected, and what presence it has."""
        while not condition():
            await self._changes.wait()

    def changed(self) -> None:
        """Let who waits in `until` look again."""
        self._changes.set()
        self._changes = trio.Event()


@asynccontextmanager
async def open_server(
    *,
    domain: str = "demo.example",
    accounts: Mapping[str, str],
    rosters: Mapping[str, Mapping[str, str]] | None = None,
    faults: Faults | None = None,
    certificate: Certificate | None = None,
    mechanisms: tuple[str, ...] = DEFAULT_MECHANISMS,
    abilities: Abilities = NOTHING_MORE,
    host: str = "127.0.0.1",
    port: int = 0,
    proxy: bool = True,
    direct_tls: bool = False,
    max_stanza: int = MAX_STANZA,
    max_queue: int = MAX_QUEUE,
) -> AsyncIterator[Server]:
    """Run a server as long as the context lasts; then clients are told, and cut off.

    Args:
      domain: Its name; the certificate is for it, and the proxy is ``proxy.`` + it.
      accounts: Passwords by localpart.
      rosters: By localpart, then contact (localpart): both, to, from or none. None:
        everybody sees everybody.
      faults: What it does wrong, to begin with.
      certificate: Use this one; None: make one.
      mechanisms: SASL mechanisms to offer, in this order; PLAIN is possible.
      abilities: What it can beside RFC 6120.
      host: IP address to listen on, also the proxy's.
      port: TCP port for clients; 0: any free one.
      proxy: Have a SOCKS5 bytestreams proxy, on any free port.
      direct_tls: Clients begin with TLS (XEP-0368) instead of STARTTLS.
      max_stanza: Limit, bytes.
      max_queue: What may wait for a client that does not read, before it is dropped, bytes.

    Raises:
      OSError: The port is taken.
    """
    faults = faults if faults is not None else Faults()
    if rosters is None:
        rosters = {
            name: {other: "both" for other in accounts if other != name} for name in accounts
        }
    if certificate is None:
        certificate = make_certificate(domain, _now())
    async with trio.open_nursery() as nursery:
        proxy65 = Proxy65(JID("", f"proxy.{domain}"), host, faults) if proxy else None
        router = Router(
            domain,
            {name: rosters.get(name, {}) for name in accounts},
            components={proxy65.jid: proxy65.answer} if proxy65 is not None else {},
            inspect_offer=proxy65.inspect_offer if proxy65 is not None else _uninspected,
            faults=faults,
            later=_Timer(nursery).later,
            token=_token,
            changed=lambda: server.changed(),
        )
        door = _Door(
            partial(
                Connection,
                context=certificate.server_context(),
                accounts=Accounts(
                    domain,
                    accounts,
                    token=secrets.token_bytes,
                    mechanisms=mechanisms,
                    refusal=lambda: faults.refuse_login,
                    abilities=abilities,
                    end_point=certificate.end_point,
                    now=lambda: _now() + datetime.timedelta(seconds=faults.clock_ahead),
                ),
                router=router,
                faults=faults,
                token=_token,
                direct_tls=direct_tls,
                max_stanza=max_stanza,
                max_queue=max_queue,
            )
        )
        if proxy65 is not None:
            proxy65.port = await _listen(nursery, proxy65.serve, host, 0)
        server = Server(
            domain=domain,
            port=await _listen(nursery, door.serve, host, port),
            proxy=proxy65,
            ca_pem=certificate.ca_pem,
            faults=faults,
            sessions=router.sessions,
        )
        yield server
        for session in server.sessions:
            session.end("system-shutdown")
        with trio.move_on_after(SHUTDOWN_TIMEOUT):
            await door.until_empty()
        nursery.cancel_scope.cancel()


class _Door:
    """Lets connections in, as many as there is room for."""

    def __init__(self, make_connection: Callable[[trio.SocketStream], Connection]) -> None:
        self._make_connection = make_connection
        self._inside: set[Connection] = set()
        self._left = trio.Event()

    async def serve(self, transport: trio.SocketStream) -> None:
        half_open = sum(not connection.bound for connection in self._inside)
        if len(self._inside) >= MAX_CONNECTIONS or half_open >= MAX_HALF_OPEN:
            await transport.aclose()
            return
        connection = self._make_connection(transport)
        self._inside.add(connection)
        try:
            await connection.run()
        finally:
            self._inside.remove(connection)
            self._left.set()

    async def until_empty(self) -> None:
        while self._inside:
            self._left = trio.Event()
            await self._left.wait()


class _Timer:
    """Calls things later, a bounded number at a time."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._waiting = 0

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        if self._waiting < MAX_LATER:
            self._waiting += 1
            self._nursery.start_soon(self._wait, seconds, call)

    async def _wait(self, seconds: float, call: Callable[[], None]) -> None:
        await trio.sleep(seconds)
        self._waiting -= 1
        call()


async def _listen(
    nursery: trio.Nursery,
    serve: Callable[[trio.SocketStream], Awaitable[None]],
    host: str,
    port: int,
) -> int:
    """Listen, serve each connection in a task of its own, and tell the port."""
    listeners = await trio.open_tcp_listeners(port, host=host)
    nursery.start_soon(partial(trio.serve_listeners, serve, listeners, handler_nursery=nursery))
    bound: int = listeners[0].socket.getsockname()[1]
    return bound


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _token() -> str:
    return secrets.token_hex(16)


def _jid(jid: JID | str) -> JID:
    return JID.parse(jid) if isinstance(jid, str) else jid


def _uninspected(_: Iq, __: JID, ___: JID) -> None:
    """Without a proxy nobody cares for offers."""


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
