"""Over loopback TCP, against a scripted server with real TLS."""

from __future__ import annotations

import functools
import hashlib
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme
from trio.testing import memory_stream_pair

from syncd.errors import (
    AuthenticationError,
    ErrorType,
    OfflineError,
    RemoteProtocolError,
    StreamError,
    SyncdError,
)
from syncd.link import connect, resolve
from syncd.link.connect import Account
from syncd.link.resolve import Target, TLSMode
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import make_presence
from syncd.xmpp.stream import State
from tests.support.dns_server import name_server
from tests.support.tcp import connection
from tests.support.wire import (
    C_FOOTER,
    LAPTOP,
    PASSWORD,
    S_BIND_FEATURES,
    S_BOUND,
    S_HEADER,
    S_PROCEED,
    S_STARTTLS_FEATURES,
    USER,
    ClientGoneError,
    Server,
    features,
    mechanisms,
    open_stream,
    told,
)

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

Script = Callable[[Server], Awaitable[None]]

YESTERDAY = datetime.now(UTC) - timedelta(days=1)

BINDING_FEATURES = features(
    mechanisms("SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"),
    "<sasl-channel-binding xmlns='urn:xmpp:sasl-cb:0'>"
    "<channel-binding type='tls-server-end-point'/></sasl-channel-binding>",
)


@dataclass
class TLS:
    """A CA, and what is needed to trust it and to serve under it."""

    authority: trustme.CA = field(default_factory=trustme.CA)

    def context(self, *names: str, not_after: datetime | None = None) -> ssl.SSLContext:
        """A server's context with a certificate for these names."""
        return self.server(*names, not_after=not_after)[0]

    def server(
        self, *names: str, not_after: datetime | None = None
    ) -> tuple[ssl.SSLContext, bytes]:
        """A server's context with a certificate for these names, and that as DER."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        leaf = self.authority.issue_cert(*names, not_after=not_after)
        leaf.configure_cert(context)
        return context, ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


@pytest.fixture(scope="module")
def tls() -> TLS:
    return TLS()


@pytest.fixture(scope="module")
def ca_file(tls: TLS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    tls.authority.cert_pem.write_to_path(str(path))
    return path


@asynccontextmanager
async def serving(*scripts: Script) -> AsyncIterator[int]:
    """Play a script to each connection that comes, one after the other; give the port.

    At the end every script must be over: what it expects of the client has happened.
    """
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve() -> None:
        async with listener:
            for script in scripts:
                async with await listener.accept() as stream:
                    await script(Server(stream))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield listener.socket.getsockname()[1]


def account(
    port: int,
    *,
    ca_file: Path | None = None,
    tls: TLSMode = "auto",
    password: str = PASSWORD,
    allow_plain: bool = False,
    fingerprint: bytes | None = None,
) -> Account:
    """The user's account at a server on this machine."""
    return Account(
        jid=LAPTOP,
        password=lambda: password,
        server=("127.0.0.1", port),
        tls=tls,
        ca_file=ca_file,
        allow_plain=allow_plain,
        fingerprint=fingerprint,
    )


async def to_tls(server: Server, context: ssl.SSLContext) -> None:
    """The server's side up to the handshake, which may fail."""
    await server.header()
    await server.send(S_HEADER + S_STARTTLS_FEATURES)
    await server.stanza()
    await server.send(S_PROCEED)
    await server.start_tls(context)


def stream_error(condition: str) -> str:
    """How the server ends a stream."""
    return (
        f"<stream:error><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>"
        "</stream:error></stream:stream>"
    )


async def failure(given: Account) -> SyncdError:
    """Why the connection does not come about."""
    with pytest.raises(SyncdError) as caught:
        await connect.connect(given)
    return caught.value


