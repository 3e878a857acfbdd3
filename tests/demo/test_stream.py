"""The server's stream, spoken to in bytes."""

from __future__ import annotations

import base64

import pytest

from syncd.demo.login import EVERYTHING, Abilities, Accounts
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
from syncd.xmpp.jid import JID
from syncd.xmpp.sm import MAX_UNACKED, StreamManagement
from syncd.xmpp.xml import serialise

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


# What is beyond RFC 6120: SASL2 (XEP-0388) and stream management (XEP-0198).

NS_SASL2 = "urn:xmpp:sasl:2"
SM = "xmlns='urn:xmpp:sm:3'"
AGENT = "d4565fa7-4d72-4749-b3d3-740edbf87770"
ENABLED = f"<enabled {SM} id='token' resume='true' max='600'/>"
ENABLE = f"<enable {SM} resume='true'/>".encode()
BIND_2 = f"<bind xmlns='urn:xmpp:bind:0'><tag>tag</tag><enable {SM} resume='1'/></bind>"
NO_SESSION = (
    f"<failed {SM}><item-not-found xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>"
)
END_OF_SUCCESS = "</success><stream:features></stream:features>"


def authenticate(*inside: str, password: str = "pw", mechanism: str = "PLAIN") -> bytes:
    message = base64.b64encode(f"\0alice\0{password}".encode()).decode()
    initial = f"<initial-response>{message}</initial-response>"
    return (
        f"<authenticate xmlns='{NS_SASL2}' mechanism='{mechanism}'>{initial}"
        f"<user-agent id='{AGENT}'/>{''.join(inside)}</authenticate>"
    ).encode()


def modern_stream(
    former: StreamManagement | None = None, abilities: Abilities = EVERYTHING
) -> ServerStream:
    """A stream that has offered its ways to log in, by SASL2 as well."""

    def resume(account: JID, previous: str) -> StreamManagement:
        if former is None or (str(account), previous) != ("alice@demo.example", former.id):
            raise StanzaError(ErrorType.CANCEL, "item-not-found")
        return former

    accounts = Accounts(
        "demo.example", {"alice": "pw"}, token=bytes, mechanisms=("PLAIN",), abilities=abilities
    )
    stream = ServerStream(
        accounts, token=lambda: "token", bind=bind, secure=True, resume=resume
    )
    stream.receive_data(HEADER)
    stream.data_to_send()
    return stream


def former_session() -> StreamManagement:
    former = StreamManagement(JID.parse("alice@demo.example/old"))
    former.id = "former"
    for number in range(3):
        former.sent(f"<message id='{number}'/>".encode())
    return former


def managed_stream() -> ServerStream:
    """A stream whose stanzas are counted."""
    stream = modern_stream()
    assert stream.receive_data(authenticate(BIND_2)) == [Bound()]
    stream.data_to_send()
    return stream


def who(jid: str) -> str:
    return f"<authorization-identifier>{jid}</authorization-identifier>"


def said(stream: ServerStream) -> str:
    return stream.data_to_send().decode()


def test_sasl2_is_offered_beside_sasl() -> None:
    stream = ServerStream(
        Accounts("demo.example", {}, token=bytes, abilities=EVERYTHING),
        token=str,
        bind=bind,
        secure=True,
        hidden=frozenset({NS_SASL}),
    )
    stream.receive_data(HEADER)
    offer = said(stream)
    assert f"<authentication xmlns='{NS_SASL2}'>" in offer
    assert "<mechanisms" not in offer


def test_a_login_that_asks_for_nothing_binds_as_ever() -> None:
    stream = modern_stream()
    assert stream.receive_data(authenticate()) == []
    success = f"<success xmlns='{NS_SASL2}'>{who('alice@demo.example')}</success>"
    answer = said(stream)
    assert answer.startswith(f"{success}<stream:features><bind xmlns=")
    assert f"<sm {SM}/>" in answer
    assert stream.receive_data(BIND) == [Bound()]


