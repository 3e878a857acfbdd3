"""From an account to a bound stream: TCP, TLS with the right certificate, login."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import trio

from syncd.errors import (
    AuthenticationError,
    ErrorType,
    OfflineError,
    StreamError,
    SyncdError,
    XMPPError,
)
from syncd.link import resolve, tls
from syncd.link.resolve import Target, TLSMode
from syncd.xmpp.login import Credentials
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
    from pathlib import Path

    from syncd.xmpp.jid import JID
    from syncd.xmpp.sasl import Token
    from syncd.xmpp.sm import StreamManagement

log = logging.getLogger(__name__)

# Of one server, from SYN to bound. One under load takes a second; a dead one must not hold us
# up.
CONNECT_TIMEOUT = 30.0  # seconds
# Of that, TCP alone: Linux sends a lost SYN again after 1, 3 and 7 seconds. Behind a firewall
# that drops, there may be another server.
REACH_TIMEOUT = 10.0  # seconds
# To see a certificate that was no good, only to tell what is wrong with it.
LOOK_TIMEOUT = 10.0  # seconds
# One read; a server's burst of presences fits.
MAX_RECV = 65_536  # bytes

# RFC 6120 section 4.9.3: what is true of this server, and need not be of the next. The rest is
# about us (such as conflict or policy-violation), or for the caller (see-other-host).
ELSEWHERE = frozenset(
    {
        "connection-timeout",
        "host-gone",
        "host-unknown",
        "internal-server-error",
        "remote-connection-failed",
        "reset",
        "resource-constraint",
        "system-shutdown",
        "undefined-condition",
    }
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where a token is kept from one login to the next (XEP-0484); both block on the disk.

    Attributes:
      read: Gives the one that is kept, if any.
      write: Keeps another one instead; None: none.
    """

    read: Callable[[], Token | None]
    write: Callable[[Token | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whom to log in as, and where.

    Attributes:
      jid: The resource, if any, is asked for.
      password: Read anew for each login, so that a changed one is found.
      server: Host and port, or None: what the DNS says of the JID's domain.
      tls: How TLS begins; "auto" is what the DNS says, and with `server` direct on port 5223
        and STARTTLS elsewhere.
      ca_file: Further trust anchors, PEM.
      fingerprint: SHA-256 of the one certificate to trust, whatever it says; None: any for
        the JID's domain under a CA that we trust.
      allow_plain: SASL PLAIN may be used inside TLS.
      agent: A UUID that stays ours (XEP-0388); empty: the resource of `jid` is asked for.
      keep_agent: Keeps another one instead, if that one is somebody else's too; blocks on the
        disk.
      least: The strongest SASL mechanism used with this server before.
      sasl2: Whether SASL2 was.
      tokens: Where a token is kept; None: none is asked for.
    """

    jid: JID
    password: Callable[[], str]
    server: tuple[str, int] | None = None
    tls: TLSMode = "auto"
    ca_file: Path | None = None
    fingerprint: bytes | None = None
    allow_plain: bool = False
    least: str = ""
    agent: str = ""
    keep_agent: Callable[[str], None] = lambda agent: None
    sasl2: bool = False
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Connection:
    """A bound stream and what carries it.

    Attributes:
      transport: To be closed by whoever got this.
      stream: In state OPEN.
      early: What came in the same read as the end of the login.
      target: Where the server is; None if that was never looked for.
    """

    transport: trio.abc.Stream
    stream: ClientStream
    early: list[Event]
    target: Target | None = None


Find = Callable[[str, TLSMode], Awaitable[list[Target]]]
"""Finds the servers of a domain, as `resolve.find_server` does."""


async def connect(
    account: Account,
    resume: StreamManagement | None = None,
    *,
    find: Find = resolve.find_server,
) -> Connection:
    """Connect, start TLS, log in, and bind or resume.

    The servers of the domain are tried in their order, until one lets us in. One that does not
    take our credentials is the last: the next would only hear them, too.

    Args:
      account: Whom to log in as, and where.
      resume: Of a session whose connection broke. If the server has forgotten it, a new one
        is bound instead.
      find: Where the servers are, if the account does not say.

    Returns:
      The open connection; the caller closes its transport.

    Raises:
      OfflineError: No server can be reached, or they took too long.
      AuthenticationError: One does not take our credentials.
      RemoteProtocolError, StreamError: The only one has no good certificate, broke the
        protocol, or ended the stream.
    """
    password = await trio.to_thread.run_sync(account.password)
    token = await _read_token(account)
    targets = await _find_targets(account, find)
    contexts = {
        direct: await _make_context(account, direct=direct)
        for direct in {target.direct for target in targets}
    }
    failures: list[XMPPError] = []
    for target in targets:
        login = _Login(account, password, token, resume, target, contexts[target.direct])
        try:
            return await login.run()
        except XMPPError as error:
            if _is_final(error):
                raise
            failures.append(error)
            if len(targets) > 1:
                level = logging.INFO if isinstance(error, OfflineError) else logging.WARNING
                log.log(level, "not online by %s: %s", target, error)
    if len(failures) == 1:
        raise failures[0]
    # What needs a person comes before what may pass.
    hints = sorted(failures, key=lambda error: isinstance(error, OfflineError))
    raise OfflineError(
        f"none of the servers of {account.jid.domain} let us in: "
        + "; ".join(map(_told, targets, failures)),
        hint=next((error.hint for error in hints if error.hint), ""),
    ) from ExceptionGroup("all servers failed", failures)


async def _find_targets(account: Account, find: Find) -> list[Target]:
    if account.server is None:
        return await find(account.jid.domain, account.tls)
    host, port = account.server
    direct = account.tls == "direct" or (
        account.tls == "auto" and port == resolve.DIRECT_TLS_PORT
    )
    return [Target(host, port, direct)]


async def _read_token(account: Account) -> Token | None:
    if account.tokens is None:
        return None
    token = await trio.to_thread.run_sync(account.tokens.read)
    return token if token is not None and token.expires > datetime.now(UTC) else None


async def _make_context(account: Account, *, direct: bool) -> ssl.SSLContext:
    # In a thread: reading all the CAs of the system takes some 30 ms.
    return await trio.to_thread.run_sync(
        lambda: tls.make_context(
            ca_file=account.ca_file, verify=account.fingerprint is None, direct=direct
        )
    )


def _is_final(error: XMPPError) -> bool:
    """Whether the next server must not be tried."""
    match error:
        case AuthenticationError():
            return True
        case StreamError():
            return error.condition not in ELSEWHERE
        case _:
            return error.type is not ErrorType.WAIT


def _told(target: Target, error: XMPPError) -> str:
    # Some sentences name the server already.
    return str(error) if str(target) in str(error) else f"{target}: {error}"


@dataclass(frozen=True, slots=True)
class _Login:
    """One attempt at one server."""

    account: Account
    password: str = field(repr=False)
    token: Token | None
    resume: StreamManagement | None
    target: Target
    context: ssl.SSLContext

    async def run(self) -> Connection:
        """See `connect`."""
        try:
            with trio.move_on_after(CONNECT_TIMEOUT):
                return await self._connect()
        except ssl.SSLCertVerificationError as error:
            seen = await self._see_certificate()
            domain, now = self.account.jid.domain, datetime.now(UTC)
            raise tls.explain(error, domain, seen, now) from error
        raise OfflineError(
            f"the server {self.target} did not let us in within {CONNECT_TIMEOUT:.0f} s"
        )

    async def _connect(self) -> Connection:
        transport: trio.abc.Stream = await _open_tcp(self.target)
        try:
            end_point = None
            if self.target.direct:
                transport, end_point = await self._start_tls(transport)
            stream = self._new_stream(end_point)
            if not self.target.direct:
                await _reach_tls(transport, stream)
                transport, end_point = await self._start_tls(transport)
                stream.tls_started(end_point)
            return await self._log_in(transport, stream)
        except BaseException:
            await trio.aclose_forcefully(transport)
            raise

    def _new_stream(self, end_point: bytes | None) -> ClientStream:
        account = self.account
        return ClientStream(
            account.jid,
            Credentials(
                password=self.password,
                nonce=secrets.token_urlsafe(24),
                allow_plain=account.allow_plain,
                least=account.least,
                agent=account.agent,
                sasl2=account.sasl2,
                keeps_token=account.tokens is not None,
                token=self.token,
            ),
            secure=self.target.direct,
            end_point=end_point,
            resume=self.resume,
        )

    async def _start_tls(
        self, transport: trio.abc.Stream
    ) -> tuple[trio.abc.Stream, bytes | None]:
        """Start TLS with the right server, and give what binds the login to it."""
        # By dNSName (or address) alone, and so not by the common name (`tls.make_context`). RFC
        # 6120 section 13.7.1.2 knows SRV-IDs and xmppAddr as well, but OpenSSL does not match
        # them, and its name constraints do not reach them: a CA that may certify only names of
        # its own could then certify any domain's XMPP. No public CA issues them (CA/Browser
        # Forum, Baseline Requirements 7.1.2.7.12).
        name = resolve.to_ascii(self.account.jid.domain)
        secured, der = await tls.start_tls(transport, self.context, name)
        if self.account.fingerprint is not None:
            tls.check_fingerprint(der, self.account.fingerprint)
        return secured, tls.tls_server_end_point(der)

    async def _log_in(self, transport: trio.abc.Stream, stream: ClientStream) -> Connection:
        """Drive the stream, inside TLS, until it is bound."""
        while True:
            await write(transport, stream)
            events = stream.receive_data(await read(transport))
            for number, event in enumerate(events, 1):
                match event:
                    case KeyWanted(key):
                        # Up to a second of hashing at the most iterations that we take.
                        stream.key_derived(
                            await trio.to_thread.run_sync(key.derive, self.password)
                        )
                    case Bound() | Resumed():
                        await self._keep_token(stream)
                        return Connection(transport, stream, events[number:], self.target)
                    case StreamEnded(error):
                        await self._keep_token(stream)
                        await _say_goodbye(transport, stream)
                        raise error or OfflineError("the server closed the stream")
                    case TLSWanted() | StanzaReceived():  # pragma: no cover
                        raise AssertionError("TLS is on, and no stanza comes before the bind")

    async def _keep_token(self, stream: ClientStream) -> None:
        """Keep what the login has left us: the same token, a new one, or none."""
        if self.account.tokens is not None and stream.token != self.token:
            await trio.to_thread.run_sync(self.account.tokens.write, stream.token)

    async def _see_certificate(self) -> bytes | None:
        """Shake hands once more, trusting nobody and saying nothing, to see the certificate.

        OpenSSL does not show the one that it has refused.
        """
        name = resolve.to_ascii(self.account.jid.domain)
        context = await trio.to_thread.run_sync(
            lambda: tls.make_context(ca_file=None, verify=False, direct=self.target.direct)
        )
        with trio.move_on_after(LOOK_TIMEOUT), suppress(SyncdError):
            transport = await _open_tcp(self.target)
            try:
                if not self.target.direct:
                    await _reach_tls(transport, self._new_stream(None))
                _, der = await tls.start_tls(transport, context, name)
                return der
            finally:
                await trio.aclose_forcefully(transport)
        return None


async def _open_tcp(target: Target) -> trio.SocketStream:
    hint = "is the server running, and account.server right?"
    try:
        with trio.fail_after(REACH_TIMEOUT):
            stream = await trio.open_tcp_stream(target.host, target.port)
    except trio.TooSlowError as error:
        raise OfflineError(
            f"no connection to the server {target} within {REACH_TIMEOUT:.0f} s", hint=hint
        ) from error
    except socket.gaierror as error:
        raise OfflineError(
            f"no connection to the server {target}: {_reasons(error)}",
            hint="does the DNS work here, and is account.jid (or account.server) right?",
        ) from error
    except (OSError, UnicodeError) as error:  # the latter: no name that DNS could carry
        raise OfflineError(
            f"no connection to the server {target}: {_reasons(error)}", hint=hint
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


async def _reach_tls(transport: trio.abc.Stream, stream: ClientStream) -> None:
    """Drive the stream to where TLS begins (STARTTLS)."""
    while True:
        await write(transport, stream)
        for event in stream.receive_data(await read(transport)):
            match event:
                case TLSWanted():
                    return
                case StreamEnded(OfflineError() as error):
                    raise OfflineError(
                        "the server hung up before TLS began",
                        hint='is the port one of STARTTLS? 5223 wants account.tls = "direct"',
                    ) from error
                case StreamEnded(error):
                    await _say_goodbye(transport, stream)
                    raise error or OfflineError("the server closed the stream")
                case _:  # pragma: no cover
                    raise AssertionError("nothing else comes before TLS")


async def _say_goodbye(transport: trio.abc.Stream, stream: ClientStream) -> None:
    try:
        await write(transport, stream)
    except SyncdError:
        return  # it is gone already, and the caller knows why


def own_host(transport: trio.abc.Stream) -> str:
    """From which address of ours a connection was made; empty: from none."""
    if isinstance(transport, trio.SSLStream):
        transport = transport.transport_stream
    if not isinstance(transport, trio.SocketStream):
        return ""
    return str(transport.socket.getsockname()[0])


async def write(
    transport: trio.abc.Stream, stream: ClientStream, most: int | None = None
) -> None:
    """Write what the stream has queued.

    Args:
      transport: Where to.
      stream: What is written.
      most: How much of it, about, bytes; None: all.

    Raises:
      OfflineError: The connection is broken.
    """
    if data := stream.data_to_send(most):
        try:
            await transport.send_all(data)
        except trio.BrokenResourceError as error:
            raise OfflineError(f"the connection to the server broke: {_why(error)}") from error


async def read(transport: trio.abc.Stream) -> bytes:
    """Read what has arrived; ``b""`` when the other end has hung up, however rudely."""
    try:
        data = bytes(await transport.receive_some(MAX_RECV))
    except trio.BrokenResourceError:
        return b""
    _acknowledge(transport)
    return data


def _acknowledge(transport: trio.abc.Stream) -> None:
    """Have the kernel acknowledge at once what was read.

    COMPAT(prosody): it writes a stanza and its ``<r/>`` apart, and Nagle's algorithm keeps the
    second back until the first is acknowledged. Waiting for more to say, as kernels do, cost
    10 ms for each answer, and each in-band block.
    """
    while isinstance(transport, trio.SSLStream):
        transport = transport.transport_stream
    if isinstance(transport, trio.SocketStream):
        # Linux forgets it with the next read; other systems do not have it.
        with suppress(OSError, AttributeError, trio.ClosedResourceError):
            transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _why(error: BaseException) -> str:
    cause = error.__cause__
    return (getattr(cause, "strerror", None) or str(cause)) if cause else str(error)
