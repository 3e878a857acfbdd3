"""C-02: what a peer writes is shown, and never acts: not on a terminal, a log, or a program.

One escaper (`syncd.control.escape`) stands before everything that people read; here it is
looked for at every exit: all commands of syncctl, the log in both forms, systemd's status, and
JSON, which stays JSON.
"""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.control.escape import printable, printable_lines
from syncd.control.messages import (
    Key,
    KeyRequest,
    Keys,
    Limited,
    LimitRequest,
    LimitStatus,
    PeerRequest,
    PingRequest,
    Pong,
    Reply,
    Request,
    Rescanned,
    RescanRequest,
    SendRequest,
    Standing,
    StandingRequest,
    Status,
    StatusRequest,
    decode_reply,
)
from syncd.errors import DeclinedError, ErrorType, StanzaError, SyncdError, TransferError
from syncd.log import MAX_LINE, Formatter, JournalFormatter
from syncd.transfer import si
from syncd.xmpp.stanza import make_error_reply, make_iq, read_error
from tests.support.peers import BOB as BOBS_DESK
from tests.support.peers import carried, open_peers
from tests.support.statuses import BOB, CONNECTION, DECLINED, NOW, PHOTOS, SENDING, but, status
from tests.support.syncctl import syncctl

if TYPE_CHECKING:
    from pathlib import Path

# Controls, formats (bidi marks among them), lone surrogates, ends of lines and of paragraphs.
ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}

# Each has harmed somebody's terminal, log, or reader.
HOSTILE = (
    "a\x1b]0;title\x07\x1b[2J\x1b[31mred"
    "\r\nsyncd[1]: forged line\n<3>forged priority"
    "\x9b31m\x85\u2028\u2029\x00\x7f\x08"
    "\u202egnp.exe\u2066\u200f\u061c\ufeff"
    "[bold red]markup[/]\\\"'%s{0}\t\udcff\ud800"
)

texts = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(
    [HOSTILE, "\x1b", "\n", "\u202e", "\x9b"]
)


def acting(text: str, allowed: str = "\n") -> set[str]:
    """The characters of an output that do something."""
    return {
        char for char in text if unicodedata.category(char) in ACTING and char not in allowed
    }


@given(texts)
def test_c02_no_text_acts_once_it_is_escaped(text: str) -> None:
    assert acting(printable(text), "") == set()
    assert acting(printable_lines(text)) == set()
    assert printable(printable(text)) == printable(text)
    # It can be written anywhere.
    printable(text).encode()


# --- The log


@given(texts, texts)
def test_c02_no_text_leaves_its_line_of_the_log(template: str, text: str) -> None:
    """As an argument, in the message itself, and in the text of an error with a traceback."""
    error = TransferError(text, hint=text)
    error.__cause__ = StanzaError(ErrorType.CANCEL, "forbidden", text)
    failure = TransferError, error, None
    for formatter in (Formatter("%(levelname)s %(message)s"), JournalFormatter("%(message)s")):
        for message, arguments in (
            ("a file from %s", (text,)),
            (template.replace("%", ""), ()),
        ):
            record = logging.LogRecord("syncd", 20, "", 1, message, arguments, None)
            line = formatter.format(record)
            assert acting(line, "") == set()
            assert len(line) <= MAX_LINE + 20
            record = logging.LogRecord("syncd", 40, "", 1, message, arguments, failure)
            first, *traceback = formatter.format(record).split("\n")
            assert acting(first + "".join(traceback), "") == set()
            # What looks like another line begins with spaces, or its own priority and these.
            assert {each.removeprefix("<3>")[:2] for each in traceback} == {"  "}


