"""Conversations in the order of RFC 6120, and every way in which a server can break them."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given

from syncd.errors import (
    AuthenticationError,
    OfflineError,
    RemoteProtocolError,
    StanzaError,
    StreamError,
)
from syncd.xmpp import sm
from syncd.xmpp.jid import JID
from syncd.xmpp.login import Credentials
from syncd.xmpp.sasl import Token
from syncd.xmpp.sm import REQUEST_AFTER, StreamManagement
from syncd.xmpp.stanza import Limits, make_iq, make_presence
from syncd.xmpp.stream import (
    MAX_STANZA_BEFORE_LOGIN,
    Bound,
    ClientStream,
    Resumed,
    State,
    StreamEnded,
    TLSWanted,
)
from syncd.xmpp.xml import MAX_STANZA, make
from tests.support.strategies import cuts
from tests.support.wire import (
    ASK_ACK,
    AUTHENTICATION,
    BIND_FEATURE,
    C_AUTH,
    C_BIND,
    C_ENABLE,
    C_FOOTER,
    C_HEADER,
    C_HEADER_SECURE,
    C_RESPONSE,
    C_STARTTLS,
    CREDENTIALS,
    LAPTOP,
    LOGIN,
    MANAGED_LOGIN,
    NONCE,
    PASSWORD,
    S_BIND_FEATURES,
    S_BOUND,
    S_CHALLENGE,
    S_ENABLED,
    S_FOOTER,
    S_HEADER,
    S_PROCEED,
    S_STARTTLS_FEATURES,
    S_SUCCESS,
    SM_FEATURE,
    STARTTLS_FEATURE,
    USER,
    ack,
    features,
    kept,
    managed_stream,
    mechanisms,
    new_stream,
    open_stream,
    play,
    resumed,
    resuming_stream,
    sasl,
    told,
)

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from syncd.xmpp.stream import Event

S_SASL_FEATURES = features(mechanisms("SCRAM-SHA-1", "PLAIN"))


def stream_error(condition: str) -> str:
    """The error and the footer that the client is to send."""
    return (
        f"<stream:error><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>"
        f"</stream:error>{C_FOOTER}"
    )


def in_state(state: State) -> ClientStream:
    """A stream that has come this far, with nothing left to send."""
    stream = new_stream(secure=state in (State.AUTH, State.BIND, State.OPEN))
    script = {
        State.HEADER: f"C: {C_HEADER}",
        State.FEATURES: f"C: {C_HEADER}\nS: {S_HEADER}",
        State.STARTTLS: f"C: {C_HEADER}\nS: {S_HEADER}{S_STARTTLS_FEATURES}\nC: {C_STARTTLS}",
        State.AUTH: f"C: {C_HEADER_SECURE}\nS: {S_HEADER}{S_SASL_FEATURES}\nC: {C_AUTH}",
        State.BIND: LOGIN.partition(f"S: {S_BOUND}")[0],
        State.OPEN: LOGIN,
    }
    play(stream, script[state])
    assert stream.state is state
    return stream


def ends(events: list[Event]) -> StreamEnded:
    """The last event, which must be the end."""
    assert isinstance(events[-1], StreamEnded)
    return events[-1]


# Section 4: streams


def test_the_whole_way_from_connection_to_footer() -> None:
    events = play(
        new_stream(secure=False),
        f"""
        C: {C_HEADER}
        S: {S_HEADER}
        S: {S_STARTTLS_FEATURES}
        C: {C_STARTTLS}
        S: {S_PROCEED}
        {LOGIN}
        S: <presence from='bob@example.org/pc'/>
        S: {S_FOOTER}
        C: {C_FOOTER}
        """,
    )
    assert told(events) == [
        "TLS wanted",
        "key wanted",
        "bound user@example.org/laptop",
        "<presence from='bob@example.org/pc'/>",
        "ended in peace",
    ]


@given(cuts)
def test_no_cut_of_the_bytes_changes_the_conversation(sizes: list[int]) -> None:
    script = f"""
        C: {C_HEADER}
        S: {S_HEADER}{S_STARTTLS_FEATURES}
        C: {C_STARTTLS}
        S: {S_PROCEED}
        {LOGIN}
        S: <message><body>a</body></message> <presence/><iq id='7'/>{S_FOOTER}
        C: {C_FOOTER}
        """
    cut = told(play(new_stream(secure=False), script, sizes=sizes))
    assert cut == told(play(new_stream(secure=False), script))


def test_our_address_is_not_shown_outside_tls() -> None:
    """Section 4.7.1: the client's ``from`` waits until nobody can read along."""
    assert b"user" not in new_stream(secure=False).data_to_send()
    assert b"from='user@example.org'" in new_stream(secure=True).data_to_send()


@pytest.mark.parametrize("version", ["", "version='0.9'", "version='2.0'", "version='x'"])
def test_a_server_without_xmpp_1_0_is_refused(version: str) -> None:
    """Section 4.7.5."""
    events = play(
        new_stream(secure=False),
        f"""
        C: {C_HEADER}
        S: {S_HEADER.replace("id='s1' version='1.0'", version)}
        C: {C_FOOTER}
        """,
    )
    assert told(events) == ["ended by RemoteProtocolError: the server speaks no XMPP 1.0"]


def test_sign_of_life_is_a_space_and_nothing_behind_our_footer() -> None:
    stream = open_stream()
    stream.keep_alive()
    assert stream.data_to_send() == b" "
    stream.close()
    stream.keep_alive()
    assert stream.data_to_send() == b"</stream:stream>"


def test_we_close_and_the_server_answers() -> None:
    """Section 4.4; what comes before its footer is still delivered."""
    stream = open_stream()
    stream.close()
    stream.close()
    assert not stream.is_open
    events = play(stream, f"C: {C_FOOTER}\nS: <presence/>{S_FOOTER}")
    assert told(events) == ["<presence/>", "ended in peace"]


