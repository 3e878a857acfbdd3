from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, fromstring

import pytest

from syncd.errors import ErrorType, StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import (
    IQ,
    LEAST_MAX_BYTES,
    MAX_ID,
    MAX_TEXT,
    PRESENCE,
    Limits,
    make_error,
    make_error_reply,
    make_iq,
    make_presence,
    read_error,
    read_from,
    read_iq,
    read_limits,
    read_stream_error,
)
from syncd.xmpp.xml import make, serialise

if TYPE_CHECKING:
    from syncd.xmpp.stanza import IqType

BOB = JID.parse("bob@example.org/pc")
QUERY = make("{urn:a}query")


def element(text: str) -> Element:
    """A stanza as a server would send it."""
    return fromstring(text.replace(" ", " xmlns='jabber:client' ", 1))


def error_stanza(inside: str, attributes: str = "type='cancel'") -> Element:
    return element(f"<iq type='error' from='bob@x/y'><error {attributes}>{inside}</error></iq>")


def defined(condition: str) -> str:
    return f"<{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>"


@pytest.mark.parametrize("kind", ["get", "set", "result", "error"])
def test_an_iq_is_read(kind: IqType) -> None:
    stanza = element(f"<iq type='{kind}' id='7' from='bob@example.org/pc'><q xmlns='u'/></iq>")
    iq = read_iq(stanza)
    assert (iq.type, iq.id, iq.sender, iq.element) == (kind, "7", BOB, stanza)
    assert iq.payload is stanza[0]


def test_the_payload_of_an_error_is_what_was_asked_not_why_it_was_refused() -> None:
    stanza = element(f"<iq type='error' id='7'><error>{defined('conflict')}</error><q/></iq>")
    payload = read_iq(stanza).payload
    assert payload is stanza[1]


def test_a_result_may_be_empty_and_from_nobody() -> None:
    iq = read_iq(element("<iq type='result' id='7'/>"))
    assert (iq.payload, iq.sender) == (None, None)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("<iq id='7'><q/></iq>", "bad-request"),
        ("<iq type='GET' id='7'><q/></iq>", "bad-request"),
        ("<iq type='get'><q/></iq>", "bad-request"),
        ("<iq type='get' id=''><q/></iq>", "bad-request"),
        (f"<iq type='get' id='{'7' * (MAX_ID + 1)}'><q/></iq>", "bad-request"),
        ("<iq type='get' id='7'/>", "bad-request"),
        ("<iq type='set' id='7'><q/><q/></iq>", "bad-request"),
        ("<iq type='get' id='7' from='@'><q/></iq>", "jid-malformed"),
    ],
)
def test_a_malformed_iq_is_refused(text: str, condition: str) -> None:
    with pytest.raises(StanzaError) as caught:
        read_iq(element(text))
    assert (caught.value.type, caught.value.condition) == (ErrorType.MODIFY, condition)


def test_the_sender_is_prepared() -> None:
    assert read_from(element("<presence from='BOB@Example.ORG/pc'/>")) == BOB
    assert read_from(element("<presence to='bob@example.org'/>")) is None


@pytest.mark.parametrize(
    ("stanza", "text"),
    [
        (
            make_iq("get", "7", BOB, QUERY),
            "<iq type='get' id='7' to='bob@example.org/pc'><query xmlns='urn:a'/></iq>",
        ),
        (make_iq("result", "7", None), "<iq type='result' id='7'/>"),
        (make_presence(), "<presence/>"),
        (
            make_presence("subscribe", BOB.bare),
            "<presence type='subscribe' to='bob@example.org'/>",
        ),
        (make_presence(priority=-1), "<presence><priority>-1</priority></presence>"),
    ],
)
def test_what_is_built_is_what_the_rfc_shows(stanza: Element, text: str) -> None:
    assert serialise(stanza).decode() == text


