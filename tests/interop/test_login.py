"""From an account to a bound stream, at real servers."""

from __future__ import annotations

import functools
import hashlib
import ssl
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.errors import AuthenticationError, OfflineError, RemoteProtocolError, SyncdError
from syncd.link import connect, resolve
from syncd.link.connect import Account
from syncd.xmpp.jid import JID
from tests.support.dns_server import name_server

if TYPE_CHECKING:
    from pathlib import Path

    from syncd.link.resolve import TLSMode
    from tests.support.servers import Server

# Far above what a login takes on a busy machine.
STEP_TIMEOUT = 60  # seconds


def account(server: Server, tls: TLSMode) -> Account:
    """Alice's, at this server, with its CA."""
    return Account(
        jid=JID.parse(f"alice@{server.domain}/here"),
        password=lambda: server.password("alice"),
        server=(server.host, server.tls_port if tls == "direct" else server.port),
        tls=tls,
        ca_file=server.ca_file,
    )


async def log_in(given: Account, find: connect.Find = resolve.find_server) -> JID:
    """Log in, log out; under which JID."""
    with trio.fail_after(STEP_TIMEOUT):
        connection = await connect.connect(given, find=find)
        await connection.transport.aclose()
    return connection.stream.jid


async def failure(given: Account) -> SyncdError:
    """Why there is no login."""
    with pytest.raises(SyncdError) as caught:
        await log_in(given)
    return caught.value


def leaf(folder: Path) -> bytes:
    """The server's certificate, the first of its chain, as DER."""
    pem, end, _ = (folder / "server.pem").read_text().partition("-----END CERTIFICATE-----\n")
    return ssl.PEM_cert_to_DER_cert(pem + end)


@pytest.mark.parametrize("tls", ["starttls", "direct"])
async def test_the_way_in_under_a_ca_of_our_own(server: Server, tls: TLSMode) -> None:
    given = account(server, tls)
    assert await log_in(given) == given.jid


@pytest.mark.parametrize("tls", ["starttls", "direct"])
async def test_the_way_in_by_fingerprint(server: Server, tls: TLSMode) -> None:
    pin = hashlib.sha256(leaf(server.ca_file.parent)).digest()
    given = replace(account(server, tls), ca_file=None, fingerprint=pin)
    assert await log_in(given) == given.jid


@pytest.mark.parametrize("tls", ["starttls", "direct"])
async def test_an_unknown_ca_is_told_with_what_to_compare(server: Server, tls: TLSMode) -> None:
    error = await failure(replace(account(server, tls), ca_file=None))
    assert isinstance(error, RemoteProtocolError)
    assert "its issuer, trustme" in str(error)
    seen = hashlib.sha256(leaf(server.ca_file.parent)).hexdigest().upper()
    assert seen in error.hint.replace(":", "")


@pytest.mark.parametrize("tls", ["starttls", "direct"])
async def test_another_fingerprint_is_the_end(server: Server, tls: TLSMode) -> None:
    error = await failure(replace(account(server, tls), fingerprint=bytes(32)))
    assert isinstance(error, RemoteProtocolError)
    assert "account.certificate_fingerprint" in str(error)


@pytest.mark.parametrize(("tls", "other"), [("starttls", "direct"), ("direct", "starttls")])
async def test_the_wrong_kind_of_port_is_told_with_the_right_one(
    server: Server, tls: TLSMode, other: TLSMode
) -> None:
    error = await failure(replace(account(server, other), tls=tls))
    assert isinstance(error, OfflineError)
    assert f'account.tls = "{other}"' in error.hint


async def test_a_wrong_password_is_refused_once(server: Server) -> None:
    error = await failure(replace(account(server, "starttls"), password=lambda: "wrong"))
    assert isinstance(error, AuthenticationError)


@pytest.mark.parametrize("tls", ["auto", "starttls", "direct"])
async def test_the_way_in_by_the_dns(server: Server, tls: TLSMode) -> None:
    """The first server of each kind is not there."""
    zone = {
        f"_xmpp-client._tcp.{server.domain}": [
            "1 0 1 localhost.",
            f"5 0 {server.port} localhost.",
        ],
        f"_xmpps-client._tcp.{server.domain}": [
            "2 0 1 localhost.",
            f"4 0 {server.tls_port} localhost.",
        ],
    }
    given = replace(account(server, "auto"), server=None, tls=tls)
    async with name_server(zone) as names:
        find = functools.partial(resolve.find_server, resolver=names.resolver)
        assert await log_in(given, find) == given.jid