def test_we_close_and_the_server_hangs_up() -> None:
    stream = open_stream()
    stream.close()
    assert told(play(stream, f"C: {C_FOOTER}\nS: (hangs up)")) == ["ended in peace"]


def test_a_footer_before_the_login_is_no_peaceful_end() -> None:
    events = play(in_state(State.FEATURES), f"S: {S_FOOTER}\nC: {C_FOOTER}")
    assert told(events) == ["ended by OfflineError: the server hung up"]


@pytest.mark.parametrize(
    "state",
    [State.HEADER, State.FEATURES, State.STARTTLS, State.AUTH, State.BIND, State.OPEN],
)
def test_the_server_may_hang_up_at_any_time(state: State) -> None:
    events = play(in_state(state), "S: (hangs up)")
    assert told(events) == ["ended by OfflineError: the server hung up"]


@pytest.mark.parametrize(
    "state", [State.FEATURES, State.STARTTLS, State.AUTH, State.BIND, State.OPEN]
)
def test_a_stream_error_may_come_at_any_time(state: State) -> None:
    """Section 4.9."""
    events = play(
        in_state(state),
        f"""
        S: <stream:error>
        S: <conflict xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>
        S: <text xmlns='urn:ietf:params:xml:ns:xmpp-streams'>Replaced </text>
        S: <other xmlns='urn:a'/></stream:error>{S_FOOTER}
        C: {C_FOOTER}
        """,
    )
    error = ends(events).error
    assert isinstance(error, StreamError)
    assert (error.condition, error.text) == ("conflict", "Replaced")
    assert len(events) == 1


def test_a_stream_error_may_say_nothing() -> None:
    error = ends(play(open_stream(), f"S: <stream:error/>\nC: {C_FOOTER}")).error
    assert isinstance(error, StreamError)
    assert (error.condition, error.text) == ("undefined-condition", "")


@pytest.mark.parametrize(
    "state",
    [State.HEADER, State.FEATURES, State.STARTTLS, State.AUTH, State.BIND, State.OPEN],
)
@pytest.mark.parametrize(
    ("text", "condition"),
    [("<!-- x -->", "restricted-xml"), ("<a></b>", None), ("\x01>", "not-well-formed")],
)
def test_malformed_xml_is_answered_with_the_stream_error(
    state: State, text: str, condition: str | None
) -> None:
    """Section 4.9.1.1: our error first, the footer behind it, and StreamEnded last."""
    if condition is None:
        # The first element is refused as the root of the stream, any other by its end tag.
        condition = "bad-format" if state is State.HEADER else "not-well-formed"
    events = play(in_state(state), f"S: {text}\nC: {stream_error(condition)}")
    (what,) = told(events)
    assert what.startswith("ended by RemoteProtocolError: the server sent no proper XMPP: ")
    assert what.endswith(f"[{condition}]")


def test_after_the_end_nothing_is_read_any_more() -> None:
    stream = open_stream()
    play(stream, f"S: {S_FOOTER}\nC: {C_FOOTER}")
    assert play(stream, "S: <presence/>\nS: <!-- x -->\nS: (hangs up)") == []
    stream.close()
    assert stream.data_to_send() == b""


def test_what_stands_behind_a_stream_error_is_not_read() -> None:
    text = "<stream:error/><presence/><!-- x -->"
    assert len(play(open_stream(), f"S: {text}\nC: {C_FOOTER}")) == 1


# Section 5: STARTTLS


@pytest.mark.parametrize(
    "offered",
    [
        features(),
        features(mechanisms("PLAIN", "SCRAM-SHA-1")),
        features(BIND_FEATURE),
        features("<starttls xmlns='urn:other'/>"),
        features(f"<a xmlns='urn:a'>{STARTTLS_FEATURE}</a>"),
    ],
)
def test_without_starttls_no_credential_ever_leaves(offered: str) -> None:
    stream = new_stream(secure=False, allow_plain=True)
    events = play(
        stream,
        f"""
        C: {C_HEADER}
        S: {S_HEADER}{offered}
        C: {C_FOOTER}
        """,
    )
    assert "offers no STARTTLS" in told(events)[0]
    error = ends(events).error
    assert error is not None
    assert "enable TLS" in error.hint


@pytest.mark.parametrize(
    "injected",
    [
        S_HEADER + features(mechanisms("PLAIN")),
        "<presence from='mallory@example.org'/>",
        "<!-- x -->",
        " ",
        "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>",
        S_FOOTER,
    ],
)
def test_what_was_injected_behind_proceed_is_dropped(injected: str) -> None:
    """CVE-2011-0411: it was never protected by the TLS that it is to be read in."""
    stream = in_state(State.STARTTLS)
    assert stream.receive_data((S_PROCEED + injected).encode()) == [TLSWanted()]
    assert stream.data_to_send() == b""
    stream.tls_started()
    assert told(play(stream, LOGIN)) == ["key wanted", "bound user@example.org/laptop"]


def test_a_token_begun_before_tls_does_not_go_on_inside() -> None:
    stream = in_state(State.STARTTLS)
    assert stream.receive_data((S_PROCEED + "<presence id='").encode()) == [TLSWanted()]
    stream.tls_started()
    assert told(play(stream, LOGIN))[-1] == "bound user@example.org/laptop"


def test_the_server_may_fail_to_start_tls() -> None:
    """Section 5.4.2.2."""
    events = play(
        in_state(State.STARTTLS),
        f"""
        S: <failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>
        C: {C_FOOTER}
        """,
    )
    assert told(events) == ["ended by RemoteProtocolError: the server could not start TLS"]


def test_inside_tls_starttls_is_not_asked_again() -> None:
    offered = features(STARTTLS_FEATURE, mechanisms("SCRAM-SHA-1"))
    script = f"C: {C_HEADER_SECURE}\nS: {S_HEADER}{offered}\nC: {C_AUTH}"
    assert play(new_stream(secure=True), script) == []


# Section 6: SASL


