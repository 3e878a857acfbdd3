from __future__ import annotations

import unicodedata
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.control.summary import amount, duration, outstanding, quantity
from tests.support.statuses import (
    BOB,
    CONNECTION,
    DECLINED,
    NOW,
    PHOTOS,
    SENDING,
    but,
    status,
)

if TYPE_CHECKING:
    from syncd.control.messages import Status

GIB = 1024**3
OWED = but(BOB, pending=3, pending_bytes=round(1.2 * GIB))
OFFLINE = but(OWED, online=False, resource="", since=NOW - timedelta(hours=2))
CAROL = but(OWED, jid="carol@example.org", pending=1, pending_bytes=0)
CONNECTING = but(
    CONNECTION,
    state="offline",
    since=NOW - timedelta(minutes=5),
    reason="example.org refuses the connection",
)
UNAUTHORIZED = but(
    CONNECTION,
    state="unauthorized",
    reason="example.org does not accept the password of alice@example.org.",
    hint="check password_file",
)

CASES = [
    (status(), "ok", "OK: all 12,481 files delivered"),
    (status(folders=(but(PHOTOS, files=1),)), "ok", "OK: 1 file delivered"),
    (status(folders=()), "ok", "OK: nothing to deliver"),
    (status(folders=(but(PHOTOS, send_to=()),)), "ok", "OK: nothing to deliver"),
    (
        status(transfers=(but(SENDING, direction="receive"),)),
        "ok",
        "OK: all 12,481 files delivered; receiving 1 file",
    ),
    (
        status(errors=(DECLINED,)),  # an error of the past, with nothing owed
        "ok",
        "OK: all 12,481 files delivered",
    ),
    (
        status(peers=(OFFLINE,)),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org, offline for 2 h",
    ),
    (
        status(peers=(but(OFFLINE, since=None),)),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org, offline",
    ),
    (
        status(peers=(OWED,), transfers=(SENDING, but(SENDING, path="b"))),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org, sending at 32.0 MiB/s",
    ),
    (
        status(peers=(OWED,), transfers=(but(SENDING, rate=0),)),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org, sending",
    ),
    (
        status(peers=(but(OWED, next_try=NOW + timedelta(minutes=3), last_error="disk full"),)),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org, next try in 3 min (disk full)",
    ),
    (
        status(peers=(but(OWED, next_try=NOW),)),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org, about to be sent",
    ),
    (
        status(peers=(OFFLINE, CAROL)),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org, offline for 2 h; "
        "1 file for carol@example.org, about to be sent",
    ),
    (
        status(peers=(OFFLINE, CAROL, but(CAROL, jid="dave@example.org"), OFFLINE)),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org, offline for 2 h; "
        "1 file for carol@example.org, about to be sent; 4 files for 2 more peers",
    ),
    (
        status(connection=CONNECTING, peers=(OFFLINE,)),
        "waiting",
        "WAITING: 3 files (1.2 GiB) for bob@example.org; "
        "not connected to example.org for 5 min: example.org refuses the connection",
    ),
    (
        status(connection=CONNECTING),
        "waiting",
        "WAITING: nothing to deliver, but "
        "not connected to example.org for 5 min: example.org refuses the connection",
    ),
    (
        status(connection=but(CONNECTION, state="connecting", since=None)),
        "waiting",
        "WAITING: nothing to deliver, but not connected to example.org",
    ),
    (
        status(folders=(but(PHOTOS, settling=2),)),
        "waiting",
        "WAITING: 2 files still being written",
    ),
    (
        status(folders=(but(PHOTOS, scanning=True),)),
        "waiting",
        "WAITING: looking through photos",
    ),
    (status(folders=(but(PHOTOS, pending=1),)), "waiting", "WAITING: 1 file to be delivered"),
    (
        status(connection=UNAUTHORIZED, peers=(OFFLINE,)),
        "problem",
        "PROBLEM: example.org does not accept the password of alice@example.org; "
        "check password_file",
    ),
    (
        status(connection=but(CONNECTION, state="refused")),
        "problem",
        "PROBLEM: example.org refuses alice@example.org/laptop",
    ),
    (
        status(folders=(but(PHOTOS, problem="it is gone", hint="mount it"),)),
        "problem",
        "PROBLEM: folder photos: it is gone; mount it",
    ),
    (
        status(peers=(but(BOB, problem="its key has changed", hint="compare the words"),)),
        "problem",
        "PROBLEM: bob@example.org: its key has changed; compare the words",
    ),
    (
        status(peers=(but(OWED, parked=1),), errors=(DECLINED,)),
        "problem",
        "PROBLEM: 1 file cannot be delivered to bob@example.org: "
        "bob@example.org does not want the file [forbidden]; ask bob to accept files from you",
    ),
    (
        status(peers=(but(CAROL, parked=1, last_error="no room"),), errors=(DECLINED,)),
        "problem",
        "PROBLEM: 1 file cannot be delivered to carol@example.org: no room",
    ),
    (
        status(connection=UNAUTHORIZED, folders=(but(PHOTOS, problem="it is gone"),)),
        "problem",
        "PROBLEM: example.org does not accept the password of alice@example.org; "
        "check password_file (and 1 more problem)",
    ),
]


@pytest.mark.parametrize(("seen", "state", "summary"), CASES)
def test_the_summary_says_whether_all_is_delivered(
    seen: Status, state: str, summary: str
) -> None:
    assert (seen.state, seen.summary) == (state, summary)


@given(st.text(), st.text(), st.text())
def test_the_summary_is_one_printable_line(jid: str, text: str, hint: str) -> None:
    bob = but(OWED, jid=jid, last_error=text, next_try=NOW + timedelta(hours=1))
    away = but(CONNECTING, server=jid, reason=text)
    many = [
        status(peers=(bob,)),
        status(peers=(but(bob, problem=text, hint=hint),)),
        status(folders=(but(PHOTOS, id=jid, problem=text, hint=hint),)),
        status(folders=(but(PHOTOS, id=jid, scanning=True),)),
        status(connection=away),
        status(peers=(but(bob, parked=1),), errors=(but(DECLINED, peer=jid, text=text),)),
    ]

    for seen in many:
        unprintable = {c for c in seen.summary if unicodedata.category(c)[0] == "C"}
        assert unprintable == set()
        assert len(seen.summary.splitlines()) == 1


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (status(), False),
        (status(connection=CONNECTING), False),
        (status(transfers=(but(SENDING, direction="receive"),)), False),
        (status(transfers=(SENDING,)), True),
        (status(peers=(OWED,)), True),
        (status(folders=(but(PHOTOS, pending=1),)), True),
        (status(folders=(but(PHOTOS, settling=1),)), True),
        (status(folders=(but(PHOTOS, scanning=True),)), True),
        (status(folders=(but(PHOTOS, problem="it is gone"),)), True),
    ],
)
def test_what_is_worth_waiting_for(seen: Status, expected: bool) -> None:
    assert outstanding(seen) == expected


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (round(1.2 * GIB), "1.2 GiB"),
        (5000 * 1024**6, "5000.0 EiB"),
    ],
)
def test_amounts_in_words(size: int, text: str) -> None:
    assert amount(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0.4, "0 s"),
        (89, "89 s"),
        (180, "3 min"),
        (5399, "90 min"),
        (7200, "2 h"),
        (172_800, "2 days"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_quantities_in_words() -> None:
    assert [quantity(n, "file") for n in (0, 1, 12481)] == ["0 files", "1 file", "12,481 files"]
