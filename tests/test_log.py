"""Lines that nobody can forge, and not too many of them."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd import log as subject
from syncd.control.escape import printable
from syncd.log import (
    BURST,
    BURST_OF_ALL,
    INTERVAL,
    INTERVAL_OF_ALL,
    MAX_LINE,
    MAX_MATTERS,
    MAX_TRACEBACK,
    Formatter,
    Limiter,
)
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from pathlib import Path

BOB = JID.parse("bob@example.org/pc")
CAROL = JID.parse("carol@example.org")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A logger behind a limiter, and the lines that it wrote."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.limiter = Limiter(self.clock)
        self._out = io.StringIO()
        self._handler = logging.StreamHandler(self._out)
        self._handler.setFormatter(Formatter("%(message)s"))
        self._handler.addFilter(self.limiter)

    def say(self, message: str, *args: object, name: str = "syncd.x") -> None:
        record = logging.LogRecord(name, logging.INFO, "", 0, message, args, None)
        self._handler.handle(record)

    def lines(self) -> list[str]:
        """What was written since the last look."""
        text = self._out.getvalue()
        self._out.seek(0)
        self._out.truncate()
        return text.splitlines()


def record(
    message: str, *args: object, error: BaseException | None = None
) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("syncd", logging.INFO, "", 0, message, args, info)


def raised(error: BaseException) -> BaseException:
    """The error with a traceback."""
    try:
        raise error
    except type(error) as caught:
        return caught


# Formatter


def test_a_line_is_as_it_was_meant() -> None:
    line = Formatter("%(levelname)s %(name)s: %(message)s").format(record("%s to %s", "a", BOB))
    assert line == "INFO syncd: a to bob@example.org/pc"


def test_a_line_may_carry_the_time() -> None:
    written = Formatter("%(asctime)s %(message)s", "%Y").format(record("a"))
    assert written.partition(" ")[2] == "a"
    assert written[:4].isdecimal()


@given(st.text(st.characters()))
def test_no_text_breaks_out_of_its_line(text: str) -> None:
    line = Formatter("%(message)s").format(record("%s", text))
    assert line.isprintable() or printable(line) == line
    assert len(line) <= MAX_LINE


@pytest.mark.parametrize("text", ["x" * 10**6, "\x1b" * 10**6])
def test_a_long_text_is_cut(text: str) -> None:
    line = Formatter("%(message)s").format(record("%s", text))
    assert len(line) == MAX_LINE
    assert line.endswith("...")


def test_a_traceback_keeps_its_lines_and_none_of_them_can_be_taken_for_another() -> None:
    error = raised(RuntimeError("what \x1b a peer said\nINFO syncd: all is well"))
    text = Formatter("%(levelname)s %(message)s").format(record("a\nbug", error=error))
    first, *lines = text.split("\n")
    assert first == "INFO a\\nbug"
    assert lines[0] == "  Traceback (most recent call last):"
    assert lines[-2:] == [
        "  RuntimeError: what \\x1b a peer said",
        "  INFO syncd: all is well",
    ]


def test_of_a_long_traceback_the_end_is_kept() -> None:
    error = raised(RuntimeError("\n".join(map(str, range(10_000)))))
    lines = Formatter("%(message)s").format(record("a bug", error=error)).split("\n")
    assert len(lines) == 1 + MAX_TRACEBACK
    assert lines[-1] == "  9999"


# Limiter


def test_a_few_lines_are_never_left_out() -> None:
    log = Log()
    for number in range(BURST):
        log.say("hello %d", number)
    assert log.lines() == [f"hello {number}" for number in range(BURST)]


def test_a_flood_is_told_but_not_repeated() -> None:
    log = Log()
    for _ in range(1_000):
        log.say("refused: %s", "x")
    assert len(log.lines()) == BURST
    log.clock.now += INTERVAL
    log.say("refused: %s", "y")
    assert log.lines() == [f"refused: y ... {1_000 - BURST} more like this were left out"]
    log.clock.now += INTERVAL
    log.say("refused: %s", "z")
    assert log.lines() == ["refused: z"]


def test_quiet_brings_the_burst_back() -> None:
    log = Log()
    for _ in range(BURST):
        log.say("a")
    log.clock.now += INTERVAL * BURST * 10
    for _ in range(2 * BURST):
        log.say("a")
    assert len(log.lines()) == 2 * BURST


@pytest.mark.parametrize(
    ("message", "args", "name"),
    [
        ("other %s", (BOB,), "syncd.x"),
        ("refused %s", (CAROL,), "syncd.x"),
        ("refused %s", ("bob@example.org",), "syncd.x"),  # a text is no peer
        ("refused %s", (BOB,), "syncd.y"),
    ],
)
def test_one_who_floods_takes_nothing_from_others(
    message: str, args: tuple[object, ...], name: str
) -> None:
    log = Log()
    for _ in range(1_000):
        log.say("refused %s", BOB)
    log.lines()
    log.say(message, *args, name=name)
    assert len(log.lines()) == 1


def test_a_peer_is_the_same_at_any_resource() -> None:
    """It can have as many as it likes."""
    log = Log()
    for number in range(1_000):
        log.say("refused %s", BOB.with_resource(f"r{number}"))
    assert len(log.lines()) == BURST


def test_many_strangers_are_limited_together() -> None:
    log = Log()
    for number in range(5_000):
        log.say("refused %s", JID.parse(f"u{number}@spam.example"))
    assert len(log.lines()) == BURST_OF_ALL
    log.clock.now += INTERVAL_OF_ALL
    log.say("refused %s", JID.parse("new@spam.example"))
    (line,) = log.lines()
    assert "more like this were left out" in line


def test_what_is_remembered_is_bounded() -> None:
    log = Log()
    for number in range(10 * MAX_MATTERS):
        log.say(f"matter {number}")
        assert len(log.limiter._buckets) <= MAX_MATTERS + 1
    # Those that no longer fit count as one.
    assert len(log.lines()) == MAX_MATTERS + BURST_OF_ALL
    # And what is over makes room.
    log.clock.now += INTERVAL * BURST
    log.say("matter 0")
    log.say("one more")
    assert log.lines() == ["matter 0", "one more"]
    assert len(log.limiter._buckets) == 2


def test_room_is_not_looked_for_all_the_time() -> None:
    log = Log()
    for number in range(MAX_MATTERS):
        log.say(f"matter {number}")
    log.clock.now += INTERVAL  # one line each, so all are over now
    log.say("new")
    assert len(log.limiter._buckets) == 1
    for number in range(MAX_MATTERS):
        log.say(f"matter {number}")
    log.clock.now += INTERVAL / 2
    log.say("newer")
    assert len(log.limiter._buckets) == MAX_MATTERS + 1


def test_arguments_may_be_a_mapping() -> None:
    log = Log()
    log.say("%(a)s", {"a": BOB})
    assert log.lines() == ["bob@example.org/pc"]


def test_threads_may_write_at_once() -> None:
    log = Log()

    def write() -> None:
        for _ in range(500):
            log.say("a")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.lines()) == BURST
    (bucket,) = log.limiter._buckets.values()
    assert bucket.left_out == 2_000 - BURST


# set_up


@pytest.mark.parametrize("journal", ["", "8:12", "this"])
@pytest.mark.parametrize("verbose", [False, True])
def test_the_log_goes_to_stderr(
    journal: str, verbose: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the time, unless the journal, which is this stream and no other, adds it."""
    stderr = (tmp_path / "stderr").open("w+", encoding="utf-8")
    found = os.fstat(stderr.fileno())
    this = f"{found.st_dev}:{found.st_ino}"
    monkeypatch.setenv("JOURNAL_STREAM", this if journal == "this" else journal)
    root, syncd = logging.getLogger(), logging.getLogger("syncd")
    monkeypatch.setattr(root, "handlers", [])
    for logger in (root, syncd):
        monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(sys, "stderr", stderr)
    subject.set_up(verbose=verbose)
    for _ in range(BURST + 5):
        logging.getLogger("syncd.a").info("to %s", "a\nb")
    logging.getLogger("syncd.a").debug("detail")
    logging.getLogger("trio").debug("detail of others")
    stderr.seek(0)
    lines = stderr.read().splitlines()
    stderr.close()
    assert len(lines) == BURST + verbose
    assert len(root.handlers) == 1
    assert lines[0].endswith("INFO syncd.a: to a\\nb")
    assert lines[0].startswith("<6>INFO") == (journal == "this")
    assert lines[0].startswith("20") == (journal != "this")


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.CRITICAL, "<2>"),
        (logging.ERROR, "<3>"),
        (logging.WARNING, "<4>"),
        (logging.INFO, "<6>"),
        (logging.DEBUG, "<7>"),
        (logging.INFO + 1, ""),  # unknown: the unit's SyslogLevel= decides
    ],
)
def test_each_line_has_its_priority_for_the_journal(level: int, priority: str) -> None:
    """Those of a traceback, too; and nothing that a peer sends can stand in front of it."""
    error = OSError("<7>a\n<7>b")
    text = "<7>a\n<7>b"
    record = logging.LogRecord("syncd", level, "", 0, text, (), (OSError, error, None))
    written = subject.JournalFormatter("%(message)s").format(record).split("\n")
    assert f"{priority}<7>a\\n<7>b" == written[0]
    assert [f"{priority}  OSError: <7>a", f"{priority}  <7>b"] == written[1:]