def test_plain_is_used_only_if_the_user_allows_it() -> None:
    offered = features(mechanisms("PLAIN"))
    events = play(
        new_stream(secure=True, allow_plain=True),
        f"""
        C: {C_HEADER_SECURE}
        S: {S_HEADER}{offered}
        C: {sasl("auth", f"{chr(0)}user{chr(0)}{PASSWORD}", mechanism="PLAIN")}
        S: <success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>
        C: {C_HEADER_SECURE}
        """,
    )
    assert events == []
    events = play(
        new_stream(secure=True),
        f"C: {C_HEADER_SECURE}\nS: {S_HEADER}{offered}\nC: {C_FOOTER}",
    )
    assert "only PLAIN" in told(events)[0]


@pytest.mark.parametrize(
    "offered", [features(), features(mechanisms("X", "")), S_BIND_FEATURES]
)
def test_a_server_without_a_mechanism_is_refused(offered: str) -> None:
    script = f"C: {C_HEADER_SECURE}\nS: {S_HEADER}{offered}\nC: {C_FOOTER}"
    (what,) = told(play(new_stream(secure=True), script))
    assert what.startswith("ended by AuthenticationError: the server offers no way to log in")


def test_the_servers_proof_may_come_as_a_challenge() -> None:
    """RFC 4422 section 3.7: then the success is empty."""
    events = play(
        in_state(State.AUTH),
        f"""
        S: {S_CHALLENGE}
        C: {C_RESPONSE}
        S: {S_SUCCESS.replace("success", "challenge")}
        C: <response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>=</response>
        S: <success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>
        C: {C_HEADER_SECURE}
        """,
    )
    assert told(events) == ["key wanted"]


@pytest.mark.parametrize(
    "success",
    [
        "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>",
        "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>=</success>",
        sasl("success", "v=AAAApqV8S7suAoZWja4dJRkFsKQ="),
        sasl("challenge", "v=AAAApqV8S7suAoZWja4dJRkFsKQ="),
    ],
)
def test_a_success_without_the_servers_proof_is_refused(success: str) -> None:
    events = play(
        in_state(State.AUTH),
        f"""
        S: {S_CHALLENGE}
        C: {C_RESPONSE}
        S: {success}
        C: {C_FOOTER}
        """,
    )
    assert told(events)[1:] == [
        "ended by AuthenticationError: the server could not prove that it knows the password"
    ]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (S_SUCCESS, "could not prove"),
        (sasl("challenge", f"r={NONCE},s=QSXC,i=4096"), "did not answer our nonce"),
        (sasl("challenge", f"r={NONCE}x,s=QSXC,i=1"), "asks for 1 SCRAM iterations"),
        ("<challenge xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>#</challenge>", "no base64"),
        (
            "<challenge xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>\u00fc</challenge>",
            "no base64",
        ),
    ],
)
def test_a_server_that_plays_scram_wrongly_gets_no_proof(said: str, reason: str) -> None:
    (what,) = told(play(in_state(State.AUTH), f"S: {said}\nC: {C_FOOTER}"))
    assert what.startswith("ended by AuthenticationError: ")
    assert reason in what


def test_two_challenges_at_once_get_no_two_proofs() -> None:
    stream = in_state(State.AUTH)
    events = stream.receive_data((S_CHALLENGE + S_CHALLENGE).encode())
    assert told(events) == [
        "key wanted",
        "ended by AuthenticationError: the server sent a second SCRAM challenge",
    ]
    stream.key_derived(b"too late")
    assert stream.data_to_send().decode() == C_FOOTER


@pytest.mark.parametrize("again", [1, 2])
def test_a_challenge_behind_the_last_one_is_out_of_turn(again: int) -> None:
    """Behind PLAIN, which has none, and behind the server's proof."""
    stream = new_stream(secure=True, allow_plain=True)
    if again == 1:
        plain = f"S: {S_HEADER}{features(mechanisms('PLAIN'))}"
        auth = sasl("auth", f"{chr(0)}user{chr(0)}{PASSWORD}", mechanism="PLAIN")
        play(stream, f"C: {C_HEADER_SECURE}\n{plain}\nC: {auth}")
    else:
        stream = in_state(State.AUTH)
        proof = S_SUCCESS.replace("success", "challenge")
        answer = "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>=</response>"
        play(stream, f"S: {S_CHALLENGE}\nC: {C_RESPONSE}\nS: {proof}\nC: {answer}")
    assert told(play(stream, f"S: {S_CHALLENGE}\nC: {C_FOOTER}")) == [
        "ended by RemoteProtocolError: the server sent a SASL challenge out of turn"
    ]


@pytest.mark.parametrize(
    ("inside", "what"),
    [
        (
            "<not-authorized/>",
            "AuthenticationError: the server refused the login of user@example.org "
            "[not-authorized]",
        ),
        (
            "<text>Bad </text><account-disabled/>",
            "AuthenticationError: the server refused the login of user@example.org "
            "[account-disabled]: Bad",
        ),
        (
            "",
            "AuthenticationError: the server refused the login of user@example.org "
            "[not-authorized]",
        ),
        (
            "<temporary-auth-failure/><text>database</text>",
            "OfflineError: the server cannot log us in just now: database "
            "[temporary-auth-failure]",
        ),
    ],
)
def test_the_server_may_refuse_the_login(inside: str, what: str) -> None:
    """Section 6.5; what is temporary is no fault of the user."""
    events = play(
        in_state(State.AUTH),
        f"""
        S: <failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>{inside}</failure>
        C: {C_FOOTER}
        """,
    )
    assert told(events) == [f"ended by {what}"]


def test_what_stands_behind_the_success_is_dropped() -> None:
    """The stream begins anew, and with it the parser."""
    stream = in_state(State.AUTH)
    play(stream, f"S: {S_CHALLENGE}\nC: {C_RESPONSE}")
    assert stream.receive_data(f"{S_SUCCESS}\n<presence/>{S_FOOTER}".encode()) == []
    assert stream.data_to_send().decode() == C_HEADER_SECURE
    events = play(stream, f"S: {S_HEADER}{S_BIND_FEATURES}\nC: {C_BIND}\nS: {S_BOUND}")
    assert told(events) == ["bound user@example.org/laptop"]


