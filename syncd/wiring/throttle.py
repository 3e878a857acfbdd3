"""Limits of bandwidth: one bucket for everything, one for each peer. Sans-IO.

A bucket is not filled, it owes time: `Bucket.take` counts bytes that have moved already and
says when the last of them would have, at the limit. Whoever moved them waits until then, so
those that share a bucket queue up behind each other, each for its own bytes: at the same size
of steps they get the same share.

A limit can be changed at any moment, and what was owed at the old one is owed no more. Bytes
that moved while the old one held are not counted at the new one either: a step that was right
without a limit could take half a minute at a low one, and those of all who share it add up,
beyond the patience of their peers. Whoever takes therefore says under which limits its bytes
began to move (`Throttle.limits`), looks now and then while it waits whether they still hold,
and begins anew with a small step if not. So a change costs a limit at most a step of each.

What a peer sends is slowed down by reading no faster, and that has one seam. A fast connection
makes the kernel's receive buffer grow to many MiB, and Linux lets nothing more come into a full
one before a sixteenth of it is free again: under a limit that is lowered on the way, the sender
sees nothing move for so long (measured: 45 s for 11 MB at 16 KiB/s). Where that is more than
its patience, the transfer breaks once, and goes on where it was over a new connection, whose
buffer stays small. Nothing better is known: a buffer that was made smaller never grows again,
and would slow down the night of a huge file because of a limit for the day.

Data threads take from several buckets at once, and several threads from one: each take happens
under a lock, the same for all throttles that share a bucket, and nothing is waited for under
it. Clock and lock are arguments::

    lock, all_peers = threading.Lock(), Bucket(config.rate)
    throttle = Throttle([all_peers, this_peer], clock=time.monotonic, lock=lock)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

# What a bucket lets through at once after a silence: enough that a thread that wakes some
# milliseconds late loses nothing of its share, and too little for anybody to notice.
BURST: Final = 0.1  # seconds

# Slower, the peer's patience with a bytestream on which nothing moves would run out.
MIN_RATE: Final = 1024.0  # bytes per second


class Bucket:
    """One limit; shared by all throttles that it concerns.

    Args:
      rate: Bytes per second, at least `MIN_RATE`; `math.inf` for no limit.

    Attributes:
      changes: How often the rate has changed.

    Raises:
      ValueError: It is lower than that.
    """

    def __init__(self, rate: float = math.inf) -> None:
        self._free_at = -math.inf  # when everything so far has moved, at the limit
        self._rate = 0.0
        self.changes = 0
        self.rate = rate

    @property
    def rate(self) -> float:
        """Bytes per second; to be set under the lock of those who take.

        Another one than before lets what is owed be forgotten.
        """
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        if not rate >= MIN_RATE:
            raise ValueError(f"a limit of {rate} bytes a second is too low")
        if rate != self._rate:
            self._rate = rate
            self._free_at = -math.inf
            self.changes += 1

    def take(self, count: int, now: float) -> float:
        """Count bytes that have moved.

        Args:
          count: How many.
          now: The time, seconds.

        Returns:
          How long to wait before more move, in seconds.
        """
        self._free_at = max(self._free_at, now - BURST) + count / self._rate
        return max(0.0, self._free_at - now)


class Throttle:
    """Several limits that hold together; for the data threads of the transfers they concern.

    Args:
      buckets: The limits.
      clock: The time in seconds, never going back.
      lock: The same for all throttles that share a bucket.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        clock: Callable[[], float],
        lock: AbstractContextManager[object],
    ) -> None:
        self._buckets = tuple(buckets)
        self._clock = clock
        self._lock = lock

    @property
    def limits(self) -> int:
        """Which limits hold: another number after each change."""
        return sum(bucket.changes for bucket in self._buckets)

    def take(self, count: int, /, limits: int | None = None) -> float:
        """Count bytes that have just moved.

        Args:
          count: How many.
          limits: Under which they began to; if others hold by now, they are not counted. None:
            they are in any case.

        Returns:
          How long to wait before more move, in seconds; the strictest limit says it.
        """
        with self._lock:
            if limits is not None and limits != self.limits:
                return 0.0
            now = self._clock()
            return max((bucket.take(count, now) for bucket in self._buckets), default=0.0)
