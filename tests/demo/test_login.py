"""The server's side of SASL, against the client's side of syncd."""

from __future__ import annotations

import base64

import pytest

from syncd.demo.login import Accounts, Exchange, LoginRefusedError, Step
from syncd.errors import AuthenticationError
from syncd.xmpp import sasl

ALL = (*sasl.MECHANISMS, "PLAIN")


def make_accounts(refusal: str = "") -> Accounts:
    return Accounts(
        "demo.example",
        {"alice": "pencil", "komma,gleich=": "pw"},
        token=bytes,
        mechanisms=ALL,
        refusal=lambda: refusal,
    )


def scram(exchange: Exchange, mechanism: str, name: str, password: str) -> sasl.Scram:
    """Run the exchange until the client has checked the server's proof."""
    client = sasl.Scram(mechanism, name, "client-nonce")
    challenge = exchange.receive(client.first())
    key = client.challenged(challenge.data).derive(password)
    client.finished(exchange.receive(client.final(key)).data)
    return client


def log_in(exchange: Exchange, mechanism: str, name: str, password: str) -> None:
    if mechanism == "PLAIN":
        exchange.receive(sasl.plain(name, password))
    else:
        scram(exchange, mechanism, name, password)


@pytest.mark.parametrize("mechanism", sasl.MECHANISMS)
@pytest.mark.parametrize(("name", "password"), [("alice", "pencil"), ("komma,gleich=", "pw")])
def test_scram_proves_both_ends(mechanism: str, name: str, password: str) -> None:
    exchange = Exchange(make_accounts(), mechanism, "server-nonce")
    assert scram(exchange, mechanism, name, password).keyed
    assert exchange.name == name


def test_plain_logs_in() -> None:
    exchange = Exchange(make_accounts(), "PLAIN", "")
    assert exchange.receive(sasl.plain("Alice", "pencil")) == Step("success", b"")
    assert exchange.name == "alice"


@pytest.mark.parametrize(("name", "password"), [("alice", "wrong"), ("nobody", "pencil")])
@pytest.mark.parametrize("mechanism", ALL)
def test_wrong_password_and_unknown_name_are_refused_alike(
    mechanism: str, name: str, password: str
) -> None:
    exchange = Exchange(make_accounts(), mechanism, "server-nonce")
    with pytest.raises(LoginRefusedError) as caught:
        log_in(exchange, mechanism, name, password)
    assert caught.value.condition == "not-authorized"


def test_a_server_without_the_password_cannot_prove_it() -> None:
    """The client's own check, against a server that knows another password."""
    exchange = Exchange(make_accounts(), "SCRAM-SHA-256", "server-nonce")
    client = sasl.Scram("SCRAM-SHA-256", "alice", "client-nonce")
    client.challenged(exchange.receive(client.first()).data)
    client.final(bytes(32))
    with pytest.raises(AuthenticationError):
        client.finished(b"v=" + base64.b64encode(bytes(32)))


def test_a_mechanism_that_is_not_offered_is_refused() -> None:
    with pytest.raises(LoginRefusedError) as caught:
        Exchange(make_accounts(), "DIGEST-MD5", "nonce")
    assert caught.value.condition == "invalid-mechanism"


def test_the_first_message_may_come_later() -> None:
    exchange = Exchange(make_accounts(), "PLAIN", "")
    assert exchange.receive(b"") == Step("challenge", b"")
    assert exchange.receive(sasl.plain("alice", "pencil")).kind == "success"


@pytest.mark.parametrize(
    ("mechanism", "message", "condition"),
    [
        ("PLAIN", b"no zero bytes", "malformed-request"),
        ("PLAIN", b"\0alice\0\xff", "malformed-request"),
        ("PLAIN", b"\0alice\0" + b"x" * 5_000, "malformed-request"),
        ("PLAIN", b"\0a b\0pencil", "not-authorized"),
        ("PLAIN", b"\0alice\0\x07", "not-authorized"),
        ("PLAIN", b"bob@demo.example\0alice\0pencil", "invalid-authzid"),
        ("SCRAM-SHA-1", b"p=tls-unique,,n=alice,r=x", "malformed-request"),
        ("SCRAM-SHA-1", b"n,,m=x,n=alice,r=x", "malformed-request"),
        ("SCRAM-SHA-1", b"n,,n=alice", "malformed-request"),
        ("SCRAM-SHA-1", b"n,a=bob,n=alice,r=x", "invalid-authzid"),
    ],
)
def test_first_messages_that_are_refused(
    mechanism: str, message: bytes, condition: str
) -> None:
    with pytest.raises(LoginRefusedError) as caught:
        Exchange(make_accounts(), mechanism, "nonce").receive(message)
    assert caught.value.condition == condition


@pytest.mark.parametrize(
    ("message", "condition"),
    [
        (b"c=biws,r=xnonce,p=!", "malformed-request"),
        (b"c=eSws,r=xnonce,p=AAAA", "malformed-request"),  # says "y,," now
        (b"c=biws,r=other,p=AAAA", "malformed-request"),
        (b"c=biws,r=xnonce,p=AAAA", "not-authorized"),  # a proof of 3 bytes
        (b"c=biws,r=xnonce,p=" + base64.b64encode(bytes(20)), "not-authorized"),
    ],
)
def test_final_messages_that_are_refused(message: bytes, condition: str) -> None:
    exchange = Exchange(make_accounts(), "SCRAM-SHA-1", "nonce")
    exchange.receive(b"n,,n=alice,r=x")
    with pytest.raises(LoginRefusedError) as caught:
        exchange.receive(message)
    assert caught.value.condition == condition


def test_every_login_can_be_refused() -> None:
    with pytest.raises(LoginRefusedError) as caught:
        Exchange(make_accounts("account-disabled"), "PLAIN", "").receive(
            sasl.plain("alice", "pencil")
        )
    assert caught.value.condition == "account-disabled"
