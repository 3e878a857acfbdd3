"""From an account to a bound stream: TCP, TLS with the right certificate, login."""

from __future__ import annotations

import os
import secrets
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import trio

from syncd.errors import OfflineError, RemoteProtocolError, SyncdError
from syncd.xmpp.stream import (
    Bound,
    ClientStream,
    Event,
    KeyWanted,
    Resumed,
    StanzaReceived,
    StreamEnded,
    TLSWanted,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from syncd.xmpp.jid import JID
    from syncd.xmpp.sm import StreamManagement

# From SYN to bound. A server under load takes a second; a dead one must not hold us up.
CONNECT_TIMEOUT = 30.0  # seconds
# One read; a server's burst of presences fits.
MAX_RECV = 65_536  # bytes
# RFC 6120 section 3.2.2: when nothing else is known.
DEFAULT_PORT = 5222
# XEP-0368: by convention the port of direct TLS.
DIRECT_TLS_PORT = 5223


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whom to log in as, and where.

    Attributes:
      jid: The resource, if any, is asked for.
      password: Read anew for each login, so that a changed one is found.
      server: Host and port, or None: the JID's domain.
      tls: How TLS begins; "auto" is direct on port 5223, STARTTLS elsewhere.
      ca_file: One more trust anchor.
      allow_plain: SASL PLAIN may be used inside TLS.
    """

    jid: JID
    password: Callable[[], str]
    server: tuple[str, int] | None = None
    tls: Literal["starttls", "direct", "auto"] = "auto"
    ca_file: Path | None = None
    allow_plain: bool = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the server."""
        return self.server or (_unbracketed(self.jid.domain), DEFAULT_PORT)

    @property
    def direct(self) -> bool:
        """Whether TLS begins with the first byte."""
        return self.tls == "direct" or (
            self.tls == "auto" and self.address[1] == DIRECT_TLS_PORT
        )


@dataclass(frozen=True, slots=True)
class Connection:
    """A bound stream and what carries it.

    Attributes:
      transport: To be closed by whoever got this.
      stream: In state OPEN.
      early: What came in the same read as the end of the login.
    """

    transport: trio.abc.Stream
    stream: ClientStream
    early: list[Event]


def _unbracketed(domain: str) -> str:
    """An IPv6 literal of a JID, as sockets want it."""
    return domain.removeprefix("[").removesuffix("]")


async def connect(account: Account, resume: StreamManagement | None = None) -> Connection:
    """Connect, start TLS, log in, and bind or resume.

    Args:
      account: Whom to log in as, and where.
      resume: Of a session whose connection broke. If the server has forgotten it, a new one
        is bound instead.

    Returns:
      The open connection; the caller closes its transport.

    Raises:
      OfflineError: The server cannot be reached, or took too long.
      AuthenticationError: It does not take our credentials.
      RemoteProtocolError, StreamError: It broke the protocol, or ended the stream.
    """
    host, port = account.address
    password = await trio.to_thread.run_sync(account.password)
    context = _tls_context(account.ca_file)
    with trio.move_on_after(CONNECT_TIMEOUT):
        transport: trio.abc.Stream = await _open_tcp(host, port)
        try:
            if account.direct:
                transport = await _start_tls(transport, context, account.jid.domain)
            stream = ClientStream(
                account.jid,
                password,
                nonce=secrets.token_urlsafe(24),
                secure=account.direct,
                allow_plain=account.allow_plain,
                resume=resume,
            )
            return await _negotiate(transport, stream, context, password)
        except BaseException:
            await trio.aclose_forcefully(transport)
            raise
    raise OfflineError(
        f"the server {host}:{port} did not let us in within {CONNECT_TIMEOUT:.0f} s"
    )


async def _open_tcp(host: str, port: int) -> trio.SocketStream:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except (OSError, UnicodeError) as error:  # the latter: no name that DNS could carry
        raise OfflineError(
            f"no connection to the server {host}:{port}: {_reasons(error)}",
            hint="is the server running, and account.server right?",
        ) from error
    # A stanza is small and somebody waits for it. Half-open links end with the keep-alive
    # of the session; the kernel's own is for when we are not reading.
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return stream


def _reasons(error: Exception) -> str:
    # Trio says only that all attempts failed; why is in its cause, one error an address.
    group = error.__cause__
    tried = group.exceptions if isinstance(group, ExceptionGroup) else (error,)
    return ", ".join(sorted({_reason(each) for each in tried}))


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # trio's own words name the address again
    return getattr(error, "strerror", None) or str(error)


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise OfflineError(
                f"account.ca_file {ca_file} cannot be used: {error}",
                hint="it must be a readable PEM file of certificates",
            ) from error
    return context


async def _start_tls(
    transport: trio.abc.Stream, context: ssl.SSLContext, domain: str
) -> trio.abc.Stream:
    # RFC 6120 section 13.7.2: the certificate is for the JID's domain, whatever host we
    # had to connect to.
    tls = trio.SSLStream(
        transport, context, server_hostname=_unbracketed(domain), https_compatible=True
    )
    try:
        await tls.do_handshake()
    except trio.BrokenResourceError as error:
        cause = error.__cause__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise RemoteProtocolError(
                f"the server's certificate is not good for {domain}: {cause.verify_message}",
                hint="mend the certificate on the server, or name its CA in account.ca_file",
            ) from error
        raise OfflineError(f"TLS with the server failed: {cause or error}") from error
    return tls


async def _negotiate(
    transport: trio.abc.Stream, stream: ClientStream, context: ssl.SSLContext, password: str
) -> Connection:
    """Drive the stream until it is bound."""
    while True:
        await write(transport, stream)
        events = stream.receive_data(await read(transport))
        for number, event in enumerate(events, 1):
            match event:
                case TLSWanted():
                    transport = await _start_tls(transport, context, stream.jid.domain)
                    stream.tls_started()
                case KeyWanted(key):
                    # Up to a second of hashing at the most iterations that we take.
                    stream.key_derived(await trio.to_thread.run_sync(key.derive, password))
                case Bound() | Resumed():
                    return Connection(transport, stream, events[number:])
                case StreamEnded(error):
                    await _say_goodbye(transport, stream)
                    raise error or OfflineError("the server closed the stream")
                case StanzaReceived():  # pragma: no cover
                    raise AssertionError("the stream takes no stanza before the bind")


async def _say_goodbye(transport: trio.abc.Stream, stream: ClientStream) -> None:
    try:
        await write(transport, stream)
    except SyncdError:
        return  # it is gone already, and the caller knows why


async def write(transport: trio.abc.Stream, stream: ClientStream) -> None:
    """Write what the stream has queued.

    Raises:
      OfflineError: The connection is broken.
    """
    if data := stream.data_to_send():
        try:
            await transport.send_all(data)
        except trio.BrokenResourceError as error:
            raise OfflineError(f"the connection to the server broke: {_why(error)}") from error


async def read(transport: trio.abc.Stream) -> bytes:
    """Read what has arrived; ``b""`` when the other end has hung up, however rudely."""
    try:
        return bytes(await transport.receive_some(MAX_RECV))
    except trio.BrokenResourceError:
        return b""


def _why(error: BaseException) -> str:
    cause = error.__cause__
    return (getattr(cause, "strerror", None) or str(cause)) if cause else str(error)
