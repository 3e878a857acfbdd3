"""The log: what a line looks like, and how many there are about one matter.

Under systemd it lands in the journal, elsewhere on a terminal or in a file. In either place a
peer that sends nonsense all day must neither forge lines nor fill the disk.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.control.escape import printable
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TextIO

# A path may have 4,096 bytes; a name of 255 characters and an address pass whole.
MAX_LINE = 1_000  # characters
# Nesting of real tracebacks: some 30 calls, in groups a few of them.
MAX_TRACEBACK = 300  # lines

# sd-daemon(3): what a line of stderr begins with to have a priority in the journal.
_PRIORITIES = {
    logging.CRITICAL: "<2>",
    logging.ERROR: "<3>",
    logging.WARNING: "<4>",
    logging.INFO: "<6>",
    logging.DEBUG: "<7>",
}

# Whatever happens to a user goes through these unhurt; a flood does not.
BURST = 20  # lines about one matter of one peer
INTERVAL = 10.0  # seconds from one line to the next behind the burst
# The same for one matter of all peers together: a stranger has as many addresses as it likes.
BURST_OF_ALL = 200  # lines
INTERVAL_OF_ALL = 1.0  # seconds
# Matters times peers that are told apart; beyond, all that are new count as one.
MAX_MATTERS = 1_024  # buckets


def set_up(*, verbose: bool) -> None:
    """Log to stderr.

    Args:
      verbose: What only developers want to know, as well.
    """
    handler = logging.StreamHandler(sys.stderr)
    layout = "%(levelname)s %(name)s: %(message)s"
    if _is_journal(sys.stderr, os.environ):
        # The journal stamps the time itself.
        handler.setFormatter(JournalFormatter(layout))
    else:
        handler.setFormatter(Formatter(f"%(asctime)s {layout}"))
    handler.addFilter(Limiter(time.monotonic))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("syncd").setLevel(logging.DEBUG if verbose else logging.INFO)


class Formatter(logging.Formatter):
    """One line for each record; what peers sent can neither break out of it nor stretch it.

    A traceback follows indented: no line that begins at the margin was made by anybody else.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        record.message = record.getMessage()
        if self.usesTime():
            record.asctime = self.formatTime(record, self.datefmt)
        line = _bounded(self.formatMessage(record))
        left_out = getattr(record, Limiter.LEFT_OUT, 0)
        if left_out:
            line += f" ... {left_out} more like this were left out"
        below = self.formatException(record.exc_info).split("\n") if record.exc_info else []
        # The last lines say what went wrong, and where.
        return "\n".join([line, *(f"  {_bounded(each)}" for each in below[-MAX_TRACEBACK:])])


class JournalFormatter(Formatter):
    """The same for systemd's journal, which takes each line's priority from its beginning."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
        priority = _PRIORITIES.get(record.levelno, "")
        return "\n".join(f"{priority}{line}" for line in super().format(record).split("\n"))


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether a stream goes to the journal, as systemd.exec(5) tells to find out.

    The variable alone does not say so: a terminal that systemd started hands it down.
    """
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # not a file, or closed
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _bounded(text: str) -> str:
    # Cut first, so that little of much is looked at; again behind, for an escape is longer.
    shown = printable(text[: MAX_LINE + 1])
    return shown if len(shown) <= MAX_LINE else shown[: MAX_LINE - 3] + "..."


@dataclass(slots=True)
class _Bucket:
    """Fills with time, up to `burst`; a line takes one of it.

    Attributes:
      burst: Lines.
      interval: Seconds for one line.
      since: When it held `level`, seconds of the clock.
      level: Lines.
      left_out: Lines, since the last that was written.
    """

    burst: int
    interval: float
    since: float
    level: float
    left_out: int = 0

    def fill(self, now: float) -> float:
        """Bring the level up to date, and return it."""
        self.level = min(self.burst, self.level + (now - self.since) / self.interval)
        self.since = now
        return self.level


_Key = tuple[str, str, JID | None]
_ANYTHING: _Key = ("", "", None)


class Limiter(logging.Filter):
    """Lets only so many lines through about one matter, and about one matter of one peer.

    A matter is a logger with a message before its arguments are put in; a peer is the first
    argument that is a JID, whatever its resource.

    Args:
      clock: Seconds, of a clock that never goes back.
    """

    # The attribute of a record with how many like it were left out in front of it.
    LEFT_OUT = "left_out"

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._buckets: dict[_Key, _Bucket] = {}
        self._tidied = clock()
        # Records come from the threads of transfers as well.
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is to be written."""
        matter, peer = (record.name, str(record.msg)[:MAX_LINE]), _peer(record)
        with self._lock:
            now = self._clock()
            if peer is None:
                buckets = [self._bucket((*matter, None), BURST, INTERVAL, now)]
            else:
                # Of the peer first: one that floods takes nothing away from the others.
                buckets = [
                    self._bucket((*matter, peer), BURST, INTERVAL, now),
                    self._bucket((*matter, None), BURST_OF_ALL, INTERVAL_OF_ALL, now),
                ]
            for bucket in buckets:
                if bucket.fill(now) < 1:
                    bucket.left_out += 1
                    return False
            for bucket in buckets:
                bucket.level -= 1
            setattr(record, self.LEFT_OUT, sum(bucket.left_out for bucket in buckets))
            for bucket in buckets:
                bucket.left_out = 0
            return True

    def _bucket(self, key: _Key, burst: int, interval: float, now: float) -> _Bucket:
        if key not in self._buckets and len(self._buckets) >= MAX_MATTERS:
            self._tidy(now)
            if len(self._buckets) >= MAX_MATTERS:
                key, burst, interval = _ANYTHING, BURST_OF_ALL, INTERVAL_OF_ALL
        return self._buckets.setdefault(key, _Bucket(burst, interval, now, burst))

    def _tidy(self, now: float) -> None:
        """Forget the matters that are long over, but do not look for them all the time."""
        if now - self._tidied < INTERVAL:
            return
        self._tidied = now
        for key, bucket in list(self._buckets.items()):
            if bucket.fill(now) >= bucket.burst:
                del self._buckets[key]


def _peer(record: logging.LogRecord) -> JID | None:
    arguments = record.args if isinstance(record.args, tuple) else ()
    return next((each.bare for each in arguments if isinstance(each, JID)), None)
