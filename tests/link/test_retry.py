"""When to come back, where to, and as whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import (
    AuthenticationError,
    ErrorType,
    OfflineError,
    RemoteProtocolError,
    StanzaError,
    StreamError,
    SyncdError,
)
from syncd.link.retry import (
    BACK_OFF_LAST,
    BACK_OFF_LOGIN,
    BACK_OFF_LOGIN_LAST,
    DEFAULT_RESUME,
    MAX_RESUME,
    Pauses,
    back_off,
    is_of_network,
    other_resource,
    other_server,
    resume_within,
)
from syncd.xmpp.jid import JID
from syncd.xmpp.sm import StreamManagement

LAPTOP = JID.parse("user@example.org/laptop")


@pytest.mark.parametrize(
    ("failures", "problem", "jitter", "seconds"),
    [
        (0, None, 1.0, 1.0),
        (1, None, 1.0, 1.0),
        (1, None, 0.0, 0.5),
        (2, OfflineError("x"), 1.0, 2.0),
        (3, StreamError("system-shutdown"), 0.5, 3.0),
        (8, OfflineError("x"), 1.0, BACK_OFF_LAST),
        (10**9, OfflineError("x"), 1.0, BACK_OFF_LAST),
        (1, AuthenticationError("x"), 1.0, BACK_OFF_LOGIN),
        (99, AuthenticationError("x"), 0.0, BACK_OFF_LOGIN_LAST / 2),
        (0, StreamError("conflict"), 1.0, BACK_OFF_LAST),
        (99, StreamError("conflict"), 1.0, BACK_OFF_LOGIN_LAST),
        (1, StreamError("policy-violation"), 0.0, BACK_OFF_LAST / 2),
        (2, StreamError("policy-violation"), 1.0, BACK_OFF_LAST * 2),
        (2, StanzaError(ErrorType.CANCEL, "conflict"), 1.0, BACK_OFF_LAST * 2),
    ],
)
def test_the_time_between_attempts_doubles_within_bounds(
    failures: int, problem: SyncdError | None, jitter: float, seconds: float
) -> None:
    assert back_off(failures, problem, jitter) == seconds


@pytest.mark.parametrize(
    ("problem", "good", "first"),
    [
        (OfflineError("x"), BACK_OFF_LAST + 1, 1.0),
        (StreamError("policy-violation"), BACK_OFF_LOGIN_LAST + 1, BACK_OFF_LAST),
        (StreamError("conflict"), BACK_OFF_LOGIN_LAST + 1, BACK_OFF_LAST),
        (AuthenticationError("x"), BACK_OFF_LOGIN_LAST + 1, BACK_OFF_LOGIN),
    ],
)
def test_only_a_session_that_outlived_the_longest_pause_makes_up_for_failures(
    problem: SyncdError, good: float, first: float
) -> None:
    pauses = Pauses()
    assert [pauses.after(problem, 0.0, 1.0) for _ in range(3)] == [first, 2 * first, 4 * first]
    assert pauses.after(problem, good - 2, 1.0) == 8 * first
    assert pauses.after(problem, good, 1.0) == first
    assert [pauses.after(problem, 0.0, 1.0) for _ in range(2)] == [first, 2 * first]
    pauses.forgive()
    assert pauses.after(problem, 0.0, 1.0) == first


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (None, True),
        (OfflineError("x"), True),
        (RemoteProtocolError("the certificate of a hotel"), True),
        (StreamError("system-shutdown"), True),
        (AuthenticationError("x"), False),
        (StreamError("policy-violation"), False),
        (StanzaError(ErrorType.CANCEL, "conflict"), False),
    ],
)
def test_another_network_helps_where_nobody_has_anything_against_us(
    problem: SyncdError | None, expected: bool
) -> None:
    assert is_of_network(problem) is expected


@pytest.mark.parametrize(
    ("said", "seconds"),
    [(0, DEFAULT_RESUME), (600, 600.0), (10**9 - 1, MAX_RESUME)],
)
def test_a_session_is_resumed_for_as_long_as_the_server_keeps_it(
    said: int, seconds: float
) -> None:
    sm = StreamManagement(LAPTOP)
    sm.max_seconds = said
    assert resume_within(sm) == seconds


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("b.example.org", ("b.example.org", 5222)),
        ("b.example.org:9999", ("b.example.org", 9999)),
        ("192.0.2.7:80", ("192.0.2.7", 80)),
        ("2001:db8::7", ("2001:db8::7", 5222)),
        ("[2001:db8::7]", ("2001:db8::7", 5222)),
        ("[2001:db8::7]:443", ("2001:db8::7", 443)),
        ("", None),
        (":5222", None),
        ("b.example.org:", None),
        ("b.example.org:0", None),
        ("b.example.org:65536", None),
        ("b.example.org:123456", None),
        ("https://b.example.org/", None),
        ("b@example.org", None),
        ("two words", None),
        ("x" * 256, None),
    ],
)
def test_a_server_sends_us_to_another(said: str, expected: tuple[str, int] | None) -> None:
    """RFC 6120 section 4.9.3.19."""
    assert other_server(StreamError("see-other-host", other_host=said), 5222) == expected


@given(st.text(max_size=300))
def test_wherever_it_sends_us_it_is_a_host_and_a_port_or_nothing(said: str) -> None:
    found = other_server(StreamError("see-other-host", other_host=said), 5222)
    if found is not None:
        host, port = found
        assert 0 < len(host) <= 255
        assert 0 < port < 65_536


@pytest.mark.parametrize(
    "problem", [None, OfflineError("x"), StreamError("conflict", other_host="b.example.org")]
)
def test_nothing_else_sends_us_anywhere(problem: SyncdError | None) -> None:
    assert other_server(problem, 5222) is None


@pytest.mark.parametrize(
    "conflict", [StreamError("conflict"), StanzaError(ErrorType.CANCEL, "conflict")]
)
def test_after_a_conflict_we_are_another_resource(conflict: SyncdError) -> None:
    """Whether the stream ended over it, or the bind was refused."""
    assert other_resource(LAPTOP, conflict, "07") == JID.parse("user@example.org/laptop-07")
    assert other_resource(LAPTOP.bare, conflict, "07") == JID.parse("user@example.org/07")
    long = LAPTOP.with_resource("x" * 1023)
    other = other_resource(long, conflict, "07")
    assert other is not None
    assert other.resource == "x" * 64 + "-07"


@pytest.mark.parametrize(
    "problem",
    [
        None,
        OfflineError("x"),
        StreamError("system-shutdown"),
        StanzaError(ErrorType.WAIT, "resource-constraint"),
    ],
)
def test_after_anything_else_we_stay_who_we_are(problem: SyncdError | None) -> None:
    assert other_resource(LAPTOP, problem, "07") is None