def test_an_error_says_type_condition_text_and_the_applications_own_condition() -> None:
    error = make_error(StanzaError(ErrorType.AUTH, "forbidden", "no", app="{urn:a}why"))
    assert serialise(error).decode() == (
        "<error type='auth'><forbidden xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>"
        "<text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'>no</text>"
        "<why xmlns='urn:a'/></error>"
    )


def test_an_error_needs_no_words_and_has_not_too_many() -> None:
    assert len(make_error(StanzaError(ErrorType.WAIT, "conflict"))) == 1
    assert len(make_error(StanzaError(ErrorType.WAIT, "conflict", "of \udcff"))) == 1
    (_, text) = make_error(StanzaError(ErrorType.WAIT, "conflict", "x" * 10_000))
    assert text.text == "x" * MAX_TEXT


@pytest.mark.parametrize(
    ("request_text", "reply"),
    [
        (
            "<iq type='get' id='7' from='bob@x/y'><q/></iq>",
            "<iq type='error' id='7' to='bob@x/y'>",
        ),
        ("<iq />", "<iq type='error'>"),
    ],
)
def test_even_a_broken_request_can_be_refused(request_text: str, reply: str) -> None:
    refusal = make_error_reply(
        element(request_text), StanzaError(ErrorType.MODIFY, "bad-request")
    )
    assert serialise(refusal).decode().startswith(f"{reply}<error type='modify'><bad-request")


def test_a_presence_is_refused_as_a_presence() -> None:
    assert make_error_reply(make(PRESENCE), StanzaError(ErrorType.WAIT, "gone")).tag == PRESENCE


def test_an_error_that_is_sent_is_read_the_same() -> None:
    sent = StanzaError(ErrorType.WAIT, "resource-constraint", "later", app="{urn:a}busy")
    read = read_error(make_error_reply(make(IQ), sent))
    assert (read.type, read.condition, read.text, read.app) == (
        ErrorType.WAIT,
        "resource-constraint",
        "later",
        "{urn:a}busy",
    )


@pytest.mark.parametrize(
    ("stanza", "kind", "condition"),
    [
        pytest.param(
            error_stanza(defined("item-not-found")), "cancel", "item-not-found", id="by the RFC"
        ),
        pytest.param(
            error_stanza(defined("forbidden") + defined("conflict")),
            "cancel",
            "forbidden",
            id="the first condition counts",
        ),
        pytest.param(
            error_stanza(defined("not-authorized"), ""), "auth", "not-authorized", id="no type"
        ),
        pytest.param(
            error_stanza(defined("undreamt-of"), "type='x'"),
            "cancel",
            "undreamt-of",
            id="unknown type and condition",
        ),
        pytest.param(
            error_stanza("", "code='503'"), "cancel", "service-unavailable", id="code alone"
        ),
        pytest.param(
            error_stanza("", "code='408'"), "wait", "remote-server-timeout", id="another code"
        ),
        pytest.param(
            error_stanza("", "code='999'"), "cancel", "undefined-condition", id="unknown code"
        ),
        pytest.param(
            element("<iq type='error' from='bob@x/y'/>"),
            "cancel",
            "undefined-condition",
            id="nothing",
        ),
    ],
)
def test_a_refusal_is_understood_however_little_it_says(
    stanza: Element, kind: str, condition: str
) -> None:
    error = read_error(stanza)
    assert (error.type, error.condition, error.by) == (kind, condition, "bob@x/y")


def test_the_refusers_words_are_kept_within_reason() -> None:
    words = "<text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'> busy </text>"
    assert read_error(error_stanza(defined("conflict") + words)).text == "busy"
    assert read_error(error_stanza(words.replace("busy", "x" * 9_999))).text == "x" * MAX_TEXT
    empty = "<text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>"
    assert read_error(error_stanza(defined("conflict") + empty)).text == ""
    assert (
        read_error(error_stanza("Service Unavailable", "code='503'")).text
        == "Service Unavailable"
    )
    assert read_error(error_stanza(words + "and more", "code='503'")).text == "busy"