async def test_from_an_account_to_a_bound_stream(tls: TLS, ca_file: Path) -> None:
    """The certificate is for the JID's domain, though we connect to 127.0.0.1."""

    async def script(server: Server) -> None:
        await to_tls(server, tls.context("example.org"))
        await server.let_in()
        presence = await server.stanza()
        assert presence.tag == "{jabber:client}presence"

    async with serving(script) as port:
        connection = await connect.connect(account(port, ca_file=ca_file))
        async with connection.transport:
            assert connection.stream.state is State.OPEN
            assert connection.stream.jid == LAPTOP
            assert connection.early == []
            assert connection.target == at(port)
            connection.stream.send(make_presence())
            await connect.write(connection.transport, connection.stream)


async def test_what_comes_in_the_same_breath_as_the_bind_is_not_lost(
    tls: TLS, ca_file: Path
) -> None:
    async def script(server: Server) -> None:
        await to_tls(server, tls.context("example.org"))
        await server.let_in(behind="<presence/><message/></stream:stream>")

    async with serving(script) as port:
        connection = await connect.connect(account(port, ca_file=ca_file))
        await connection.transport.aclose()
    assert told(connection.early) == ["<presence/>", "<message/>", "ended in peace"]


async def test_direct_tls_begins_with_the_first_byte(tls: TLS, ca_file: Path) -> None:
    """XEP-0368."""

    async def script(server: Server) -> None:
        await server.start_tls(tls.context("example.org"))
        await server.let_in()

    async with serving(script) as port:
        connection = await connect.connect(account(port, ca_file=ca_file, tls="direct"))
        await connection.transport.aclose()
    assert connection.stream.is_open


@pytest.mark.parametrize(
    ("names", "not_after", "trusted", "reason"),
    [
        (["evil.org"], None, True, "it is for evil.org"),
        (["127.0.0.1", "localhost"], None, True, "it is for localhost, 127.0.0.1"),
        (["xmpp.example.org"], None, True, "it is for xmpp.example.org"),
        (["example.org"], YESTERDAY, True, f"it expired on {YESTERDAY:%Y-%m-%d}"),
        (["example.org"], None, False, "its issuer, .*, is not known here"),
    ],
)
@pytest.mark.parametrize("direct", [False, True])
async def test_behind_a_wrong_certificate_no_credential_is_sent(
    tls: TLS,
    ca_file: Path,
    names: list[str],
    not_after: datetime | None,
    trusted: bool,
    reason: str,
    direct: bool,
) -> None:
    """It comes twice: the second time only to see the certificate, and says nothing."""
    heard = bytearray()
    context = tls.context(*names, not_after=not_after)

    async def refused(server: Server) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await (server.start_tls if direct else lambda c: to_tls(server, c))(context)
        heard.extend(server.heard)

    async def seen(server: Server) -> None:
        await (server.start_tls if direct else lambda c: to_tls(server, c))(context)
        assert await server.transport.receive_some(1) == b""
        heard.extend(server.heard)

    async with serving(refused, seen) as port:
        given = account(
            port, ca_file=ca_file if trusted else None, tls="direct" if direct else "starttls"
        )
        with pytest.raises(RemoteProtocolError, match=reason) as caught:
            await connect.connect(given)
    assert "certificate is not good for example.org" in str(caught.value)
    assert caught.value.hint
    assert b"auth" not in heard
    assert b"user" not in heard


async def hang_up(_: Server) -> None:
    """Close the connection at once."""


@pytest.mark.parametrize("second_time", [None, hang_up])
@pytest.mark.parametrize("direct", [False, True])
async def test_a_certificate_that_cannot_be_seen_again_is_told_in_openssls_words(
    tls: TLS, ca_file: Path, direct: bool, second_time: Script | None
) -> None:
    context = tls.context("evil.org")

    async def refused(server: Server) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await (server.start_tls if direct else lambda c: to_tls(server, c))(context)

    scripts = [refused] if second_time is None else [refused, second_time]
    async with serving(*scripts) as port:
        error = await failure(
            account(port, ca_file=ca_file, tls="direct" if direct else "starttls")
        )
    assert "certificate is not good for example.org: Hostname mismatch" in str(error)