def test_a_login_binds_and_is_counted_inside() -> None:
    stream = modern_stream()
    assert stream.receive_data(authenticate(BIND_2)) == [Bound()]
    answer = said(stream)
    bound = f"<bound xmlns='urn:xmpp:bind:0'>{ENABLED}</bound>"
    assert "<authorization-identifier>alice@demo.example/tag/" in answer
    assert answer.endswith(bound + END_OF_SUCCESS)
    assert stream.state is State.OPEN


def test_a_token_comes_with_the_success() -> None:
    stream = modern_stream()
    asked = "<request-token xmlns='urn:xmpp:fast:0' mechanism='HT-SHA-256-NONE'/>"
    stream.receive_data(authenticate(asked))
    assert "<token xmlns='urn:xmpp:fast:0' token=" in said(stream)


def test_a_bind_that_cannot_be_done_inside_is_left_to_be_tried_again() -> None:
    stream = modern_stream()
    stream._bind = lambda _, __: bind(JID.parse("alice@demo.example"), "full")
    assert stream.receive_data(authenticate(BIND_2)) == []
    assert "<bound" not in said(stream)
    assert stream.state is State.BIND


def test_a_session_goes_on_inside_the_login() -> None:
    former = former_session()
    stream = modern_stream(former)
    resume = f"<resume {SM} h='1' previd='former'/>"
    assert stream.receive_data(authenticate(resume, BIND_2)) == [Bound()]
    assert said(stream) == (
        f"<success xmlns='{NS_SASL2}'>{who('alice@demo.example')}"
        f"<resumed {SM} previd='former' h='0'/></success><message id='1'/><message id='2'/>"
    )
    assert stream.management.kept is former


def test_a_session_that_is_not_known_is_bound_anew_inside_the_login() -> None:
    stream = modern_stream()
    resume = f"<resume {SM} h='1' previd='former'/>"
    assert stream.receive_data(authenticate(resume, BIND_2)) == [Bound()]
    answer = said(stream)
    assert NO_SESSION in answer
    assert ENABLED in answer


def test_a_session_goes_on_behind_the_login() -> None:
    stream = modern_stream(former_session())
    stream.receive_data(authenticate())
    stream.data_to_send()
    assert stream.receive_data(f"<resume {SM} h='0' previd='other'/>".encode()) == []
    assert said(stream) == NO_SESSION
    assert stream.receive_data(f"<resume {SM} h='3' previd='former'/>".encode()) == [Bound()]
    assert said(stream) == f"<resumed {SM} previd='former' h='0'/>"


@pytest.mark.parametrize("inside", [True, False])
def test_who_got_more_than_was_sent_is_cut_off(*, inside: bool) -> None:
    stream = modern_stream(former_session())
    resume = f"<resume {SM} h='4' previd='former'/>"
    if not inside:
        stream.receive_data(authenticate())
    data = authenticate(resume) if inside else resume.encode()
    assert stream.receive_data(data) == [StreamEnded("undefined-condition")]
    assert f"<handled-count-too-high {SM} h='4' send-count='3'/>" in said(stream)
    assert not stream.resumable


@pytest.mark.parametrize(
    ("data", "condition"),
    [
        (authenticate(password="wrong"), "not-authorized"),
        (authenticate(mechanism="OTHER"), "invalid-mechanism"),
        (authenticate().replace(AGENT.encode(), b"none"), "malformed-request"),
        (f"<response xmlns='{NS_SASL2}'/>".encode(), "malformed-request"),
    ],
)
def test_refusals_of_sasl2(data: bytes, condition: str) -> None:
    stream = modern_stream()
    assert stream.receive_data(data) == []
    ns = NS_SASL if data.startswith(b"<response") else NS_SASL2
    inner = "" if ns == NS_SASL else f" xmlns='{NS_SASL}'"
    assert said(stream) == f"<failure xmlns='{ns}'><{condition}{inner}/></failure>"
    assert stream.receive_data(authenticate(BIND_2)) == [Bound()]


def test_a_login_in_two_messages_by_sasl2() -> None:
    stream = modern_stream()
    bare = f"<authenticate xmlns='{NS_SASL2}' mechanism='PLAIN'/>"
    stream.receive_data(bare.encode())
    assert said(stream) == f"<challenge xmlns='{NS_SASL2}'>=</challenge>"
    message = base64.b64encode(b"\0alice\0pw").decode()
    response = f"<response xmlns='%s'>{message}</response>"
    stream.receive_data((response % NS_SASL2).encode())
    assert said(stream).startswith(f"<success xmlns='{NS_SASL2}'>")


