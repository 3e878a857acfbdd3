"""What one peer may take of us: offers, the length of a file, bytes in a day. Sans-IO.

All of it is per bare JID, and only of those who are accepted from: everybody else is turned
away before anything is counted. Bytes are counted as they come, also those of a file that is
never finished, since they cost the same; what an accepted offer may still bring is set aside,
so that many offers at once do not add up to more. The count is kept in memory: it begins anew
when the daemon starts.
"""

from __future__ import annotations

from collections import deque
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

# More than all files of the world together.
_ANY = 1 << 80  # bytes


class Allowance:
    """What one bare JID may take.

    Args:
      clock: Seconds, of a clock that never goes back.
      max_file: The longest file, bytes; 0: any.
      quota: Bytes in any 24 hours, give or take one; 0: any number.
    """

    def __init__(self, clock: Callable[[], float], *, max_file: int, quota: int) -> None:
        self._clock = clock
        self._max_file = max_file or _ANY
        self._quota = quota or _ANY
        self._offers = float(OFFER_BURST)
        self._since = clock()
        # Hours with how many bytes came in each, the oldest first; no more than a day of them.
        self._came: deque[tuple[int, int]] = deque()
        self._reserved = 0

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

    def reserve(self, wanted: int, *, known: bool) -> int:
        """Set aside what an accepted offer may bring; to be settled in the end.

        Args:
          wanted: How many bytes that is.
          known: Otherwise it is only the most that there may be, and less will do.

        Returns:
          How many bytes may come.

        Raises:
          StanzaError: They are more than what is left for today; the peer shall wait.
        """
        left = self._quota - self._today() - self._reserved
        granted = wanted if known else min(wanted, self._max_file, left)
        if granted > left or (granted <= 0 < wanted):
            raise StanzaError(
                ErrorType.WAIT,
                "resource-constraint",
                "you have sent as much as is accepted from you in a day",
            )
        self._reserved += granted
        return granted

    def settle(self, granted: int, came: int) -> None:
        """End what `reserve` began.

        Args:
          granted: What it returned.
          came: How many bytes did come.
        """
        self._reserved -= granted
        if came <= 0:
            return
        hour = int(self._clock() // HOUR)
        if self._came and self._came[-1][0] == hour:
            came += self._came.pop()[1]
        self._came.append((hour, came))
        self._today()

    def _today(self) -> int:
        """How many bytes came lately; forgets what came earlier."""
        oldest = int(self._clock() // HOUR) - DAY
        while self._came and self._came[0][0] < oldest:
            self._came.popleft()
        return sum(count for _, count in self._came)


class Allowances:
    """Those of all peers.

    Args:
      clock: Seconds, of a clock that never goes back.
      granted: The longest file and the quota of a bare JID, where there are any.
    """

    def __init__(
        self, clock: Callable[[], float], granted: Mapping[JID, tuple[int, int]]
    ) -> None:
        self._clock = clock
        self._granted = granted
        self._known: dict[JID, Allowance] = {}

    def of(self, peer: JID) -> Allowance:
        """What a bare JID may take.

        Args:
          peer: One whose files are accepted: it is remembered.
        """
        if (known := self._known.get(peer)) is None:
            max_file, quota = self._granted.get(peer, (0, 0))
            known = Allowance(self._clock, max_file=max_file, quota=quota)
            self._known[peer] = known
        return known