async def test_a_server_that_shows_its_certificate_only_once_does_not_hold_us_up(
    tls: TLS, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "LOOK_TIMEOUT", 0.05)

    async def refused(server: Server) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await server.start_tls(tls.context("evil.org"))

    async def silent(server: Server) -> None:
        while await server.transport.receive_some(4_096):
            pass  # until it is given up

    async with serving(refused, silent) as port:
        error = await failure(account(port, ca_file=ca_file, tls="direct"))
    assert "Hostname mismatch" in str(error)


# --- The pin


@pytest.mark.parametrize("direct", [False, True])
async def test_the_named_certificate_is_trusted_whatever_it_says(
    tls: TLS, direct: bool
) -> None:
    """An unknown CA, another name, and out of date."""
    context, der = tls.server("evil.org", not_after=YESTERDAY)

    async def script(server: Server) -> None:
        await (server.start_tls if direct else lambda c: to_tls(server, c))(context)
        await server.let_in()

    async with serving(script) as port:
        given = account(
            port,
            tls="direct" if direct else "starttls",
            fingerprint=hashlib.sha256(der).digest(),
        )
        connection = await connect.connect(given)
        await connection.transport.aclose()
    assert connection.stream.is_open


@pytest.mark.parametrize("direct", [False, True])
async def test_another_certificate_than_the_named_one_is_refused_though_all_else_is_right(
    tls: TLS, ca_file: Path, direct: bool
) -> None:
    context, der = tls.server("example.org")

    async def script(server: Server) -> None:
        await (server.start_tls if direct else lambda c: to_tls(server, c))(context)
        assert await server.transport.receive_some(1) == b""

    async with serving(script) as port:
        given = account(
            port,
            ca_file=ca_file,
            tls="direct" if direct else "starttls",
            fingerprint=hashlib.sha256(b"another").digest(),
        )
        error = await failure(given)
    assert isinstance(error, RemoteProtocolError)
    assert error.type is ErrorType.CANCEL
    for each in (der, b"another"):
        assert hashlib.sha256(each).hexdigest().upper() in str(error).replace(":", "")


# --- What ties the login to the connection


@pytest.mark.parametrize("direct", [False, True])
async def test_the_login_is_bound_to_the_servers_certificate(
    tls: TLS, ca_file: Path, direct: bool
) -> None:
    """RFC 5929 section 4: the hash of the certificate that this end has seen."""
    context, der = tls.server("example.org")

    async def script(server: Server) -> None:
        await (server.start_tls if direct else lambda c: to_tls(server, c))(context)
        await server.header()
        await server.send(S_HEADER + BINDING_FEATURES)
        assert await server.scram(binding=hashlib.sha256(der).digest())
        assert b"SCRAM-SHA-256-PLUS" in server.heard
        await server.header()
        await server.send(S_HEADER + S_BIND_FEATURES)
        await server.stanza()
        await server.send(S_BOUND)

    async with serving(script) as port:
        given = account(port, ca_file=ca_file, tls="direct" if direct else "starttls")
        connection = await connect.connect(given)
        await connection.transport.aclose()
    assert connection.stream.is_open


# --- What the server does wrong


@pytest.mark.parametrize("offered", [features(), features(mechanisms("PLAIN", "SCRAM-SHA-1"))])
async def test_a_server_without_tls_gets_no_credential(offered: str, ca_file: Path) -> None:
    """Not even if somebody on the way has cut STARTTLS out of the features."""
    heard = bytearray()

    async def script(server: Server) -> None:
        await server.header()
        await server.send(S_HEADER + offered)
        with pytest.raises(EOFError):
            await server.stanza()
        heard.extend(server.heard)

    async with serving(script) as port:
        error = await failure(account(port, ca_file=ca_file, allow_plain=True))
    assert isinstance(error, RemoteProtocolError)
    assert "offers no STARTTLS" in str(error)
    assert b"auth" not in heard


