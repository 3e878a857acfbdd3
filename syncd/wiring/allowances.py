"""What one peer may take of us: offers, a file's length, bytes and files in a day. Sans-IO.

All of it is per bare JID, and only of those who are accepted from: everybody else is turned
away before anything is counted. Bytes are counted as they come, also those of a file that is
never finished, since they cost the same. A file costs a disk something even when it is empty,
and so does a directory that is made for it: each counts as one, and for `ENTRY` bytes at
least. What an accepted offer may still bring is set aside, so that many offers at once do not
add up to more; a directory for each of its files, as none of them may be the one that comes,
and counted for the first. The count is kept in memory: it begins anew when the daemon starts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.errors import ErrorType, StanzaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from syncd.xmpp.jid import JID

# A folder of small files is offered as fast as the receiver's disk makes them durable, some
# 100 in a second; ten times that, and nobody's disk keeps up anyway.
OFFER_RATE = 1_000.0  # offers per second of one peer, in the long run
OFFER_BURST = 2_000  # offers that may come at once

# The day of a quota slides in steps of this.
HOUR = 3600.0  # seconds
DAY = 24  # hours

# What a file or a directory takes of a quota at least: a block of most file systems, which is
# about what its name, its inode and its first byte take of the disk.
ENTRY = 4_096  # bytes

# More than all files of the world together.
_ANY = 1 << 80  # bytes, or files


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the user has decided for one peer; 0 is no limit.

    Attributes:
      max_file: The longest file, bytes.
      quota: Bytes in any 24 hours, give or take one.
      max_files: Files, and directories made for them, in the same time.
    """

    max_file: int = 0
    quota: int = 0
    max_files: int = 0


class _Day:
    """A sum over the last 24 hours."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Hours with what came in each, the oldest first; no more than a day of them.
        self._hours: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return len(self._hours)

    def add(self, count: int) -> None:
        """Count something that came now."""
        if count <= 0:
            return
        hour = int(self._clock() // HOUR)
        if self._hours and self._hours[-1][0] == hour:
            count += self._hours.pop()[1]
        self._hours.append((hour, count))
        self.sum()

    def sum(self) -> int:
        """How much came lately; forgets what came earlier."""
        oldest = int(self._clock() // HOUR) - DAY
        while self._hours and self._hours[0][0] < oldest:
            self._hours.popleft()
        return sum(count for _, count in self._hours)


class Allowance:
    """What one bare JID may take.

    Args:
      clock: Seconds, of a clock that never goes back.
      terms: As the user has decided.
    """

    def __init__(self, clock: Callable[[], float], terms: Terms) -> None:
        self._clock = clock
        self._max_file = terms.max_file or _ANY
        self._quota = terms.quota or _ANY
        self._max_files = terms.max_files or _ANY
        self._offers = float(OFFER_BURST)
        self._since = clock()
        self._came = _Day(clock)
        self._made = _Day(clock)
        self._reserved = 0  # bytes
        self._to_make = 0  # files and directories

    def admit(self) -> None:
        """Count an offer.

        Raises:
          StanzaError: There were too many lately; the peer shall wait.
        """
        now = self._clock()
        self._offers = min(OFFER_BURST, self._offers + (now - self._since) * OFFER_RATE)
        self._since = now
        if self._offers < 1:
            raise StanzaError(ErrorType.WAIT, "resource-constraint", "too many offers at once")
        self._offers -= 1

    def check(self, size: int) -> None:
        """See that a file may come at all.

        Args:
          size: Its length in bytes; 0 if that is not known.

        Raises:
          StanzaError: It is longer than this peer's may be.
        """
        longest = min(self._max_file, self._quota)
        if size > longest:
            raise StanzaError(
                ErrorType.CANCEL,
                "not-acceptable",
                f"the file has {size} bytes; {longest} are accepted from you at most",
            )

    def reserve(self, wanted: int, *, known: bool, entries: int) -> int:
        """Set aside what an accepted offer may bring; to be settled in the end.

        Args:
          wanted: How many bytes that is.
          known: Otherwise it is only the most that there may be, and less will do.
          entries: How many files and directories have to be made for it.

        Returns:
          How many bytes may come.

        Raises:
          StanzaError: They are more than what is left for today, and the peer shall wait; or
            more than there is in any day.
        """
        self._check_entries(entries, wanted if known else 0)
        left = self._quota - self._came.sum() - self._reserved
        directories = max(0, entries - 1) * ENTRY
        granted = wanted if known else min(wanted, self._max_file, left - directories)
        if _cost(granted, entries) > left or (granted <= 0 < wanted):
            raise StanzaError(
                ErrorType.WAIT,
                "resource-constraint",
                "you have sent as much as is accepted from you in a day",
            )
        if entries > self._max_files - self._made.sum() - self._to_make:
            raise StanzaError(
                ErrorType.WAIT,
                "resource-constraint",
                "you have sent as many files as are accepted from you in a day",
            )
        self._reserved += _cost(granted, entries)
        self._to_make += entries
        return granted

    def settle(self, granted: int, came: int, *, entries: int, made: int) -> None:
        """End what `reserve` began.

        Args:
          granted: What it returned.
          came: How many bytes did come.
          entries: As given to it.
          made: How many of them were made for this one.
        """
        self._reserved -= _cost(granted, entries)
        self._to_make -= entries
        self._came.add(_cost(came, made))
        self._made.add(made)

    def _check_entries(self, entries: int, size: int) -> None:
        """Refuse for good what no day allows."""
        if entries > self._max_files:
            raise StanzaError(
                ErrorType.CANCEL,
                "not-acceptable",
                f"the file needs {entries - 1} new directories; {self._max_files} files and "
                "directories are accepted from you in a day",
            )
        if _cost(size, entries) > self._quota:
            raise StanzaError(
                ErrorType.CANCEL,
                "not-acceptable",
                f"the file and its {entries - 1} new directories count as "
                f"{_cost(size, entries)} bytes; {self._quota} are accepted from you in a day",
            )


def _cost(size: int, entries: int) -> int:
    """What so many bytes take of a quota, with the files and directories made for them."""
    return max(size, ENTRY) + (entries - 1) * ENTRY if entries else max(size, 0)


class Allowances:
    """Those of all peers.

    Args:
      clock: Seconds, of a clock that never goes back.
      terms: Of a bare JID, where there are any.
    """

    def __init__(self, clock: Callable[[], float], terms: Mapping[JID, Terms]) -> None:
        self._clock = clock
        self._terms = terms
        self._known: dict[JID, Allowance] = {}

    def of(self, peer: JID) -> Allowance:
        """What a bare JID may take.

        Args:
          peer: One whose files are accepted: it is remembered.
        """
        if (known := self._known.get(peer)) is None:
            known = Allowance(self._clock, self._terms.get(peer, Terms()))
            self._known[peer] = known
        return known