# Section 7: resource binding


def test_the_server_chooses_a_resource_if_we_do_not() -> None:
    stream = new_stream(USER, secure=True)
    bind = C_BIND.replace("><resource>laptop</resource></bind>", "/>")
    play(stream, LOGIN.partition(f"C: {C_BIND}")[0] + f"C: {bind}")
    bound = S_BOUND.replace("/laptop", "/srv-7")
    assert told(play(stream, f"S: {bound}")) == ["bound user@example.org/srv-7"]
    assert stream.jid == JID.parse("user@example.org/srv-7")
    assert stream.is_open


def test_the_server_may_bind_another_resource_than_the_one_asked_for() -> None:
    events = play(in_state(State.BIND), f"S: {S_BOUND.replace('/laptop', '/laptop-2')}")
    assert told(events) == ["bound user@example.org/laptop-2"]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (
            S_BOUND.replace("user@", "admin@"),
            "the server bound admin@example.org/laptop, not a",
        ),
        (S_BOUND.replace("example.org", "evil.org"), "bound user@evil.org/laptop, not a"),
        (S_BOUND.replace("/laptop", ""), "the server bound user@example.org, not a resource"),
        (S_BOUND.replace("user@example.org", "@"), "the server bound no JID"),
        (S_BOUND.replace("user@example.org/laptop", ""), "the server bound no JID"),
        (S_BOUND.replace("id='bind'", "id='7'"), "the server did not bind a resource"),
        (S_BOUND.replace("type='result'", "type='set'"), "the server did not bind a resource"),
        ("<iq type='result' id='bind'/>", "the server did not bind a resource"),
    ],
)
def test_only_a_resource_of_our_own_account_is_taken(result: str, reason: str) -> None:
    (what,) = told(play(in_state(State.BIND), f"S: {result}\nC: {C_FOOTER}"))
    assert re.match("ended by RemoteProtocolError: ", what)
    assert reason in what


def test_the_bind_may_be_refused() -> None:
    """Section 7.6.2."""
    events = play(
        in_state(State.BIND),
        f"""
        S: <iq type='error' id='bind'><error type='wait'>
        S: <resource-constraint xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>
        C: {C_FOOTER}
        """,
    )
    error = ends(events).error
    assert isinstance(error, StanzaError)
    assert error.condition == "resource-constraint"
    assert str(error) == "refused: the server gives us no resource [resource-constraint]"


CONFLICT = (
    "<iq type='error' id='bind'><error type='cancel'>"
    "<conflict xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>"
)
C_BIND_ANY = C_BIND.replace("><resource>laptop</resource></bind>", "/>")


def test_where_another_client_keeps_our_resource_the_server_makes_one_up() -> None:
    """Section 7.7.2.2, the second way: on the same stream, and without another login."""
    stream = in_state(State.BIND)
    bound = S_BOUND.replace("/laptop", "/srv-7")
    events = play(stream, f"S: {CONFLICT}\nC: {C_BIND_ANY}\nS: {bound}")
    assert told(events) == ["bound user@example.org/srv-7"]
    assert stream.is_open


def test_a_server_with_a_conflict_about_its_own_choice_is_not_asked_for_ever() -> None:
    script = f"S: {CONFLICT}\nC: {C_BIND_ANY}\nS: {CONFLICT}\nC: {C_FOOTER}"
    error = ends(play(in_state(State.BIND), script)).error
    assert isinstance(error, StanzaError)
    assert error.condition == "conflict"


def test_features_without_bind_are_refused_after_the_login() -> None:
    script = LOGIN.partition(f"S: {S_HEADER}{S_BIND_FEATURES}")[0]
    stream = new_stream(secure=True)
    play(stream, script)
    events = play(stream, f"S: {S_HEADER}{features()}\nC: {C_FOOTER}")
    assert told(events) == [
        "ended by RemoteProtocolError: the server offers no resource binding"
    ]


# Section 8: stanzas


@pytest.mark.parametrize(
    ("state", "element"),
    [
        (State.FEATURES, "<iq/>"),
        (State.FEATURES, S_PROCEED),
        (State.STARTTLS, S_STARTTLS_FEATURES),
        (State.STARTTLS, "<presence/>"),
        (State.STARTTLS, S_SUCCESS),
        (State.AUTH, "<message/>"),
        (State.AUTH, S_SASL_FEATURES),
        (State.AUTH, S_PROCEED),
        (State.BIND, "<presence/>"),
        (State.BIND, S_SUCCESS),
        (State.OPEN, "<foo/>"),
    ],
)
def test_what_comes_out_of_turn_ends_the_stream(state: State, element: str) -> None:
    answer = stream_error("unsupported-stanza-type")
    (what,) = told(play(in_state(state), f"S: {element}\nC: {answer}"))
    assert what.startswith("ended by RemoteProtocolError: the server sent <")
    assert what.endswith(f"/> while in {state.name}")


def test_elements_of_extensions_that_we_did_not_enable_are_ignored() -> None:
    text = "<r xmlns='urn:xmpp:sm:3'/><presence/><stream:features/>"
    assert told(play(open_stream(), f"S: {text}")) == ["<presence/>"]


def test_what_we_did_not_ask_for_is_not_looked_at_on_an_open_stream() -> None:
    assert told(play(open_stream(), "S: <c xmlns='urn:other'/><presence/>")) == ["<presence/>"]


def test_a_stanza_is_sent_as_it_is() -> None:
    stream = open_stream()
    stream.send(make_presence(priority=-1))
    stream.send(make_presence())
    sent = b"<presence><priority>-1</priority></presence><presence/>"
    assert stream.data_to_send() == sent
    assert stream.data_to_send() == b""


@pytest.mark.parametrize("state", [State.HEADER, State.AUTH, State.BIND])
def test_sending_too_early_is_our_own_mistake(state: State) -> None:
    stream = in_state(state)
    assert not stream.is_open
    with pytest.raises(AssertionError, match=state.name):
        stream.send(make_presence())


