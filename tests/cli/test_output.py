from __future__ import annotations

import io
import json
import re
import unicodedata
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.cli import output
from syncd.control.messages import LimitStatus, ProxyStatus, Status, decode_reply
from syncd.errors import NotRunningError
from tests.support.statuses import (
    BOB,
    CONNECTION,
    DECLINED,
    PHOTOS,
    SENDING,
    but,
    status,
)

NOW = datetime(2031, 5, 4, 12, 0, tzinfo=UTC)
AGO = NOW - timedelta(minutes=3, seconds=10)

BUSY = status(
    connection=but(CONNECTION, since=AGO),
    folders=(
        but(PHOTOS, pending=3, settling=1),
        but(PHOTOS, id="mail", send_to=(), files=1, problem="it is gone", hint="mount it"),
    ),
    peers=(
        but(BOB, pending=3, pending_bytes=5 * 1024**3, sent=2, since=AGO, parked=1),
        but(
            BOB,
            jid="carol@example.org",
            online=False,
            resource="",
            encryption="verified",
            next_try=NOW + timedelta(minutes=3, seconds=10),
            last_error="no room",
        ),
    ),
    transfers=(SENDING, but(SENDING, direction="receive", method=None, offset=0, rate=0)),
    errors=(but(DECLINED, time=AGO),),
    now=NOW,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(seen: Status) -> str:
    file = io.StringIO()
    output.print_status(seen, file=file, environ={}, now=NOW)
    return file.getvalue()


def words(text: str) -> list[str]:
    """The lines without the spaces that only align them."""
    return [re.sub(r"\s{2,}", "  ", line.strip()) for line in text.splitlines()]


def test_the_first_line_is_the_whole_summary() -> None:
    seen = but(BUSY, summary="WAITING: " + "very " * 100 + "long")

    assert plain(seen).splitlines()[0] == seen.summary


def test_limits_in_force_are_shown() -> None:
    limited = but(BOB, limit=LimitStatus(down=500_000))
    lines = words(plain(status(peers=(limited,), limit=LimitStatus(up=5 << 20, down=1024))))
    assert "all peers together: limited to up 5.0 MiB/s, down 1.0 KiB/s" in lines
    assert "limited to down 488.3 KiB/s" in lines


def test_what_a_pipe_gets() -> None:
    lines = words(plain(BUSY))

    assert lines[1:4] == [
        "",
        "Connection",
        "alice@example.org/laptop at example.org  connected for 3 min",
    ]
    assert lines[4].startswith("syncd 0.1.0, running for ")
    assert lines[5:] == [
        "",
        "Folders",
        "photos  /srv/photos",
        "12,481 files, 3 pending, 1 being written",
        "mail  /srv/photos",
        "1 file, receives only",
        "it is gone",
        "hint: mount it",
        "",
        "Peers",
        "bob@example.org/syncd-1  online for 3 min",
        "3 pending (5.0 GiB), 12,481 delivered, 2 sent without receipt, 1 need you",
        "encryption: none from end to end; the server, or a proxy, could read along",
        "carol@example.org  offline",
        "0 pending, 12,481 delivered, next try in 3 min",
        "encryption: from end to end, with a key that was compared",
        "last error: no room",
        "",
        "Transfers",
        "photos/2031/a.raw",
        "send to bob@example.org/syncd-1",
        "[#####---------------]  25 %  1.0 GiB of 4.0 GiB  16.0 MiB/s  3 min left  direct",
        "photos/2031/a.raw",
        "receive from bob@example.org/syncd-1",
        "[--------------------]  0 %  0 B of 4.0 GiB  0 B/s  looking for a way",
        "",
        "Last errors",
        "3 min ago  bob@example.org/syncd-1, photos/2031/a.raw",
        "bob@example.org does not want the file [forbidden]",
        "hint: ask bob to accept files from you",
    ]


def test_an_idle_daemon_has_no_empty_sections() -> None:
    titles = [line for line in plain(status(peers=())).splitlines() if line[:1].isalpha()]

    assert titles == ["OK: all 12,481 files delivered", "Connection", "Folders"]


def test_a_proxy_that_cannot_be_reached_is_shown_with_what_to_change() -> None:
    seen = but(
        status(),
        proxies=(
            ProxyStatus(
                jid="proxy.example.org",
                usable=False,
                text="proxy.example.org names 10.0.0.5:7777, which cannot be reached from here",
                hint="its administrator must set its external address",
            ),
        ),
    )
    lines = [line.strip() for line in plain(seen).splitlines()]
    assert lines[lines.index("Proxies") + 1 :][:3] == [
        "proxy.example.org  not usable",
        "proxy.example.org names 10.0.0.5:7777, which cannot be reached from here",
        "hint: its administrator must set its external address",
    ]


def test_an_error_of_nobody_and_a_scan() -> None:
    seen = status(
        folders=(but(PHOTOS, scanning=True), but(PHOTOS, id="mail")),
        errors=(but(DECLINED, time=AGO, peer="", folder="", path="", hint=""),),
    )

    lines = words(plain(seen))

    assert lines[lines.index("Folders") + 1 : lines.index("Peers") - 1] == [
        "photos  /srv/photos",
        "12,481 files, looking through it",
        "mail  /srv/photos",
        "12,481 files, all delivered",
    ]
    assert lines[lines.index("Last errors") + 1 :] == ["3 min ago", DECLINED.text]


def test_a_pipe_gets_no_spaces_at_line_ends() -> None:
    assert [line for line in plain(BUSY).splitlines() if line != line.rstrip()] == []


def test_a_pipe_gets_no_colours_whatever_the_environment_wishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    monkeypatch.setenv("COLUMNS", "40")

    assert "\x1b" not in plain(BUSY)
    assert max(map(len, plain(BUSY).splitlines()[1:])) <= 100


@pytest.mark.parametrize(
    ("environ", "colours"), [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)]
)
def test_a_terminal_gets_colours_unless_no_color_is_set(
    environ: dict[str, str], colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()

    output.print_status(BUSY, file=file, environ=environ, now=NOW)

    # ECMA-48: 30 to 37 are the foreground colours; bold and dim are none.
    assert bool(re.search(r"\x1b\[(?:\d+;)*3[0-8][;m]", file.getvalue())) == colours
    assert "[#" not in file.getvalue()


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_a_peer_names_acts_on_the_terminal_or_as_markup(text: str) -> None:
    hostile = f"[bold red]{text}[/]"
    seen = status(
        connection=but(CONNECTION, jid=hostile, server=hostile, reason=hostile, hint=hostile),
        folders=(but(PHOTOS, id=hostile, path=hostile, problem=hostile, hint=hostile),),
        peers=(but(BOB, jid=hostile, resource=hostile, encryption=hostile, problem=hostile),),
        transfers=(but(SENDING, path=hostile, folder=hostile, peer=hostile),),
        errors=(but(DECLINED, text=hostile, hint=hostile, path=hostile, peer=hostile),),
    )

    shown = plain(seen)

    acting = {c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert acting <= {"\n"}
    assert "[bold" in shown


def test_json_is_one_ascii_line_that_says_everything() -> None:
    file = io.StringIO()
    seen = status(transfers=(but(SENDING, path="\x1b[31m\x7f\x9b\u202e写"),))

    output.print_json(seen, file=file)

    line = file.getvalue()
    assert line.endswith("}\n")
    assert {c for c in line[:-1] if not 0x20 <= ord(c) < 0x7F} == set()
    assert decode_reply(line.encode()) == seen
    assert json.loads(line)["schema"] == 1


def test_watching_into_a_pipe_prints_only_what_has_changed() -> None:
    file = io.StringIO()
    gone = NotRunningError("syncd is not running", hint="start it")

    with output.watching(file=file, environ={}) as show:
        for seen in (status(), status(), gone, gone, status(), BUSY):
            show(seen)

    first = [
        line
        for line in file.getvalue().splitlines()
        if line.startswith(("OK:", "WAITING:", "PROBLEM:"))
    ]
    assert first == [
        "OK: all 12,481 files delivered",
        "PROBLEM: syncd is not running; start it",
        "OK: all 12,481 files delivered",
        BUSY.summary,
    ]


def test_watching_on_a_terminal_redraws_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    gone = NotRunningError("syncd is not running", hint="start it")

    with output.watching(file=file, environ={"NO_COLOR": "1"}) as show:
        show(BUSY)
        before = len(file.getvalue())
        show(gone)

    erase_lines_and_go_up = "\x1b[2K\x1b[1A"
    assert BUSY.summary.split(";")[0][:40] in file.getvalue()[:before]
    assert erase_lines_and_go_up in file.getvalue()[before:]
    assert "PROBLEM: syncd is not running; start it" in file.getvalue()[before:]