@pytest.mark.parametrize(
    "tail", [f"<abort xmlns='{NS_SASL2}'/>", f"<response xmlns='{NS_SASL}'/>"]
)
def test_a_login_by_sasl2_may_end_early(tail: str) -> None:
    stream = modern_stream()
    stream.receive_data(f"<authenticate xmlns='{NS_SASL2}' mechanism='PLAIN'/>{tail}".encode())
    assert f"<failure xmlns='{NS_SASL2}'>" in said(stream)


@pytest.mark.parametrize(
    ("abilities", "before"),
    [
        (Abilities(), b""),
        (EVERYTHING, authenticate().partition(b"<initial")[0] + b"</authenticate>"),
    ],
)
def test_sasl2_where_it_may_not_come_ends_the_stream(
    abilities: Abilities, before: bytes
) -> None:
    stream = modern_stream(abilities=abilities)
    stream.receive_data(before or b" ")
    assert stream.receive_data(authenticate()) == [StreamEnded("unsupported-stanza-type")]


# Counting


def test_both_directions_are_counted() -> None:
    stream = managed_stream()
    stream.receive_data(b"<message/><presence/>")
    stream.receive_data(f"<r {SM}/>".encode())
    assert said(stream) == f"<a {SM} h='2'/>"
    for number in range(5):
        stream.send(f"<message id='{number}'/>".encode())
    assert said(stream).endswith(f"<message id='4'/><r {SM}/>")
    assert stream.receive_data(f"<a {SM} h='5'/>".encode()) == []
    assert stream.management.kept is not None
    assert stream.management.kept.unacked == ()


def test_counting_begins_when_the_client_asks_for_it() -> None:
    stream = modern_stream()
    stream.receive_data(authenticate() + BIND)
    stream.data_to_send()
    stream.send(b"<message/>")
    stream.data_to_send()
    stream.receive_data(ENABLE)
    assert said(stream) == ENABLED
    assert stream.management.kept is not None
    assert stream.management.kept.sent_count == 0


@pytest.mark.parametrize("data", [f"<r {SM}/>", f"<a {SM} h='0'/>"])
def test_who_has_not_enabled_it_may_not_count(data: str) -> None:
    stream = modern_stream()
    stream.receive_data(authenticate() + BIND)
    assert stream.receive_data(data.encode()) == [StreamEnded("unsupported-stanza-type")]


@pytest.mark.parametrize("h", ["1", "many"])
def test_acknowledging_what_was_never_sent_ends_the_session(h: str) -> None:
    stream = managed_stream()
    data = f"<a {SM} h='{h}'/>".encode()
    assert stream.receive_data(data) == [StreamEnded("undefined-condition")]
    assert not stream.resumable


def test_what_is_sent_to_a_broken_stream_waits_for_its_successor() -> None:
    stream = managed_stream()
    stream.receive_data(b"")
    assert stream.resumable
    stream.send(b"<message/>")
    assert stream.data_to_send() == b""
    assert stream.management.kept is not None
    assert stream.management.kept.unacked == (b"<message/>",)


@pytest.mark.parametrize("how", ["footer", "lose then close"])
def test_a_stream_that_was_closed_is_not_resumed(how: str) -> None:
    stream = managed_stream()
    if how == "footer":
        stream.receive_data(b"</stream:stream>")
    else:
        stream.lose()
        assert stream.resumable
        stream.close()
    assert not stream.resumable
    stream.send(b"<message/>")
    assert stream.management.kept is not None
    assert stream.management.kept.unacked == ()


def test_a_client_that_acknowledges_nothing_is_given_up() -> None:
    stream = managed_stream()
    for _ in range(MAX_UNACKED + 1):
        stream.send(b"<message/>")
    assert b"<policy-violation" in stream.data_to_send()
    assert stream.state is State.CLOSED
    assert not stream.resumable