async def test_a_stanza_injected_behind_proceed_is_never_seen(tls: TLS, ca_file: Path) -> None:
    async def script(server: Server) -> None:
        await server.header()
        await server.send(S_HEADER + S_STARTTLS_FEATURES)
        await server.stanza()
        await server.send(f"{S_PROCEED}{S_HEADER}<presence from='mallory@example.org'/>")
        await server.start_tls(tls.context("example.org"))
        await server.let_in()

    async with serving(script) as port:
        connection = await connect.connect(account(port, ca_file=ca_file))
        await connection.transport.aclose()
    assert connection.early == []


async def test_a_server_that_fails_to_start_tls_is_named(ca_file: Path) -> None:
    async def script(server: Server) -> None:
        await server.header()
        await server.send(S_HEADER + S_STARTTLS_FEATURES)
        await server.stanza()
        await server.send("<failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
        with pytest.raises(EOFError):
            await server.stanza()

    async with serving(script) as port:
        error = await failure(account(port, ca_file=ca_file))
    assert str(error) == "the server could not start TLS"


@pytest.mark.parametrize("said", [b"", b"<html>no TLS here</html>"])
async def test_what_is_no_tls_is_an_outage_not_a_bad_certificate(
    said: bytes, ca_file: Path
) -> None:
    async def script(server: Server) -> None:
        await server.transport.receive_some(4_096)
        await server.transport.send_all(said)

    async with serving(script) as port:
        error = await failure(account(port, ca_file=ca_file, tls="direct"))
    assert isinstance(error, OfflineError)
    assert str(error).startswith("TLS with the server failed: ")
    assert ('account.tls = "starttls"' in error.hint) == bool(said)


async def test_a_wrong_password_is_told_as_such(tls: TLS, ca_file: Path) -> None:
    async def script(server: Server) -> None:
        await to_tls(server, tls.context("example.org"))
        await server.header()
        await server.send(S_HEADER + features(mechanisms("SCRAM-SHA-256")))
        assert not await server.scram()
        with pytest.raises(EOFError):
            await server.stanza()

    async with serving(script) as port:
        error = await failure(account(port, ca_file=ca_file, password="wrong"))
    assert isinstance(error, AuthenticationError)
    assert "refused the login of user@example.org" in str(error)


async def test_a_password_that_cannot_be_prepared_is_told_as_such(
    tls: TLS, ca_file: Path
) -> None:
    async def script(server: Server) -> None:
        await to_tls(server, tls.context("example.org"))
        await server.header()
        await server.send(S_HEADER + features(mechanisms("SCRAM-SHA-256")))
        with pytest.raises(ClientGoneError):
            await server.scram()

    async with serving(script) as port:
        error = await failure(account(port, ca_file=ca_file, password="bell\a"))
    assert isinstance(error, AuthenticationError)
    assert "SASLprep" in str(error)


async def test_the_servers_own_reason_is_raised(tls: TLS, ca_file: Path) -> None:
    async def script(server: Server) -> None:
        await to_tls(server, tls.context("example.org"))
        await server.header()
        await server.send(S_HEADER + stream_error("system-shutdown"))
        with pytest.raises(EOFError):
            await server.stanza()

    async with serving(script) as port:
        error = await failure(account(port, ca_file=ca_file))
    assert isinstance(error, StreamError)
    assert error.condition == "system-shutdown"


async def test_a_server_that_hangs_up_is_an_outage() -> None:
    async def script(server: Server) -> None:
        await server.header()

    async with serving(script) as port:
        error = await failure(account(port))
    assert isinstance(error, OfflineError)
    assert str(error) == "the server hung up before TLS began"
    assert 'account.tls = "direct"' in error.hint


async def test_a_refused_port_says_so() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    error = await failure(account(port))
    assert isinstance(error, OfflineError)
    assert str(error) == f"no connection to the server 127.0.0.1:{port}: Connection refused"
    assert "account.server" in error.hint


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example.org"])
async def test_a_name_that_dns_cannot_carry_is_an_outage(host: str) -> None:
    given = Account(jid=USER, password=lambda: PASSWORD, server=(host, 5222))
    error = await failure(given)
    assert isinstance(error, OfflineError)
    assert f"no connection to the server {host}:5222" in str(error)


async def test_each_reason_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with several addresses fails for each; a resolver for none."""

    async def no_way(*_: object) -> None:
        causes = [
            ConnectionRefusedError(111, "x"),
            OSError(113, "y"),
            OSError(111, "z"),
            OSError("w"),
        ]
        raise OSError("all failed") from ExceptionGroup("all failed", causes)

    monkeypatch.setattr(trio, "open_tcp_stream", no_way)
    expected = (
        "no connection to the server 127.0.0.1:1: Connection refused, No route to host, w"
    )
    assert str(await failure(account(1))) == expected


async def test_a_server_that_never_answers_is_given_up(autojump_clock: MockClock) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        error = await failure(account(port))
    assert isinstance(error, OfflineError)
    assert str(error) == f"the server 127.0.0.1:{port} did not let us in within 30 s"


async def test_giving_up_closes_the_connection() -> None:
    giving_up = trio.CancelScope()

    async def script(server: Server) -> None:
        await server.header()
        giving_up.cancel()
        with pytest.raises(ClientGoneError):
            await server.stanza()

    async with serving(script) as port:
        with giving_up:
            await connect.connect(account(port))
    assert giving_up.cancelled_caught


async def test_the_ca_file_must_be_usable(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    for content in (None, "not PEM"):
        if content is not None:
            path.write_text(content)
        error = await failure(account(1, ca_file=path))
        assert str(path) in str(error)
        assert "PEM" in error.hint


async def test_an_account_whose_password_cannot_be_read_is_not_connected() -> None:
    def unreadable() -> str:
        raise AuthenticationError("the password file is gone")

    given = Account(jid=USER, password=unreadable, server=("127.0.0.1", 1))
    assert str(await failure(given)) == "the password file is gone"


# --- Which server


@dataclass
class Servers:
    """Stands for the DNS; remembers what it was asked."""

    targets: list[Target]
    asked: list[tuple[str, str]] = field(default_factory=list)

    async def find(self, domain: str, tls: TLSMode) -> list[Target]:
        """See `resolve.find_server`."""
        self.asked.append((domain, tls))
        return self.targets


def at(port: int, *, direct: bool = False) -> Target:
    return Target("127.0.0.1", port, direct)


async def free_port() -> int:
    """Where nobody listens."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port: int = listener.socket.getsockname()[1]
        return port


def roaming(
    *, ca_file: Path | None = None, tls: TLSMode = "auto", fingerprint: bytes | None = None
) -> Account:
    """An account whose server the DNS knows."""
    return Account(
        jid=LAPTOP,
        password=lambda: PASSWORD,
        tls=tls,
        ca_file=ca_file,
        fingerprint=fingerprint,
    )


@pytest.mark.parametrize(
    ("port", "mode", "direct"),
    [
        (5222, "auto", False),
        (5223, "auto", True),
        (443, "auto", False),
        (5223, "starttls", False),
        (5222, "direct", True),
    ],
)
async def test_the_accounts_own_server_needs_no_dns(
    monkeypatch: pytest.MonkeyPatch, port: int, mode: TLSMode, direct: bool
) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    wanted: list[tuple[object, ...]] = []
    opening = trio.open_tcp_stream

    async def open_there(*where: Any) -> trio.SocketStream:
        wanted.append(where)
        return await opening(*listener.socket.getsockname())

    async def listen() -> None:
        async with await listener.accept() as stream:
            # The first byte of a handshake (RFC 8446 section 5.1), or of the XML.
            assert (await stream.receive_some(1) == b"\x16") == direct

    monkeypatch.setattr(trio, "open_tcp_stream", open_there)
    given = Account(
        jid=LAPTOP, password=lambda: PASSWORD, server=("xmpp.example.org", port), tls=mode
    )
    dns = Servers([])
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        with pytest.raises(OfflineError):
            await connect.connect(given, find=dns.find)
    assert wanted == [("xmpp.example.org", port)]
    assert dns.asked == []


@pytest.mark.parametrize("direct", [False, True])
async def test_the_servers_that_the_dns_knows_are_tried_in_their_order(
    tls: TLS, ca_file: Path, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "syncd")

    async def script(server: Server) -> None:
        context = tls.context("example.org")
        await (server.start_tls if direct else lambda c: to_tls(server, c))(context)
        await server.let_in()

    nobody = await free_port()
    async with serving(script) as port:
        dns = Servers([at(nobody), at(port, direct=direct), at(1)])
        connection = await connect.connect(roaming(ca_file=ca_file), find=dns.find)
        await connection.transport.aclose()
    assert dns.asked == [("example.org", "auto")]
    assert caplog.messages == [
        f"not online by 127.0.0.1:{nobody}: "
        f"no connection to the server 127.0.0.1:{nobody}: Connection refused"
    ]


async def test_behind_a_bad_certificate_the_next_server_is_tried_and_the_log_says_so(
    tls: TLS, ca_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def refused(server: Server) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await server.start_tls(tls.context("evil.org"))

    async def script(server: Server) -> None:
        await server.start_tls(tls.context("example.org"))
        await server.let_in()

    async with serving(refused) as bad, serving(script) as good:
        dns = Servers([at(bad, direct=True), at(good, direct=True)])
        connection = await connect.connect(roaming(ca_file=ca_file), find=dns.find)
        await connection.transport.aclose()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"127.0.0.1:{bad}" in record.getMessage()
    assert "Hostname mismatch" in record.getMessage()


@pytest.mark.parametrize("condition", ["host-unknown", "system-shutdown"])
async def test_what_is_true_of_one_server_only_leads_to_the_next(
    tls: TLS, ca_file: Path, condition: str
) -> None:
    async def refuse(server: Server) -> None:
        await server.header()
        await server.send(S_HEADER + stream_error(condition))

    async def script(server: Server) -> None:
        await to_tls(server, tls.context("example.org"))
        await server.let_in()

    async with serving(refuse) as first, serving(script) as second:
        dns = Servers([at(first), at(second)])
        connection = await connect.connect(roaming(ca_file=ca_file), find=dns.find)
        await connection.transport.aclose()
    assert connection.stream.is_open


@pytest.mark.parametrize("condition", ["conflict", "policy-violation", "see-other-host"])
async def test_what_is_about_us_is_not_asked_again_elsewhere(condition: str) -> None:
    async def refuse(server: Server) -> None:
        await server.header()
        await server.send(S_HEADER + stream_error(condition))

    async with serving(refuse) as port:
        dns = Servers([at(port), at(1)])
        with pytest.raises(StreamError) as caught:
            await connect.connect(roaming(), find=dns.find)
    assert caught.value.condition == condition


async def test_a_refused_password_is_not_shown_to_the_next_server(
    tls: TLS, ca_file: Path
) -> None:
    async def refuse(server: Server) -> None:
        await server.start_tls(tls.context("example.org"))
        await server.header()
        await server.send(S_HEADER + features(mechanisms("SCRAM-SHA-256")))
        assert not await server.scram(password="another")

    async with serving(refuse) as port:
        dns = Servers([at(port, direct=True), at(1)])
        with pytest.raises(AuthenticationError, match="refused the login"):
            await connect.connect(roaming(ca_file=ca_file), find=dns.find)


async def test_behind_another_certificate_than_the_named_one_no_server_is_tried(
    tls: TLS,
) -> None:
    async def script(server: Server) -> None:
        await server.start_tls(tls.context("example.org"))
        assert await server.transport.receive_some(1) == b""

    async with serving(script) as port:
        dns = Servers([at(port, direct=True), at(1)])
        with pytest.raises(RemoteProtocolError, match="certificate_fingerprint"):
            await connect.connect(roaming(fingerprint=bytes(32)), find=dns.find)


async def test_when_no_server_lets_us_in_each_is_told_and_what_a_person_can_do(
    tls: TLS, ca_file: Path
) -> None:
    context = tls.context("evil.org")

    async def refused(server: Server) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await server.start_tls(context)

    async def seen(server: Server) -> None:
        await server.start_tls(context)
        assert await server.transport.receive_some(1) == b""

    nobody = await free_port()
    async with serving(refused, seen) as bad, serving(hang_up) as gone:
        dns = Servers([at(nobody), at(bad, direct=True), at(gone)])
        with pytest.raises(OfflineError) as caught:
            await connect.connect(roaming(ca_file=ca_file), find=dns.find)
    error = caught.value
    assert str(error) == (
        "none of the servers of example.org let us in: "
        f"no connection to the server 127.0.0.1:{nobody}: Connection refused; "
        f"127.0.0.1:{bad}: the server's certificate is not good for example.org: "
        f"it is for evil.org; 127.0.0.1:{gone}: "
        "the server hung up before TLS began"
    )
    assert error.hint.startswith("the server needs one for example.org")
    assert isinstance(error.__cause__, ExceptionGroup)
    assert [type(each) for each in error.__cause__.exceptions] == [
        OfflineError,
        RemoteProtocolError,
        OfflineError,
    ]


async def test_without_anything_to_do_there_is_no_hint() -> None:
    async def refuse(server: Server) -> None:
        await server.header()
        await server.send(S_HEADER + stream_error("system-shutdown"))

    async with serving(refuse) as first, serving(refuse) as second:
        dns = Servers([at(first), at(second)])
        with pytest.raises(OfflineError) as caught:
            await connect.connect(roaming(), find=dns.find)
    assert caught.value.hint == ""


@pytest.mark.parametrize("mode", ["auto", "direct"])
async def test_the_whole_way_from_a_domain_in_the_dns(
    tls: TLS, ca_file: Path, mode: TLSMode
) -> None:
    """With a first server, of the other kind, that is not there."""

    async def script(server: Server) -> None:
        await server.start_tls(tls.context("example.org"))
        await server.let_in()

    nobody = await free_port()
    async with serving(script) as port:
        zone = {
            "_xmpp-client._tcp.example.org": [f"5 0 {nobody} localhost."],
            "_xmpps-client._tcp.example.org": [f"10 0 {port} localhost."],
        }
        async with name_server(zone) as names:
            find = functools.partial(resolve.find_server, resolver=names.resolver)
            given = roaming(ca_file=ca_file, tls=mode)
            connection = await connect.connect(given, find=find)
            await connection.transport.aclose()
    assert connection.stream.is_open


async def test_a_server_may_have_only_ipv6() -> None:
    try:
        (listener,) = await trio.open_tcp_listeners(0, host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    port = listener.socket.getsockname()[1]

    async def listen() -> None:
        async with await listener.accept() as stream:
            await hang_up(Server(stream))

    dns = Servers([Target("::1", port, direct=False), Target("::1", 1, direct=False)])
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        with pytest.raises(OfflineError) as caught:
            await connect.connect(roaming(), find=dns.find)
    assert f"[::1]:{port}: the server hung up" in str(caught.value)


async def test_what_the_dns_says_is_the_end_of_it() -> None:
    async def find(domain: str, tls: TLSMode) -> list[Target]:
        raise OfflineError(f"{domain} has none for {tls}")

    with pytest.raises(OfflineError, match=r"^example.org has none for starttls$"):
        await connect.connect(roaming(tls="starttls"), find=find)


async def test_a_host_that_drops_every_packet_makes_way_for_the_next(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async def never(*_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio, "open_tcp_stream", never)
    dns = Servers([at(1), at(2)])
    with pytest.raises(OfflineError) as caught:
        await connect.connect(roaming(), find=dns.find)
    assert str(caught.value) == (
        "none of the servers of example.org let us in: "
        "no connection to the server 127.0.0.1:1 within 10 s; "
        "no connection to the server 127.0.0.1:2 within 10 s"
    )
    assert trio.current_time() - 2 * connect.REACH_TIMEOUT < 1


async def test_a_name_that_nobody_knows_is_told_with_the_dns_as_suspect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio, "open_tcp_stream", unknown)
    error = await failure(account(1))
    assert str(error) == ("no connection to the server 127.0.0.1:1: Name or service not known")
    assert "DNS" in error.hint


def test_a_password_is_not_shown_with_the_attempt() -> None:
    given = account(1)
    context = ssl.create_default_context()
    assert PASSWORD not in repr(connect._Login(given, PASSWORD, None, None, at(1), context))


async def test_an_address_literal_is_checked_against_the_certificate(
    tls: TLS, ca_file: Path
) -> None:
    async def script(server: Server) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await server.start_tls(tls.context("::2"))

    async with serving(script) as port:
        given = Account(
            jid=JID.parse("user@[::1]"),
            password=lambda: PASSWORD,
            server=("127.0.0.1", port),
            tls="direct",
            ca_file=ca_file,
        )
        with pytest.raises(RemoteProtocolError, match="IP address mismatch") as caught:
            await connect.connect(given)
    assert "is not good for [::1]" in str(caught.value)


async def test_a_broken_connection_reads_as_the_end_and_writes_as_an_outage() -> None:
    connected = trio.Event()

    async def script(server: Server) -> None:
        await connected.wait()
        # Closing without lingering sends a reset.
        linger = struct.pack("ii", 1, 0)
        assert isinstance(server.transport, trio.SocketStream)
        server.transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await server.transport.aclose()

    async def write_for_ever(transport: trio.abc.Stream) -> None:
        stream = open_stream()
        while True:  # the kernel may take the first before it tells
            stream.send(make_presence())
            await connect.write(transport, stream)

    async with serving(script) as port:
        transport = await trio.open_tcp_stream("127.0.0.1", port)
        connected.set()
    async with transport:
        assert await connect.read(transport) == b""
        with pytest.raises(
            OfflineError, match="the connection to the server broke: Broken pipe"
        ):
            await write_for_ever(transport)


async def test_a_goodbye_to_who_is_gone_changes_no_reason(
    ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footer cannot be written any more; what the user reads is why it was due."""

    async def script(server: Server) -> None:
        await server.header()
        monkeypatch.setattr(trio.SocketStream, "send_all", refuse)
        assert isinstance(server.transport, trio.SocketStream)
        await sending(server.transport, (S_HEADER + features()).encode())

    sending = trio.SocketStream.send_all

    async def refuse(*_: object) -> None:
        raise trio.BrokenResourceError

    async with serving(script) as port:
        error = await failure(account(port, ca_file=ca_file))
    assert "offers no STARTTLS" in str(error)


async def test_a_connection_knows_from_which_address_it_was_made() -> None:
    async with connection() as (ours, _):
        secured = trio.SSLStream(ours, ssl.create_default_context())
        assert (connect.own_host(ours), connect.own_host(secured)) == ("127.0.0.1",) * 2
    assert connect.own_host(memory_stream_pair()[0]) == ""


async def test_where_nothing_is_queued_nothing_is_written() -> None:
    ours, theirs = memory_stream_pair()
    stream = open_stream()
    await connect.write(ours, stream)
    stream.close()
    await connect.write(ours, stream)
    assert await theirs.receive_some() == C_FOOTER.encode()
