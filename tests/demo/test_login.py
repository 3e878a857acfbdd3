"""The server's side of SASL, against the client's side of syncd."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest

from syncd.demo.login import (
    EVERYTHING,
    MAX_AGENTS,
    Abilities,
    Accounts,
    Exchange,
    LoginRefusedError,
    Request,
    Step,
    make_offer,
    make_success,
    read_request,
)
from syncd.errors import AuthenticationError
from syncd.xmpp import sasl
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make, serialise

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


# What is beyond RFC 6120

NOW = datetime(2026, 11, 21, tzinfo=UTC)
END_POINT = b"hash of the certificate"
AGENT = "d4565fa7-4d72-4749-b3d3-740edbf87770"


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def modern(clock: Clock | None = None, abilities: Abilities = EVERYTHING) -> Accounts:
    numbers = itertools.count(1)
    return Accounts(
        "demo.example",
        {"alice": "pencil"},
        token=lambda count: bytes([next(numbers)]) * count,
        abilities=abilities,
        end_point=END_POINT,
        now=clock or Clock(),
    )


def test_with_channel_binding_each_scram_is_offered_twice() -> None:
    assert modern().mechanisms == (
        "SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256", "SCRAM-SHA-1",
    )  # fmt: skip


def test_a_proof_is_bound_to_the_channel() -> None:
    accounts = modern()
    for binding, good in ((END_POINT, True), (b"another certificate", False)):
        exchange = Exchange(accounts, "SCRAM-SHA-256-PLUS", "server-nonce")
        client = sasl.Scram(
            "SCRAM-SHA-256-PLUS", "alice", "nonce", "p=tls-server-end-point", binding
        )
        challenge = exchange.receive(client.first())
        key = client.challenged(challenge.data).derive("pencil")
        if good:
            client.finished(exchange.receive(client.final(key)).data)
        else:
            with pytest.raises(LoginRefusedError):
                exchange.receive(client.final(key))


@pytest.mark.parametrize(
    ("mechanism", "flag", "condition"),
    [
        ("SCRAM-SHA-256", "y", "not-authorized"),  # somebody has hidden -PLUS from it
        ("SCRAM-SHA-256", "p=tls-server-end-point", "malformed-request"),
        ("SCRAM-SHA-256-PLUS", "n", "malformed-request"),
        ("SCRAM-SHA-256-PLUS", "p=tls-exporter", "malformed-request"),
        ("SCRAM-SHA-256-PLUS", "tls-server-end-point", "malformed-request"),
    ],
)
def test_what_clients_may_not_say_about_the_channel(
    mechanism: str, flag: str, condition: str
) -> None:
    with pytest.raises(LoginRefusedError) as caught:
        Exchange(modern(), mechanism, "nonce").receive(f"{flag},,n=alice,r=x".encode())
    assert caught.value.condition == condition


def test_the_offer_is_protected() -> None:
    """XEP-0474 section 5.1, computed by hand."""
    challenge = Exchange(modern(), "SCRAM-SHA-1", "nonce").receive(b"n,,n=alice,r=x").data
    listed = (
        "SCRAM-SHA-1\x1eSCRAM-SHA-1-PLUS\x1eSCRAM-SHA-256\x1eSCRAM-SHA-256-PLUS"
        "\x1ftls-server-end-point"
    )
    digest = base64.b64encode(hashlib.sha1(listed.encode(), usedforsecurity=False).digest())
    assert challenge.endswith(b",h=" + digest)


# Tokens


def prove(secret: str, binding: bytes = END_POINT, role: bytes = b"Initiator") -> bytes:
    return hmac.digest(secret.encode(), role + binding, "sha256")


def use(
    accounts: Accounts,
    secret: str,
    *,
    mechanism: str = "HT-SHA-256-ENDP",
    agent: str = AGENT,
    binding: bytes = END_POINT,
) -> Exchange:
    """Log in by a token; the server must prove that it knows it as well."""
    exchange = Exchange(accounts, mechanism, "nonce", agent)
    step = exchange.receive(b"alice\0" + prove(secret, binding))
    assert step == Step("success", prove(secret, binding, b"Responder"))
    assert exchange.name == "alice"
    return exchange


def issue(accounts: Accounts, mechanism: str = "HT-SHA-256-ENDP", agent: str = AGENT) -> str:
    return accounts.tokens.issue("alice", agent, mechanism)["token"]


def test_a_token_logs_in_again_and_again() -> None:
    clock = Clock()
    accounts = modern(clock)
    given = accounts.tokens.issue("alice", AGENT, "HT-SHA-256-ENDP")
    assert given["expiry"] == "2026-12-12T00:00:00Z"
    for _ in range(2):
        assert not use(accounts, given["token"]).rotate
    clock.now = NOW + timedelta(days=2)
    assert use(accounts, given["token"]).rotate


def test_a_token_without_binding_is_one_too() -> None:
    accounts = modern()
    secret = issue(accounts, "HT-SHA-256-NONE")
    use(accounts, secret, mechanism="HT-SHA-256-NONE", binding=b"")


def refused(accounts: Accounts, secret: str, **changes: Any) -> str:
    with pytest.raises(LoginRefusedError) as caught:
        use(accounts, secret, **changes)
    return caught.value.condition


def test_a_token_is_of_one_client_and_one_use() -> None:
    accounts = modern()
    secret = issue(accounts)
    assert refused(accounts, "another") == "not-authorized"
    assert refused(accounts, secret, binding=b"") == "not-authorized"
    assert refused(accounts, secret, agent="another") == "not-authorized"
    assert refused(accounts, secret, mechanism="HT-SHA-256-NONE") == "not-authorized"
    unbound = issue(accounts, "HT-SHA-256-NONE")
    changed = {"mechanism": "HT-SHA-256-NONE", "binding": b""}
    use(accounts, unbound, **changed)  # type: ignore[arg-type]  # of two types
    assert refused(accounts, secret) == "not-authorized"


def test_a_token_for_one_mechanism_is_none_for_another_that_hashes_alike() -> None:
    accounts = modern()
    accounts.end_point = b""
    secret = issue(accounts)
    assert refused(accounts, secret, mechanism="HT-SHA-256-NONE", binding=b"") == (
        "not-authorized"
    )


def test_an_old_token_expires() -> None:
    clock = Clock()
    accounts = modern(clock)
    secret = issue(accounts)
    clock.now = NOW + timedelta(days=21)
    assert refused(accounts, secret) == "credentials-expired"


def test_the_old_token_is_good_until_the_new_one_is_used() -> None:
    accounts = modern()
    old = issue(accounts)
    use(accounts, old)
    lost, new = issue(accounts), issue(accounts)
    assert refused(accounts, lost) == "not-authorized"
    use(accounts, old)
    use(accounts, new)
    assert refused(accounts, old) == "not-authorized"
    use(accounts, new)


def test_the_client_that_has_asked_longest_ago_is_forgotten_first() -> None:
    accounts = modern()
    secrets = [issue(accounts, agent=f"agent {number}") for number in range(MAX_AGENTS)]
    issue(accounts, agent="agent 0")
    issue(accounts, agent="one more")
    assert refused(accounts, secrets[1], agent="agent 1") == "not-authorized"
    use(accounts, secrets[2], agent="agent 2")


@pytest.mark.parametrize(
    ("message", "condition"),
    [
        (b"alice", "malformed-request"),
        (b"\xff\0proof", "malformed-request"),
        (b"a b\0proof", "not-authorized"),
        (b"nobody\0proof", "not-authorized"),
    ],
)
def test_messages_that_prove_no_token(message: bytes, condition: str) -> None:
    with pytest.raises(LoginRefusedError) as caught:
        Exchange(modern(), "HT-SHA-256-ENDP", "nonce", AGENT).receive(message)
    assert caught.value.condition == condition


@pytest.mark.parametrize(
    ("mechanism", "agent"), [("HT-SHA-256-ENDP", None), ("SCRAM-SHA-256", AGENT)]
)
def test_tokens_and_passwords_have_their_own_mechanisms(
    mechanism: str, agent: str | None
) -> None:
    with pytest.raises(LoginRefusedError) as caught:
        Exchange(modern(), mechanism, "nonce", agent)
    assert caught.value.condition == "invalid-mechanism"


# Inside SASL2

REQUEST = (
    "<authenticate xmlns='urn:xmpp:sasl:2' mechanism='SCRAM-SHA-256'>"
    "<initial-response>biws</initial-response>"
    f"<user-agent id='{AGENT}'><software>x</software></user-agent>"
    "<resume xmlns='urn:xmpp:sm:3' h='1' previd='p'/>"
    "<bind xmlns='urn:xmpp:bind:0'><tag>tag</tag><enable xmlns='urn:xmpp:sm:3'/></bind>"
    "<fast xmlns='urn:xmpp:fast:0' invalidate='1'/>"
    "<request-token xmlns='urn:xmpp:fast:0' mechanism='HT-SHA-256-NONE'/>"
    "</authenticate>"
)


def test_a_request_is_read() -> None:
    request = read_request(fromstring(REQUEST), EVERYTHING)
    assert request.resume is not None
    assert request.enable is not None
    assert replace(request, resume=None, enable=None) == Request(
        mechanism="SCRAM-SHA-256", initial="biws", agent=AGENT, bind=True, tag="tag",
        fast=True, invalidate=True, token="HT-SHA-256-NONE",
    )  # fmt: skip


def test_what_the_server_cannot_is_not_seen() -> None:
    request = read_request(fromstring(REQUEST), Abilities(sasl2=True))
    assert request == Request(mechanism="SCRAM-SHA-256", initial="biws", agent=AGENT)


def test_a_token_is_for_who_says_which_client_it_is() -> None:
    text = REQUEST.replace(f" id='{AGENT}'", "")
    assert read_request(fromstring(text), EVERYTHING).token == ""
    assert read_request(fromstring("<authenticate/>"), EVERYTHING).agent == ""


@pytest.mark.parametrize("agent", ["no uuid", "d4565fa7-4d72-1749-b3d3-740edbf87770"])
def test_a_client_is_a_uuid_of_version_4(agent: str) -> None:
    with pytest.raises(LoginRefusedError):
        read_request(fromstring(REQUEST.replace(AGENT, agent)), EVERYTHING)


def test_an_address_stays_and_says_nothing() -> None:
    accounts = modern()
    account = JID.parse("alice@demo.example")
    request = Request(mechanism="", initial="", agent=AGENT, tag="tag")
    resource = accounts.resource(account, request)
    assert resource == accounts.resource(account, request)
    assert resource.startswith("tag/")
    assert AGENT not in resource
    nameless = replace(request, agent="", tag="")
    one, other = (accounts.resource(account, nameless) for _ in range(2))
    assert one != other
    assert one.startswith("client/")


@pytest.mark.parametrize(
    ("asked", "rotate", "invalidate", "given"),
    [("", False, False, 0), ("HT-SHA-256-ENDP", False, False, 1), ("", True, False, 1),
     ("", True, True, 0), ("HT-SHA-256-ENDP", True, True, 1)],
)  # fmt: skip
def test_who_gets_a_token(asked: str, *, rotate: bool, invalidate: bool, given: int) -> None:
    accounts = modern()
    used = issue(accounts)
    request = Request(
        mechanism="HT-SHA-256-ENDP", initial="", agent=AGENT, invalidate=invalidate, token=asked
    )
    assert len(accounts.tokens.answer("alice", request, rotate=rotate)) == given
    if invalidate:
        assert refused(accounts, used) == "not-authorized"


def offer(abilities: Abilities, *hidden: str) -> str:
    listed = make_offer(modern(abilities=abilities), frozenset(hidden))
    return b"".join(map(serialise, listed)).decode()


SASL_1 = (
    "<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>SCRAM-SHA-256</mechanism>"
    "<mechanism>SCRAM-SHA-1</mechanism></mechanisms>"
)


@pytest.mark.parametrize(
    ("abilities", "hidden", "expected"),
    [
        (Abilities(), (), ""),
        (
            Abilities(sasl2=True),
            ("SCRAM-SHA-1",),
            "<authentication xmlns='urn:xmpp:sasl:2'><mechanism>SCRAM-SHA-256</mechanism>"
            "</authentication>",
        ),
        (
            Abilities(sasl2=True, bind2=True, tokens=("HT-SHA-256-NONE",)),
            ("SCRAM-SHA-256",),
            "<authentication xmlns='urn:xmpp:sasl:2'><mechanism>SCRAM-SHA-1</mechanism>"
            "<inline><bind xmlns='urn:xmpp:bind:0'/><fast xmlns='urn:xmpp:fast:0'>"
            "<mechanism>HT-SHA-256-NONE</mechanism></fast></inline></authentication>",
        ),
        (
            Abilities(sasl2=True, bind2=True, managed=True),
            ("SCRAM-SHA-256", "urn:xmpp:sm:3"),
            "<authentication xmlns='urn:xmpp:sasl:2'><mechanism>SCRAM-SHA-1</mechanism>"
            "<inline><bind xmlns='urn:xmpp:bind:0'><inline><feature var='urn:xmpp:sm:3'/>"
            "</inline></bind></inline></authentication>",
        ),
    ],
)
def test_what_is_offered(abilities: Abilities, hidden: tuple[str, ...], expected: str) -> None:
    first = SASL_1
    for name in hidden:
        first = first.replace(f"<mechanism>{name}</mechanism>", "")
    assert offer(abilities, *hidden) == first + expected


def test_channel_bindings_are_listed_unless_they_are_hidden() -> None:
    listed = "<channel-binding type='tls-server-end-point'/>"
    assert listed in offer(EVERYTHING)
    assert "sasl-channel-binding" not in offer(EVERYTHING, "tls-server-end-point")


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", ""), (b"v=x", "<additional-data>dj14</additional-data>")],
)
def test_a_success_says_who_it_is(data: bytes, expected: str) -> None:
    success = make_success(data, JID.parse("alice@demo.example/x"), [make("{x}y")])
    assert serialise(success).decode() == (
        f"<success xmlns='urn:xmpp:sasl:2'>{expected}<authorization-identifier>"
        "alice@demo.example/x</authorization-identifier><y xmlns='x'/></success>"
    )