def test_nothing_is_sent_behind_our_footer() -> None:
    stream = open_stream()
    before = stream.closing
    stream.close()
    assert (before, stream.closing) == (False, True)
    with pytest.raises(AssertionError, match="footer"):
        stream.send(make_presence())


def test_tls_starts_only_when_it_was_asked_for() -> None:
    with pytest.raises(AssertionError):
        in_state(State.FEATURES).tls_started()


def test_a_key_that_nobody_asked_for_goes_nowhere() -> None:
    for stream in (in_state(State.FEATURES), open_stream()):
        stream.key_derived(b"key")
        assert stream.data_to_send() == b""
    plain = new_stream(secure=True, allow_plain=True)
    plain.receive_data(f"{S_HEADER}{features(mechanisms('PLAIN'))}".encode())
    plain.data_to_send()
    plain.key_derived(b"key")
    assert plain.data_to_send() == b""


def test_a_stranger_may_say_less_than_the_server_that_we_know() -> None:
    """Before the login a stanza is limited more tightly."""
    long = "x" * (4 * MAX_STANZA_BEFORE_LOGIN)
    early = in_state(State.FEATURES)
    (what,) = told(early.receive_data(f"<stream:features>{long}</stream:features>".encode()))
    assert "[policy-violation]" in what
    assert isinstance(early.data_to_send(), bytes)
    late = open_stream()
    assert len(late.receive_data(f"<message><body>{long}</body></message>".encode())) == 1
    (end,) = late.receive_data(
        f"<message><body>{'x' * 2 * MAX_STANZA}</body></message>".encode()
    )
    assert isinstance(end, StreamEnded)
    assert isinstance(end.error, RemoteProtocolError)
    assert late.data_to_send().decode() == stream_error("policy-violation")


def test_hanging_up_is_told_once() -> None:
    stream = open_stream()
    (end,) = stream.receive_data(b"")
    assert isinstance(end, StreamEnded)
    assert isinstance(end.error, OfflineError)
    assert stream.receive_data(b"") == []


# XEP-0388 and XEP-0386: what comes behind the login is inside it.

AGENT = "d4565fa7-4d72-4749-b3d3-740edbf87770"
SM = "urn:xmpp:sm:3"
FEATURES_2 = (
    "<stream:features><authentication xmlns='urn:xmpp:sasl:2'><mechanism>PLAIN</mechanism>"
    f"<inline>%s<sm xmlns='{SM}'/></inline></authentication></stream:features>"
)
BIND_2 = f"<bind xmlns='urn:xmpp:bind:0'><inline><feature var='{SM}'/></inline></bind>"
SUCCESS_2 = (
    "<success xmlns='urn:xmpp:sasl:2'>"
    "<authorization-identifier>%s</authorization-identifier>%s</success>"
)
ENABLED = f"<enabled xmlns='{SM}' id='s1' resume='true' max='60'/>"
BOUND_2 = f"<bound xmlns='urn:xmpp:bind:0'>{ENABLED}</bound>"
FULL = "user@example.org/syncd.1"


def stream_2(
    features_2: str = BIND_2,
    *,
    resume: StreamManagement | None = None,
    resumes: bool = True,
) -> ClientStream:
    """A stream that has said its <authenticate/>."""
    offer = FEATURES_2 % features_2
    if not resumes:
        offer = offer.replace(f"<sm xmlns='{SM}'/>", "")
    stream = ClientStream(
        JID.parse("user@example.org"),
        Credentials(password=PASSWORD, nonce="n", allow_plain=True, agent=AGENT),
        secure=True,
        resume=resume,
    )
    stream.data_to_send()
    assert stream.receive_data((S_HEADER + offer).encode()) == []
    return stream


def former_session() -> StreamManagement:
    """A session with a stanza that the server has not acknowledged."""
    former = StreamManagement(JID.parse("user@example.org/old"))
    former.id = "s0"
    former.sent(b"<presence/>")
    return former


def test_one_exchange_logs_in_binds_and_enables_stream_management() -> None:
    stream = stream_2()
    first = stream.data_to_send()
    assert first.startswith(b"<authenticate xmlns='urn:xmpp:sasl:2' mechanism='PLAIN'>")
    assert b"<bind xmlns='urn:xmpp:bind:0'>" in first
    events = stream.receive_data((SUCCESS_2 % (FULL, BOUND_2)).encode())
    assert events == [Bound(JID.parse(FULL))]
    assert stream.data_to_send() == b""  # no new header, no bind, no enable
    assert stream.sm is not None
    assert (stream.sm.id, stream.sm.max_seconds, stream.mechanism) == ("s1", 60, "PLAIN")
    # The features of the open stream, then the first stanza that counts.
    stream.receive_data(b"<stream:features/><presence/>")
    assert stream.sm.handled == 1


def test_one_exchange_resumes_a_session() -> None:
    former = former_session()
    stream = stream_2(resume=former)
    assert f"<resume xmlns='{SM}' h='0' previd='s0'/>".encode() in stream.data_to_send()
    resumed = f"<resumed xmlns='{SM}' h='0' previd='s0'/>"
    events = stream.receive_data((SUCCESS_2 % ("user@example.org", resumed)).encode())
    assert events == [Resumed()]
    assert stream.sm is former
    assert stream.jid == former.jid
    assert stream.data_to_send().startswith(b"<presence/>")


def test_a_session_that_is_forgotten_is_bound_anew_in_the_same_exchange() -> None:
    former = former_session()
    stream = stream_2(resume=former)
    stream.data_to_send()
    failed = f"<failed xmlns='{SM}' h='1'/>"
    events = stream.receive_data((SUCCESS_2 % (FULL, failed + BOUND_2)).encode())
    assert events == [Bound(JID.parse(FULL))]
    assert stream.sm is not None
    assert stream.sm is not former
    assert stream.data_to_send() == b""
    assert former.unacked == ()