async def test_c02_names_and_refusals_of_peers_reach_the_log_escaped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real transfer with the worst name that may be offered, and the worst refusal."""
    name = "evil\u202egnp\u2066.[red]%s\u200f"
    caplog.set_level(logging.DEBUG)
    async with open_peers(tmp_path) as peers:
        assert (await peers.send(peers.write(name, b"x"))).confirmed
        assert peers.received() == {name: b"x"}
        said = writable(HOSTILE)
        peers.server.inject(si.SI, StanzaError(ErrorType.CANCEL, "forbidden", said))
        with pytest.raises(DeclinedError) as caught:
            await peers.send(peers.write("b", b"x"))
    shown = Formatter("%(message)s")
    lines = [shown.format(record) for record in caplog.records]
    assert any("evil\\u202egnp" in line for line in lines)
    assert {char for line in lines for char in acting(line, "")} == set()
    # What stands in the status is the same sentence, which syncctl escapes (below).
    assert acting(printable(str(caught.value)), "") == set()


def writable(text: str) -> str:
    """Without what XML cannot carry, which no peer can say."""
    return "".join(char for char in text if char >= " " and not "\ud800" <= char <= "\udfff")


def test_c02_the_words_of_a_refusal_are_cut() -> None:
    error = StanzaError(ErrorType.CANCEL, "forbidden", "x" * 100_000)
    request = make_iq("set", "1", BOBS_DESK)
    assert len(read_error(carried(make_error_reply(request, error))).text) <= 1_000


# --- syncctl


async def hostile_answers(request: Request) -> Reply:
    """A daemon all of whose texts came from somebody with bad intentions."""
    match request:
        case StatusRequest():
            return status(
                connection=but(
                    CONNECTION,
                    state="offline",
                    jid=HOSTILE,
                    server=HOSTILE,
                    reason=HOSTILE,
                    hint=HOSTILE,
                ),
                folders=(but(PHOTOS, id=HOSTILE, path=HOSTILE, problem=HOSTILE, hint=HOSTILE),),
                peers=(
                    but(
                        BOB,
                        jid=HOSTILE,
                        resource=HOSTILE,
                        encryption=HOSTILE,
                        last_error=HOSTILE,
                        problem=HOSTILE,
                        hint=HOSTILE,
                        pending=1,
                    ),
                ),
                transfers=(but(SENDING, path=HOSTILE, folder=HOSTILE, peer=HOSTILE),),
                errors=(but(DECLINED, text=HOSTILE, hint=HOSTILE, path=HOSTILE, peer=HOSTILE),),
            )
        case RescanRequest():
            return Rescanned(files=1)
        case PingRequest():
            return Pong(version=HOSTILE, pid=1)
        case LimitRequest():
            return Limited(peer=HOSTILE, limit=LimitStatus(up=1))
        case SendRequest() | StandingRequest():
            return Standing(state="parked", online=False, error=HOSTILE, hint=HOSTILE)
        case PeerRequest() | KeyRequest():
            return Keys(own=HOSTILE, keys=(HOSTILE_KEY,))


HOSTILE_KEY = Key(
    peer="bob@example.org",
    state="changed",
    fingerprint=HOSTILE,
    words=(HOSTILE, HOSTILE),
    first_seen=datetime(2031, 1, 1, tzinfo=UTC),
    last_seen=NOW,
    offered=HOSTILE,
)

COMMANDS = {
    "status": ["status"],
    "json": ["status", "--json"],
    "wait": ["wait", "--timeout", "0.2"],
    "limit": ["limit", "bob@example.org", "--up", "1024"],
    "send": ["send", "FILE", "bob@example.org"],
    "send and wait": ["send", "FILE", "bob@example.org", "--wait"],
    "keys": ["peer", "list"],
    "key": ["peer", "show", "bob@example.org"],
    "reset": ["peer", "reset-key", "bob@example.org"],
    "verify": ["peer", "verify", "bob@example.org", "--fingerprint", "00"],
}


@pytest.mark.parametrize("command", COMMANDS)
async def test_c02_no_command_of_syncctl_lets_it_act(tmp_path: Path, command: str) -> None:
    file = tmp_path / "file"
    file.touch()
    arguments = [str(file) if each == "FILE" else each for each in COMMANDS[command]]
    code, out, err = await syncctl(hostile_answers, tmp_path / "s" / "c.sock", *arguments)
    assert "Traceback" not in err
    assert code != 2, err  # usage: then nothing would have been shown
    assert acting(out + err) == set()
    # Nothing of it stands where a line of syncctl's own would.
    assert not [line for line in (out + err).splitlines() if line.startswith("syncd[1]")]


@pytest.mark.parametrize("command", COMMANDS)
async def test_c02_no_refusal_acts_either(tmp_path: Path, command: str) -> None:
    async def refuse(_: Request) -> Reply:
        raise SyncdError(HOSTILE, hint=HOSTILE)

    file = tmp_path / "file"
    file.touch()
    arguments = [str(file) if each == "FILE" else each for each in COMMANDS[command]]
    code, out, err = await syncctl(refuse, tmp_path / "s" / "c.sock", *arguments)
    assert code not in (0, 2)
    assert acting(out + err) == set()
    own = [line for line in err.splitlines() if not line.startswith(" ")]
    assert [line.split(":")[0] for line in own] in (["syncctl"], ["syncctl", "hint"])


async def test_c02_json_stays_json(tmp_path: Path) -> None:
    """In ASCII, on one line; and it says all there was to say."""
    _, out, _ = await syncctl(hostile_answers, tmp_path / "s" / "c.sock", "status", "--json")
    [line] = out.splitlines()
    assert line.isascii()
    assert acting(line, "") == set()
    read = json.loads(line)
    assert read["errors"][0]["text"].startswith("a\x1b]0;title\x07")
    assert isinstance(decode_reply(line.encode()), Status)


# --- Names that are bytes, and files that have them


async def test_c02_a_name_that_is_no_text_is_told_all_the_same(tmp_path: Path) -> None:
    """Of our own disk, where any bytes are a name: it is not sent, and can be shown."""
    name = os.fsdecode(b"caf\xe9\x1b[2J\n")
    async with open_peers(tmp_path) as peers:
        source = peers.write(name, b"x")
        with pytest.raises(SyncdError) as caught:
            await peers.send(source)
        assert acting(printable(str(caught.value)), "") == set()
        assert peers.received() == {}
