"""The server's stream, spoken to in bytes."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest

from syncd.demo.login import Accounts
from syncd.demo.stream import (
    Bound,
    Event,
    ServerStream,
    StanzaReceived,
    State,
    StreamEnded,
    TLSWanted,
)
from syncd.errors import ErrorType, StanzaError
from syncd.xmpp.xml import serialise

if TYPE_CHECKING:
    from syncd.xmpp.jid import JID

HEADER = (
    b"<?xml version='1.0'?><stream:stream to='demo.example' version='1.0'"
    b" xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"
)
STARTTLS = b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
NS_SASL = "urn:ietf:params:xml:ns:xmpp-sasl"
BIND = b"<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></iq>"


def auth(password: str, mechanism: str = "PLAIN") -> bytes:
    message = base64.b64encode(f"\0alice\0{password}".encode()).decode()
    return f"<auth xmlns='{NS_SASL}' mechanism='{mechanism}'>{message}</auth>".encode()


def bind(account: JID, resource: str) -> JID:
    if resource == "full":
        raise StanzaError(ErrorType.WAIT, "resource-constraint")
    return account.with_resource(resource or "made-up")


def make_stream(state: State = State.HEADER) -> ServerStream:
    """A stream led to a state; what it said on the way is thrown away."""
    accounts = Accounts("demo.example", {"alice": "pw"}, token=bytes, mechanisms=("PLAIN",))
    stream = ServerStream(accounts, token=lambda: "token", bind=bind, max_stanza=20_000)
    steps = [
        (State.STARTTLS, [HEADER]),
        (State.TLS, [STARTTLS]),
        (State.AUTH, [HEADER]),
        (State.BIND, [auth("pw"), HEADER]),
        (State.OPEN, [BIND]),
    ]
    for reached, data in steps:
        if stream.state is state:
            break
        if reached is State.AUTH:
            stream.tls_started()
        for piece in data:
            stream.receive_data(piece)
        assert stream.state is reached
    stream.data_to_send()
    return stream


def test_before_tls_only_starttls_is_offered() -> None:
    stream = make_stream()
    assert stream.receive_data(HEADER) == []
    assert stream.data_to_send() == (
        b"<?xml version='1.0'?><stream:stream from='demo.example' id='token' version='1.0'"
        b" xml:lang='en' xmlns='jabber:client'"
        b" xmlns:stream='http://etherx.jabber.org/streams'>"
        b"<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/>"
        b"</starttls></stream:features>"
    )


def test_starttls_is_agreed_to() -> None:
    stream = make_stream(State.STARTTLS)
    assert stream.receive_data(STARTTLS) == [TLSWanted()]
    assert stream.data_to_send() == b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"


def test_what_is_glued_to_starttls_is_never_looked_at() -> None:
    """The injection of CVE-2011-0411."""
    stream = make_stream(State.STARTTLS)
    assert stream.receive_data(STARTTLS + auth("pw")) == [TLSWanted()]
    stream.tls_started()
    assert stream.state is State.HEADER
    assert stream.data_to_send() == b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"


def test_passwords_before_tls_are_refused() -> None:
    stream = make_stream(State.STARTTLS)
    assert stream.receive_data(auth("pw")) == []
    expected = f"<failure xmlns='{NS_SASL}'><encryption-required/></failure>"
    assert stream.data_to_send().decode() == expected


def test_after_tls_mechanisms_are_offered() -> None:
    stream = make_stream(State.TLS)
    stream.tls_started()
    stream.receive_data(HEADER)
    mechanisms = f"<mechanisms xmlns='{NS_SASL}'><mechanism>PLAIN</mechanism></mechanisms>"
    assert mechanisms in stream.data_to_send().decode()
    assert stream.state is State.AUTH


def test_direct_tls_begins_with_mechanisms() -> None:
    accounts = Accounts("demo.example", {}, token=bytes)
    stream = ServerStream(accounts, token=str, bind=bind, secure=True)
    stream.receive_data(HEADER)
    assert stream.state is State.AUTH


def test_success_restarts_the_stream_and_offers_bind() -> None:
    stream = make_stream(State.AUTH)
    assert stream.receive_data(auth("pw")) == []
    assert stream.data_to_send().decode() == f"<success xmlns='{NS_SASL}'/>"
    stream.receive_data(HEADER)
    assert b"<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>" in stream.data_to_send()


def test_a_wrong_password_may_be_corrected() -> None:
    stream = make_stream(State.AUTH)
    stream.receive_data(auth("wrong"))
    expected = f"<failure xmlns='{NS_SASL}'><not-authorized/></failure>"
    assert stream.data_to_send().decode() == expected
    stream.receive_data(auth("pw"))
    assert stream.data_to_send().decode() == f"<success xmlns='{NS_SASL}'/>"


def test_the_fourth_wrong_password_ends_the_stream() -> None:
    stream = make_stream(State.AUTH)
    events = [event for _ in range(4) for event in stream.receive_data(auth("wrong"))]
    assert events == [StreamEnded("policy-violation")]


@pytest.mark.parametrize(
    ("data", "condition"),
    [
        (auth("pw", "KERBEROS"), "invalid-mechanism"),
        (f"<auth xmlns='{NS_SASL}' mechanism='PLAIN'>!</auth>".encode(), "incorrect-encoding"),
        (f"<response xmlns='{NS_SASL}'/>".encode(), "malformed-request"),
        (f"<abort xmlns='{NS_SASL}'/>".encode(), "aborted"),
    ],
)
def test_logins_that_make_no_sense(data: bytes, condition: str) -> None:
    stream = make_stream(State.AUTH)
    assert stream.receive_data(data) == []
    expected = f"<failure xmlns='{NS_SASL}'><{condition}/></failure>"
    assert stream.data_to_send().decode() == expected


def test_a_second_login_inside_a_login_ends_the_stream() -> None:
    stream = make_stream(State.AUTH)
    stream.receive_data(f"<auth xmlns='{NS_SASL}' mechanism='PLAIN'/>".encode())
    assert stream.data_to_send().decode() == f"<challenge xmlns='{NS_SASL}'>=</challenge>"
    assert stream.receive_data(auth("pw")) == [StreamEnded("unsupported-stanza-type")]


def test_a_login_in_two_messages() -> None:
    stream = make_stream(State.AUTH)
    stream.receive_data(f"<auth xmlns='{NS_SASL}' mechanism='PLAIN'/>".encode())
    stream.data_to_send()
    stream.receive_data(auth("pw").replace(b"auth", b"response"))
    assert stream.data_to_send().decode() == f"<success xmlns='{NS_SASL}'/>"


def test_bind_gives_the_address_and_opens_the_stream() -> None:
    stream = make_stream(State.BIND)
    presence = b"<presence/>"
    events = stream.receive_data(BIND + presence)
    match events:
        case [Bound(), StanzaReceived(stanza)]:
            assert serialise(stanza) == presence
        case _:
            pytest.fail(f"{events}")
    assert b"<jid>alice@demo.example/made-up</jid>" in stream.data_to_send()


@pytest.mark.parametrize(
    ("data", "condition"),
    [
        (BIND.replace(b" id='b'", b""), b"<bad-request"),
        (
            BIND.replace(b"bind'/>", b"bind'><resource>full</resource></bind>"),
            b"<resource-constraint",
        ),
    ],
)
def test_a_bind_may_be_refused_and_tried_again(data: bytes, condition: bytes) -> None:
    stream = make_stream(State.BIND)
    assert stream.receive_data(data) == []
    assert condition in stream.data_to_send()
    assert stream.receive_data(BIND) == [Bound()]


@pytest.mark.parametrize(
    ("state", "data", "condition"),
    [
        (State.HEADER, HEADER.replace(b"demo.", b"other."), "host-unknown"),
        (State.HEADER, HEADER.replace(b"n='1.0'", b"n='0.9'"), "unsupported-version"),
        (State.HEADER, b"GET / HTTP/1.1\r\n\r\n<>", "not-well-formed"),
        (State.HEADER, b"\x16\x03\x01 a TLS handshake", "not-well-formed"),
        (State.HEADER, b"<html>", "bad-format"),
        (State.STARTTLS, b"<presence/>", "not-authorized"),
        (State.AUTH, b"<message/>", "not-authorized"),
        (State.AUTH, b"<x xmlns='other'/>", "unsupported-stanza-type"),
        (State.AUTH, b"<auth>" + b" " * 40_000 + b">", "policy-violation"),
        (State.BIND, b"<presence/>", "not-authorized"),
        (State.BIND, BIND.replace(b"xmpp-bind", b"other"), "not-authorized"),
        (State.OPEN, b"<r xmlns='urn:xmpp:sm:3'/>", "unsupported-stanza-type"),
        (State.OPEN, b"<message></presence>", "not-well-formed"),
        (State.OPEN, b"<!-- -->", "restricted-xml"),
        (State.OPEN, b"<message><body>" + b"x" * 40_000 + b"</body>", "policy-violation"),
    ],
)
def test_what_ends_the_stream(state: State, data: bytes, condition: str) -> None:
    stream = make_stream(state)
    assert stream.receive_data(data) == [StreamEnded(condition)]
    said = stream.data_to_send().decode()
    error = f"<{condition} xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>"
    assert said.endswith(f"<stream:error>{error}</stream:error></stream:stream>")
    assert said.startswith("<?xml") == (state is State.HEADER)
    assert stream.state is State.CLOSED


def test_a_header_may_come_late_and_in_pieces() -> None:
    stream = make_stream()
    for piece in (b" \n", HEADER[:5], HEADER[5:]):
        assert stream.receive_data(piece) == []
    assert stream.state is State.STARTTLS


def test_a_header_without_addressee_is_for_us() -> None:
    stream = make_stream()
    stream.receive_data(HEADER.replace(b" to='demo.example'", b""))
    assert stream.state is State.STARTTLS


def test_the_clients_footer_is_answered() -> None:
    stream = make_stream(State.OPEN)
    assert stream.receive_data(b"</stream:stream>") == [StreamEnded("")]
    assert stream.data_to_send() == b"</stream:stream>"


def test_hanging_up_ends_the_stream() -> None:
    assert make_stream(State.OPEN).receive_data(b"") == [StreamEnded("")]


def test_nothing_is_sent_or_received_after_the_end() -> None:
    stream = make_stream(State.OPEN)
    stream.close("conflict")
    stream.close("reset")
    stream.send(b"<message/>")
    assert stream.queued == len(stream.data_to_send().partition(b"</stream:stream>")[0]) + 16
    assert stream.receive_data(b"<message/>") == []


def test_what_is_sent_is_kept_in_order() -> None:
    stream = make_stream(State.OPEN)
    stream.send(b"<message id='1'/>")
    stream.send(b"<message id='2'/>")
    assert stream.data_to_send() == b"<message id='1'/><message id='2'/>"
    assert stream.queued == 0


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_cut_of_the_bytes_does_not_matter(size: int) -> None:
    stream = make_stream(State.OPEN)
    data = b"<iq type='get' id='1'><q xmlns='x'>text</q></iq> <presence/></stream:stream>"
    events: list[Event] = []
    for start in range(0, len(data), size):
        events += stream.receive_data(data[start : start + size])
    assert [type(event) for event in events] == [StanzaReceived, StanzaReceived, StreamEnded]