@pytest.mark.parametrize("inside", ["", f"<failed xmlns='{SM}'><item-not-found/></failed>"])
def test_a_server_may_bind_without_managing_the_stream(inside: str) -> None:
    """XEP-0198 section 9.1: "unable to enable" is told inside, or not at all."""
    stream = stream_2()
    bound = f"<bound xmlns='urn:xmpp:bind:0'>{inside}</bound>"
    events = stream.receive_data((SUCCESS_2 % (FULL, bound)).encode())
    assert events == [Bound(JID.parse(FULL))]
    assert stream.is_open
    assert stream.sm is None


def test_a_session_that_the_login_cannot_resume_is_not_mixed_up_with_the_new_one() -> None:
    former = former_session()
    stream = stream_2(resume=former, resumes=False)
    assert b"<resume" not in stream.data_to_send()
    events = stream.receive_data((SUCCESS_2 % (FULL, BOUND_2)).encode())
    assert events == [Bound(JID.parse(FULL))]
    assert stream.sm is not None
    assert (stream.sm.id, stream.sm.unacked) == ("s1", ())
    assert former.unacked == (b"<presence/>",)


def test_a_server_with_sasl2_but_not_bind_2_is_bound_as_ever() -> None:
    stream = stream_2("")
    assert b"<bind" not in stream.data_to_send()
    assert stream.receive_data((SUCCESS_2 % ("user@example.org", "")).encode()) == []
    stream.receive_data(
        b"<stream:features><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/></stream:features>"
    )
    assert stream.state is State.BIND
    assert b"<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>" in stream.data_to_send()


TOKEN = Token(
    account="user@example.org",
    mechanism="HT-SHA-256-NONE",
    secret="s3cret",
    expires=datetime(2026, 12, 1, tzinfo=UTC),
)


def test_a_token_that_is_refused_gives_way_to_the_password_on_the_same_stream() -> None:
    credentials = Credentials(
        password=PASSWORD, nonce="n", allow_plain=True, agent=AGENT, keeps_token=True,
        token=TOKEN,
    )  # fmt: skip
    stream = ClientStream(USER, credentials, secure=True)
    assert (stream.token, stream.sasl2) == (TOKEN, False)
    offer = FEATURES_2 % (
        "<fast xmlns='urn:xmpp:fast:0'><mechanism>HT-SHA-256-NONE</mechanism></fast>" + BIND_2
    )
    stream.receive_data((S_HEADER + offer).encode())
    assert (stream.mechanism, stream.sasl2) == ("HT-SHA-256-NONE", True)
    assert b"<fast xmlns='urn:xmpp:fast:0'/></authenticate>" in stream.data_to_send()
    refusal = (
        "<failure xmlns='urn:xmpp:sasl:2'>"
        "<credentials-expired xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/></failure>"
    )
    assert stream.receive_data(refusal.encode()) == []
    assert (stream.mechanism, stream.token) == ("PLAIN", None)
    assert b"<request-token xmlns='urn:xmpp:fast:0'" in stream.data_to_send()
    token = "<token xmlns='urn:xmpp:fast:0' token='new' expiry='2026-12-01T00:00:00Z'/>"
    success = SUCCESS_2 % (FULL, BOUND_2 + token)
    assert stream.receive_data(success.encode()) == [Bound(JID.parse(FULL))]
    assert stream.token == replace(TOKEN, secret="new")


def test_a_session_may_be_resumed_behind_a_login_that_cannot_carry_it() -> None:
    former = former_session()
    stream = stream_2(resume=former, resumes=False)
    assert b"urn:xmpp:bind:0" not in stream.data_to_send()
    stream.receive_data((SUCCESS_2 % ("user@example.org", "")).encode())
    features_2 = (
        "<stream:features><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>"
        f"<sm xmlns='{SM}'/></stream:features>"
    )
    assert stream.receive_data(features_2.encode()) == []
    assert f"<resume xmlns='{SM}' h='0' previd='s0'/>" == stream.data_to_send().decode()


def test_a_second_step_of_the_login_is_told_in_words() -> None:
    stream = stream_2()
    (ended,) = stream.receive_data(b"<continue xmlns='urn:xmpp:sasl:2'/>")
    assert isinstance(ended, StreamEnded)
    assert isinstance(ended.error, AuthenticationError)
    assert "more than a password" in str(ended.error)


# XEP-0198: stream management


def ping(number: int) -> Element:
    """A stanza that differs from the others."""
    return make_iq("get", str(number), None, make("{urn:xmpp:ping}ping"))


def wire(*numbers: int) -> str:
    """Such stanzas as they are sent."""
    return "".join(
        f"<iq type='get' id='{number}'><ping xmlns='urn:xmpp:ping'/></iq>" for number in numbers
    )


def broken(*, sent: int, acked: int = 0, handled: int = 0) -> ClientStream:
    """A managed stream whose connection broke after so many stanzas."""
    stream = managed_stream()
    for number in range(sent):
        stream.send(ping(number))
    stream.data_to_send()
    stream.receive_data(("<presence/>" * handled + ack(acked)).encode())
    stream.receive_data(b"")
    return stream


@given(cuts)
def test_a_stream_is_managed_where_the_server_offers_it(sizes: list[int]) -> None:
    stream = new_stream(secure=True)
    script = f"""{AUTHENTICATION}
        S: {S_HEADER}{features(BIND_FEATURE, SM_FEATURE)}
        C: {C_BIND}
        S: {S_BOUND}
        C: {C_ENABLE}
        S: <presence/>{S_ENABLED}<presence/>{ASK_ACK}<message/>
        C: {ack(1)}
        S: {ASK_ACK}
        C: {ack(2)}
    """
    assert len(play(stream, script, sizes=sizes)) == 5
    assert stream.sm is not None
    assert (stream.sm.id, stream.sm.max_seconds) == ("s1", 600)


