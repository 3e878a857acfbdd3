"""The counters and the queue of XEP-0198."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import RemoteProtocolError
from syncd.xmpp import sm
from syncd.xmpp.jid import JID
from syncd.xmpp.sm import (
    MAX_ID,
    MAX_LOCATION,
    NS,
    REQUEST_AFTER,
    StreamManagement,
    read_h,
)
from syncd.xmpp.xml import make

WRAP = 2**32
LAPTOP = JID.parse("user@example.org/laptop")


def counted(sent: int) -> StreamManagement:
    """After so many stanzas, each acknowledged and each answered by one of the server's.

    Billions cannot be counted here, so the counters are set.
    """
    managed = StreamManagement(LAPTOP)
    managed._acked = managed._handled = sent % WRAP
    return managed


def test_nothing_is_counted_before_it_begins() -> None:
    managed = StreamManagement(LAPTOP)
    assert (managed.jid, managed.handled, managed.sent_count) == (LAPTOP, 0, 0)
    assert (managed.unacked, managed.full) == ((), False)


@pytest.mark.parametrize(
    ("attributes", "ident", "seconds"),
    [
        ({"resume": "true", "id": "s1", "max": "600"}, "s1", 600),
        ({"resume": "1", "id": "s1"}, "s1", 0),
        ({"resume": "true", "id": "x" * (MAX_ID + 1)}, "x" * MAX_ID, 0),
        ({"id": "s1"}, "", 0),
        ({"resume": "false", "id": "s1"}, "", 0),
        ({"resume": "true"}, "", 0),
        ({"max": "-1"}, "", 0),
        ({"max": "1e3"}, "", 0),
        ({"max": "\u0663"}, "", 0),
        ({"max": "9" * 10}, "", 0),
    ],
)
def test_the_server_tells_how_the_session_is_resumed(
    attributes: dict[str, str], ident: str, seconds: int
) -> None:
    """Section 3; without an id it cannot be."""
    managed = StreamManagement(LAPTOP)
    managed.enabled(make(f"{{{NS}}}enabled", attributes))
    assert (managed.id, managed.max_seconds) == (ident, seconds)


@pytest.mark.parametrize(
    ("said", "location"),
    [
        ({}, ""),
        ({"location": "[2001:db8::1]:9222"}, "[2001:db8::1]:9222"),
        ({"location": "x" * MAX_LOCATION}, "x" * MAX_LOCATION),
        ({"location": "x" * (MAX_LOCATION + 1)}, ""),
    ],
)
def test_the_server_tells_where_the_session_is_resumed(
    said: dict[str, str], location: str
) -> None:
    """Half a name would be another server's."""
    managed = StreamManagement(LAPTOP)
    managed.enabled(make(f"{{{NS}}}enabled", {"resume": "true", "id": "s1", **said}))
    assert managed.location == location


@pytest.mark.parametrize(
    ("failed", "lost"),
    [
        (None, (b"<a/>", b"<b/>", b"<c/>")),
        ({}, (b"<a/>", b"<b/>", b"<c/>")),
        ({"h": "2"}, (b"<c/>",)),
        ({"h": "3"}, ()),
        ({"h": "4"}, (b"<a/>", b"<b/>", b"<c/>")),
        ({"h": "many"}, (b"<a/>", b"<b/>", b"<c/>")),
    ],
)
def test_a_server_that_forgot_the_session_may_know_what_it_had_of_it(
    failed: dict[str, str] | None, lost: tuple[bytes, ...]
) -> None:
    """Section 5; nonsense is as good as nothing, and nobody resumes it again."""
    managed = StreamManagement(LAPTOP)
    managed.id = "s1"
    for stanza in (b"<a/>", b"<b/>", b"<c/>"):
        managed.sent(stanza)
    managed.forgotten(None if failed is None else make(f"{{{NS}}}failed", failed))
    assert (managed.id, managed.unacked) == ("", lost)


def test_what_is_acknowledged_is_forgotten_in_order() -> None:
    managed = StreamManagement(LAPTOP)
    for stanza in (b"<a/>", b"<b/>", b"<c/>"):
        managed.sent(stanza)
    seen = [(managed.acknowledged(h), managed.unacked) for h in (0, 2, 2, 3)]
    assert seen == [
        (0, (b"<a/>", b"<b/>", b"<c/>")),
        (2, (b"<c/>",)),
        (0, (b"<c/>",)),
        (1, ()),
    ]