def test_the_first_condition_of_the_application_counts() -> None:
    stanza = error_stanza("<a xmlns='urn:a'/><b xmlns='urn:b'/>" + defined("bad-request"))
    assert read_error(stanza).app == "{urn:a}a"


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("", Limits()),
        ("<max-bytes>262144</max-bytes>", Limits(max_bytes=262_144)),
        ("<idle-seconds> 1800 </idle-seconds>", Limits(idle_seconds=1800)),
        ("<max-bytes>1</max-bytes>", Limits(max_bytes=LEAST_MAX_BYTES)),
        ("<max-bytes>0</max-bytes><idle-seconds>0</idle-seconds>", Limits()),
        ("<max-bytes>-1</max-bytes><idle-seconds/>", Limits()),
        ("<max-bytes>1e3</max-bytes><idle-seconds>\u0663</idle-seconds>", Limits()),
        (f"<idle-seconds>{'9' * 5000}</idle-seconds>", Limits()),
        ("<max-bytes xmlns='urn:other'>20000</max-bytes>", Limits()),
    ],
)
def test_a_server_tells_what_it_takes(inside: str, expected: Limits) -> None:
    """XEP-0478; less than RFC 6120 section 13.12 lets it is not believed."""
    limits = f"<limits xmlns='urn:xmpp:stream-limits:0'>{inside}</limits>"
    assert read_limits(fromstring(f"<features>{limits}</features>")) == expected


def test_a_server_that_says_nothing_hears_of_us_when_there_is_something_to_say() -> None:
    assert read_limits(make("features")).speak_every == math.inf


@pytest.mark.parametrize(("idle", "seconds"), [(1, 1.0), (2, 1.0), (60, 30.0), (1801, 900.5)])
def test_it_hears_us_before_it_takes_us_for_gone(idle: int, seconds: float) -> None:
    assert Limits(idle_seconds=idle).speak_every == seconds


def test_what_is_too_long_for_it_is_kept_back() -> None:
    limits = Limits(max_bytes=10)
    limits.check(b"x" * 10)
    with pytest.raises(StanzaError, match="a stanza of 11 bytes, where our server takes 10"):
        limits.check(b"x" * 11)


def test_where_no_limit_is_told_it_is_the_least_that_there_is() -> None:
    """RFC 6120 section 13.12; one stanza too long would end the stream for everybody."""
    limits = Limits()
    limits.check(b"x" * LEAST_MAX_BYTES)
    with pytest.raises(StanzaError, match="a server need not take more than 10000"):
        limits.check(b"x" * (LEAST_MAX_BYTES + 1))


STREAMS = "urn:ietf:params:xml:ns:xmpp-streams"


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("", ("undefined-condition", "", "")),
        (f"<conflict xmlns='{STREAMS}'>x</conflict>", ("conflict", "", "")),
        (
            f"<text xmlns='{STREAMS}'> Too much </text><policy-violation xmlns='{STREAMS}'/>",
            ("policy-violation", "Too much", ""),
        ),
        (f"<reset xmlns='{STREAMS}'/><more xmlns='urn:a'>x</more>", ("reset", "", "")),
        (
            f"<see-other-host xmlns='{STREAMS}'> b.example.org:9 </see-other-host>",
            ("see-other-host", "", "b.example.org:9"),
        ),
    ],
)
def test_why_the_stream_ends_is_read(inside: str, expected: tuple[str, str, str]) -> None:
    """RFC 6120 section 4.9.2."""
    error = read_stream_error(fromstring(f"<error>{inside}</error>"))
    assert (error.condition, error.text, error.other_host) == expected


@pytest.mark.parametrize(
    ("condition", "words"),
    [("conflict", "another client"), ("policy-violation", "server limits"), ("reset", "")],
)
def test_what_the_user_can_do_about_it_is_said_in_words(condition: str, words: str) -> None:
    error = read_stream_error(fromstring(f"<error><{condition} xmlns='{STREAMS}'/></error>"))
    assert words in error.hint
    assert bool(words) == bool(error.hint)