def test_our_stanzas_count_from_enable_on_and_the_servers_from_enabled_on() -> None:
    """Section 3; what is sent in between counts on our side only."""
    stream = new_stream(secure=True)
    play(
        stream,
        f"""{AUTHENTICATION}
        S: {S_HEADER}{features(BIND_FEATURE, SM_FEATURE)}
        C: {C_BIND}
        S: {S_BOUND}
        C: {C_ENABLE}
        """,
    )
    stream.send(ping(1))
    script = f"C: {wire(1)}\nS: <presence/>{S_ENABLED}{ack(1)}{ASK_ACK}\nC: {ack(0)}"
    assert told(play(stream, script)) == ["<presence/>"]
    assert stream.sm is not None
    assert (stream.sm.sent_count, stream.sm.unacked) == (1, ())


@pytest.mark.parametrize(
    "answer",
    ["<enabled xmlns='urn:xmpp:sm:3'/>", "<enabled xmlns='urn:xmpp:sm:3' id='s1' max='9'/>"],
)
def test_a_server_may_only_count(answer: str) -> None:
    stream = new_stream(secure=True)
    play(stream, MANAGED_LOGIN.replace(S_ENABLED, answer))
    assert stream.sm is not None
    assert stream.sm.id == ""
    assert play(stream, f"S: {ASK_ACK}\nC: {ack(0)}") == []


def test_a_server_may_refuse_to_count() -> None:
    stream = new_stream(secure=True)
    refused = """<failed xmlns='urn:xmpp:sm:3'><unexpected-request
        xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>"""
    play(stream, MANAGED_LOGIN.replace(S_ENABLED, refused.replace("\n", " ")))
    assert stream.sm is None
    assert told(play(stream, f"S: {ASK_ACK}{ack(7)}<presence/>")) == ["<presence/>"]
    stream.send(ping(1))
    assert stream.data_to_send().decode() == wire(1)


@pytest.mark.parametrize("managed", [True, False])
def test_what_nobody_asked_for_is_not_enabled(managed: bool) -> None:
    stream = managed_stream() if managed else open_stream()
    (what,) = told(play(stream, f"S: {S_ENABLED}\nC: {C_FOOTER}"))
    assert what.endswith("the server enabled stream management out of turn")


def test_acknowledgements_are_asked_for_now_and_then() -> None:
    stream = managed_stream()
    for number in range(2 * REQUEST_AFTER):
        stream.send(ping(number))
    first, second = range(REQUEST_AFTER), range(REQUEST_AFTER, 2 * REQUEST_AFTER)
    expected = wire(*first) + ASK_ACK + wire(*second) + ASK_ACK
    assert stream.data_to_send().decode() == expected


def test_our_count_is_told_first_and_once() -> None:
    """Section 4: as soon as possible; the last answer is one to all that asked before."""
    stream = managed_stream()
    stream.send(ping(1))
    for count in range(1, 4):
        stream.receive_data(f"<presence/>{ASK_ACK}".encode())
        assert stream.queued == len(ack(count) + wire(1))
    stream.send(ping(2))
    assert stream.data_to_send().decode() == ack(3) + wire(1, 2)
    assert play(stream, f"S: {ASK_ACK}\nC: {ack(3)}") == []


def test_what_is_queued_can_be_taken_element_by_element() -> None:
    """So that what comes first is never put inside of another one."""
    stream = managed_stream()
    for number in (1, 2):
        stream.send(ping(number))
    first = stream.data_to_send(1).decode()
    stream.receive_data(ASK_ACK.encode())
    rest = [stream.data_to_send(most).decode() for most in (1, 1, 1)]
    assert [first, *rest] == [wire(1), ack(0), wire(2), ""]
    assert stream.queued == 0


def test_our_last_count_stands_in_front_of_our_footer() -> None:
    """Section 4; but no counts stand behind it, or behind why the stream ends."""
    stream = managed_stream()
    stream.send(ping(1))
    stream.receive_data(b"<presence/><presence/>")
    stream.close()
    stream.receive_data(f"<presence/>{ASK_ACK}".encode())
    assert stream.data_to_send().decode() == wire(1) + ack(2) + C_FOOTER
    stream = managed_stream()
    play(stream, f"S: <presence/>{S_FOOTER}\nC: {ack(1)}{C_FOOTER}")
    stream = managed_stream()
    play(stream, f"S: <presence/><a/>\nC: {stream_error('unsupported-stanza-type')}")


@pytest.mark.parametrize("late", ["", S_ENABLED])
def test_a_server_that_does_not_count_hears_no_count(late: str) -> None:
    """Before it enables that, or after it has taken it back."""
    stream = new_stream(secure=True)
    play(stream, MANAGED_LOGIN.replace(f"S: {S_ENABLED}", ""))
    stream.receive_data(f"{late}<presence/><failed xmlns='urn:xmpp:sm:3'/>".encode())
    stream.receive_data(b"<presence/>")
    stream.close()
    assert stream.data_to_send().decode() == C_FOOTER


@pytest.mark.parametrize("h", [3, 2**32 - 1])
def test_a_server_that_acknowledges_what_was_never_sent_is_left(h: int) -> None:
    """Section 6: the stream error says which count was wrong."""
    stream = managed_stream()
    stream.send(ping(1))
    stream.send(ping(2))
    stream.data_to_send()
    too_high = f"<handled-count-too-high xmlns='urn:xmpp:sm:3' h='{h}' send-count='2'/>"
    expected = stream_error("undefined-condition").replace("</stream:error>", too_high, 1)
    expected = expected.replace(too_high, f"{too_high}</stream:error>")
    assert told(play(stream, f"S: {ack(h)}\nC: {expected}")) == [
        f"ended by RemoteProtocolError: the server acknowledges {h} stanzas, "
        "but only 2 were sent"
    ]
    assert stream.sm is not None
    assert stream.sm.id == ""


def test_a_server_that_acknowledges_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm, "MAX_UNACKED", 3)
    stream = managed_stream()
    for number in range(4):
        stream.send(ping(number))
    assert not stream.is_open
    assert stream.data_to_send().decode() == wire(0, 1, 2, 3) + C_FOOTER
    assert told(stream.receive_data(S_FOOTER.encode())) == [
        "ended by RemoteProtocolError: the server acknowledges nothing any more"
    ]