def test_an_acknowledgement_is_asked_for_now_and_then() -> None:
    managed = StreamManagement(LAPTOP)
    asked = [managed.sent(b"<a/>") for _ in range(2 * REQUEST_AFTER)]
    assert asked == ([False] * (REQUEST_AFTER - 1) + [True]) * 2


@given(
    before=st.integers(0, 2 * WRAP) | st.integers(WRAP - 20, WRAP),
    steps=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8),
)
def test_wherever_the_counters_stand_exactly_what_was_sent_is_acknowledged(
    before: int, steps: list[tuple[int, int]]
) -> None:
    """Section 4: they wrap at 2**32."""
    managed = counted(before)
    sent = acked = before
    for more, newly in steps:
        for _ in range(more):
            managed.sent(str(sent).encode())
            sent += 1
        now = min(sent, acked + newly)
        assert managed.acknowledged(now % WRAP) == now - acked
        acked = now
        assert managed.acked_count == acked % WRAP
        assert managed.sent_count == sent % WRAP
        assert managed.unacked == tuple(str(number).encode() for number in range(acked, sent))


@given(before=st.integers(WRAP - 5, WRAP + 5), more=st.integers(0, 20))
def test_what_we_handled_wraps_too(before: int, more: int) -> None:
    managed = counted(before)
    for _ in range(more):
        managed.received()
    assert managed.handled == (before + more) % WRAP


@given(before=st.integers(0, WRAP), sent=st.integers(0, 9), wrong=st.integers(1, WRAP - 10))
def test_acknowledging_what_was_never_sent_is_a_fault(
    before: int, sent: int, wrong: int
) -> None:
    """Section 6; going back is the same, since counters only grow."""
    managed = counted(before)
    for _ in range(sent):
        managed.sent(b"<a/>")
    with pytest.raises(RemoteProtocolError, match="stanzas, but only"):
        managed.acknowledged((before + sent + wrong) % WRAP)
    assert len(managed.unacked) == sent


def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm, "MAX_UNACKED", 3)
    monkeypatch.setattr(sm, "MAX_UNACKED_BYTES", 100)

    def full_after(*stanzas: bytes, acknowledged: int = 0) -> bool:
        managed = StreamManagement(LAPTOP)
        for stanza in stanzas:
            managed.sent(stanza)
        managed.acknowledged(acknowledged)
        return managed.full

    assert not full_after(*3 * [b"<a/>"])
    assert full_after(*4 * [b"<a/>"])
    assert not full_after(*4 * [b"<a/>"], acknowledged=1)
    assert not full_after(b"x" * 100)
    assert full_after(b"x" * 100, b"x")
    assert not full_after(b"x" * 100, b"x", acknowledged=1)


@pytest.mark.parametrize("h", [0, 1, WRAP - 1])
def test_a_count_is_read(h: int) -> None:
    assert read_h(make(f"{{{NS}}}a", {"h": str(h)})) == h


@pytest.mark.parametrize(
    "text", [None, "", "-1", "x", "1.0", " 1", "\u0661", str(WRAP), "0" * 11]
)
def test_what_is_no_count_is_a_fault(text: str | None) -> None:
    with pytest.raises(RemoteProtocolError, match="without a count"):
        read_h(make(f"{{{NS}}}a", {"h": text}))


def test_our_count_is_told() -> None:
    managed = counted(WRAP - 1)
    assert managed.make_answer().attrib == {"h": str(WRAP - 1)}
    managed.received()
    answer = managed.make_answer()
    assert (answer.tag, answer.attrib) == (f"{{{NS}}}a", {"h": "0"})


def test_counts_differ_between_neighbours() -> None:
    """Else an acknowledgement would be ambiguous."""
    managed = counted(WRAP - 3)
    counts = [managed.sent_count]
    for _ in range(6):
        managed.sent(b"<a/>")
        counts.append(managed.sent_count)
    assert counts == [WRAP - 3, WRAP - 2, WRAP - 1, 0, 1, 2, 3]
    assert all((b - a) % WRAP == 1 for a, b in pairwise(counts))
