"""The servers that the other tests here stand on do what those tests assume."""

from __future__ import annotations

import base64
import socket
from typing import TYPE_CHECKING

import pytest

from tests.support.servers import DOMAIN, USERS, connect, open_stream, read_until

if TYPE_CHECKING:
    import ssl

    from tests.support.servers import Server


def log_in(server: Server, user: str, password: str, *, direct: bool = False) -> bytes:
    """Log in by PLAIN (RFC 4616) inside TLS; what the server offers after that."""
    with connect(server, direct=direct) as stream:
        open_stream(stream, server.domain)
        authenticate(stream, user, password)
        return open_stream(stream, server.domain)


def authenticate(stream: ssl.SSLSocket, user: str, password: str) -> None:
    initial = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
    stream.sendall(
        b"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>%s</auth>"
        % initial.encode()
    )
    read_until(stream, b"<success")


def test_it_takes_clients_only_encrypted(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=5) as plain:
        features = open_stream(plain, server.domain)
    assert b"<starttls" in features
    assert b"PLAIN" not in features


@pytest.mark.parametrize("direct", [False, True], ids=["starttls", "direct-tls"])
def test_it_offers_scram_once_encrypted(server: Server, direct: bool) -> None:
    with connect(server, direct=direct) as stream:
        features = open_stream(stream, server.domain)
    assert b">SCRAM-SHA-1<" in features
    assert b">SCRAM-SHA-256<" in features


@pytest.mark.parametrize("user", USERS)
def test_everybody_can_log_in(server: Server, user: str) -> None:
    assert b"urn:ietf:params:xml:ns:xmpp-bind" in log_in(server, user, server.password(user))


def test_a_wrong_password_is_refused(server: Server) -> None:
    with pytest.raises(EOFError, match="not-authorized"):
        log_in(server, "alice", "wrong")


def test_a_restart_keeps_accounts_and_rosters(server: Server) -> None:
    before = roster(server, "alice")
    server.restart()
    assert roster(server, "alice") == before == {"bob", "carol"}


def test_it_comes_back_after_it_was_killed(server: Server) -> None:
    server.kill()
    assert not server.running
    server.start()
    assert b"urn:ietf:params:xml:ns:xmpp-bind" in log_in(server, "bob", server.password("bob"))


def test_its_proxy_listens(server: Server) -> None:
    """It takes the greeting of SOCKS5 without authentication (RFC 1928 section 3)."""
    with socket.create_connection((server.host, server.proxy_port), timeout=5) as proxy:
        proxy.sendall(b"\x05\x01\x00")
        assert proxy.recv(2) == b"\x05\x00"


def roster(server: Server, user: str) -> set[str]:
    """Who is in a user's roster with a subscription in both directions."""
    with connect(server) as stream:
        open_stream(stream, server.domain)
        authenticate(stream, user, server.password(user))
        open_stream(stream, server.domain)
        stream.sendall(
            b"<iq type='set' id='1'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>"
        )
        read_until(stream, b"</iq>")
        stream.sendall(b"<iq type='get' id='2'><query xmlns='jabber:iq:roster'/></iq>")
        answer = read_until(stream, b"</iq>").decode()
    items = [item for item in answer.split("<item ")[1:] if "both" in item.partition(">")[0]]
    return {user for user in USERS for item in items if f"{user}@{DOMAIN}" in item}
