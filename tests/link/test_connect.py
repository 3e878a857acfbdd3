"""Over loopback TCP, against a scripted server with real TLS."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import pytest
import trio
import trustme

from syncd.errors import (
    AuthenticationError,
    OfflineError,
    RemoteProtocolError,
    StreamError,
    SyncdError,
)
from syncd.link import connect
from syncd.link.connect import Account
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import make_presence
from syncd.xmpp.stream import State
from tests.support.wire import (
    LAPTOP,
    PASSWORD,
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


@dataclass
class TLS:
    """A CA, and what is needed to trust it and to serve under it."""

    authority: trustme.CA = field(default_factory=trustme.CA)

    def context(self, *names: str, not_after: datetime | None = None) -> ssl.SSLContext:
        """A server's context with a certificate for these names."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(*names, not_after=not_after).configure_cert(context)
        return context


@pytest.fixture(scope="module")
def tls() -> TLS:
    return TLS()


@pytest.fixture(scope="module")
def ca_file(tls: TLS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    tls.authority.cert_pem.write_to_path(str(path))
    return path


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[int]:
    """Play the script to the one client that comes; give its port.

    At the end the script must be over: what it expects of the client has happened.
    """
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve() -> None:
        async with listener:
            stream = await listener.accept()
        async with stream:
            await script(Server(stream))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield listener.socket.getsockname()[1]


def account(
    port: int,
    *,
    ca_file: Path | None = None,
    tls: Literal["starttls", "direct", "auto"] = "auto",
    password: str = PASSWORD,
    allow_plain: bool = False,
) -> Account:
    """The user's account at a server on this machine."""
    return Account(
        jid=LAPTOP,
        password=lambda: password,
        server=("127.0.0.1", port),
        tls=tls,
        ca_file=ca_file,
        allow_plain=allow_plain,
    )


async def to_tls(server: Server, context: ssl.SSLContext) -> None:
    """The server's side up to the handshake, which may fail."""
    await server.header()
    await server.send(S_HEADER + S_STARTTLS_FEATURES)
    await server.stanza()
    await server.send(S_PROCEED)
    await server.start_tls(context)


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
        (["evil.org"], None, True, "Hostname mismatch"),
        (["127.0.0.1", "localhost"], None, True, "Hostname mismatch"),
        (["xmpp.example.org"], None, True, "Hostname mismatch"),
        (["example.org"], datetime.now(UTC) - timedelta(days=1), True, "expired"),
        (["example.org"], None, False, "unable to get local issuer|self-signed"),
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
    heard = bytearray()

    async def script(server: Server) -> None:
        context = tls.context(*names, not_after=not_after)
        with pytest.raises(trio.BrokenResourceError):
            await (server.start_tls if direct else lambda c: to_tls(server, c))(context)
        heard.extend(server.heard)

    async with serving(script) as port:
        given = account(
            port, ca_file=ca_file if trusted else None, tls="direct" if direct else "starttls"
        )
        with pytest.raises(RemoteProtocolError, match=reason) as caught:
            await connect.connect(given)
    assert "certificate is not good for example.org" in str(caught.value)
    assert "account.ca_file" in caught.value.hint
    assert b"auth" not in heard
    assert b"user" not in heard


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
    assert "TLS with the server failed" in str(error)


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
        await server.send(
            f"{S_HEADER}<stream:error><system-shutdown "
            "xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error></stream:stream>"
        )
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
    assert str(error) == "the server hung up"


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


@pytest.mark.parametrize(
    ("jid", "settings", "address", "direct"),
    [
        ("a@example.org", {}, ("example.org", 5222), False),
        ("a@example.org", {"tls": "direct"}, ("example.org", 5222), True),
        ("a@example.org", {"server": ("h", 5223)}, ("h", 5223), True),
        ("a@example.org", {"server": ("h", 5223), "tls": "starttls"}, ("h", 5223), False),
        ("a@example.org", {"server": ("h", 443)}, ("h", 443), False),
        ("a@[::1]", {}, ("::1", 5222), False),
    ],
)
def test_where_the_server_is_and_how_tls_begins(
    jid: str, settings: dict[str, Any], address: tuple[str, int], direct: bool
) -> None:
    given = Account(jid=JID.parse(jid), password=lambda: PASSWORD, **settings)
    assert (given.address, given.direct) == (address, direct)


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
        with pytest.raises(RemoteProtocolError, match="IP address mismatch"):
            await connect.connect(given)


async def test_a_broken_connection_reads_as_the_end_and_writes_as_an_outage() -> None:
    async def script(server: Server) -> None:
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