@pytest.mark.parametrize(("sent", "acked", "h"), [(0, 0, 0), (4, 0, 0), (4, 1, 3), (4, 1, 4)])
def test_a_session_goes_on_with_what_the_server_has_not_got(
    sent: int, acked: int, h: int
) -> None:
    """Section 5: that alone, in order, before anything new."""
    former = broken(sent=sent, acked=acked, handled=7)
    stream = resuming_stream(kept(former))
    again = wire(*range(h, sent)) + ASK_ACK
    events = play(stream, f"S: {resumed(h)}<presence/>{ASK_ACK}\nC: {ack(8)}{again}")
    assert told(events) == ["resumed", "<presence/>"]
    assert (stream.is_open, stream.jid, stream.sm) == (True, former.jid, former.sm)
    stream.send(ping(99))
    assert stream.data_to_send().decode().startswith(wire(99))
    assert play(stream, f"S: {ack(sent + 1)}") == []
    assert stream.sm is not None
    assert stream.sm.unacked == ()


def test_a_session_goes_on_as_often_as_it_must() -> None:
    """What was sent again and lost again is sent again."""
    first = broken(sent=3, acked=1)
    second = resuming_stream(kept(first), said=resumed(1))
    assert second.data_to_send().decode() == wire(1, 2) + ASK_ACK
    second.send(ping(3))
    second.receive_data(b"")
    third = resuming_stream(kept(second), said=resumed(2))
    assert third.data_to_send().decode() == wire(2, 3) + ASK_ACK


def test_what_is_sent_between_two_connections_goes_out_behind_the_rest() -> None:
    former = broken(sent=2)
    former.send_later(ping(2))
    former.send_later(ping(3))
    assert former.data_to_send() == b""
    stream = resuming_stream(kept(former), said=resumed(1))
    assert stream.data_to_send().decode() == wire(1, 2, 3) + ASK_ACK


@pytest.mark.parametrize("h", ["", " h='2'", " h='x'"])
def test_a_forgotten_session_is_followed_by_a_new_one_on_the_same_stream(h: str) -> None:
    """Section 5; Prosody tells what it had handled, and that changes nothing."""
    former = broken(sent=3)
    stream = resuming_stream(kept(former))
    failed = f"""<failed xmlns='urn:xmpp:sm:3'{h}><item-not-found
        xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>""".replace("\n", " ")
    events = play(
        stream,
        f"""
        S: {failed}
        C: {C_BIND}
        S: {S_BOUND}
        C: {C_ENABLE}
        S: {S_ENABLED.replace("s1", "s2")}
        """,
    )
    assert told(events) == ["bound user@example.org/laptop"]
    assert stream.sm is not None
    assert stream.sm is not former.sm
    assert (stream.sm.id, stream.sm.unacked) == ("s2", ())


def test_a_server_that_counts_no_more_gets_a_new_session() -> None:
    former = broken(sent=3)
    stream = ClientStream(LAPTOP, CREDENTIALS, secure=True, resume=former.sm)
    assert told(play(stream, LOGIN))[-1] == "bound user@example.org/laptop"
    assert stream.sm is None


def test_a_server_that_resumes_with_a_wrong_count_is_not_asked_again() -> None:
    former = broken(sent=3, acked=1)
    stream = resuming_stream(kept(former))
    (what,) = told(stream.receive_data(resumed(4).encode()))
    assert what.endswith("the server acknowledges 4 stanzas, but only 3 were sent")
    assert "send-count='3'" in stream.data_to_send().decode()
    assert former.sm is not None
    assert former.sm.id == ""


@pytest.mark.parametrize(
    "element", [S_ENABLED, ASK_ACK, "<presence/>", "<resumed xmlns='urn:xmpp:sm:3'/>"]
)
def test_what_comes_instead_of_the_resumption_ends_the_stream(element: str) -> None:
    (what,) = told(resuming_stream(kept(broken(sent=1))).receive_data(element.encode()))
    assert what.startswith("ended by RemoteProtocolError: the server ")


# Limits of the server (XEP-0478), and where it sends us


LIMITS_FEATURE = (
    "<limits xmlns='urn:xmpp:stream-limits:0'><max-bytes>20000</max-bytes>"
    "<idle-seconds>60</idle-seconds></limits>"
)


def test_no_stanza_is_longer_than_the_server_takes() -> None:
    """It would end the stream with policy-violation."""
    stream = new_stream(secure=True)
    login = LOGIN.replace(BIND_FEATURE, f"{BIND_FEATURE}{SM_FEATURE}{LIMITS_FEATURE}")
    play(stream, f"{login}\nC: {C_ENABLE}\nS: {S_ENABLED}")
    assert stream.limits == Limits(max_bytes=20_000, idle_seconds=60)
    long = make_iq("set", "1", None, make("{urn:a}a", text="x" * 20_000))
    with pytest.raises(StanzaError, match=r"where our server takes 20000 \[policy-violation\]"):
        stream.send(long)
    with pytest.raises(StanzaError, match="where our server takes"):
        stream.send_later(long)
    assert stream.sm is not None
    assert (stream.data_to_send(), stream.sm.unacked) == (b"", ())


def test_nothing_waits_for_a_stream_that_cannot_be_resumed() -> None:
    with pytest.raises(AssertionError):
        open_stream().send_later(ping(1))


def test_a_server_may_send_us_elsewhere_before_it_asks_for_anything() -> None:
    """RFC 6120 section 4.9.3.19."""
    text = (
        "<stream:error><see-other-host xmlns='urn:ietf:params:xml:ns:xmpp-streams'>"
        "[2001:db8::7]:9222</see-other-host></stream:error>"
    )
    error = ends(play(in_state(State.FEATURES), f"S: {text}\nC: {C_FOOTER}")).error
    assert isinstance(error, StreamError)
    assert (error.condition, error.other_host) == ("see-other-host", "[2001:db8::7]:9222")
