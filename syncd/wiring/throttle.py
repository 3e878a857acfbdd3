"""Limits of bandwidth: one bucket for everything, one for each peer. Sans-IO.

A bucket is not filled, it owes time: `Bucket.take` counts bytes that have moved already and
says when the last of them would have, at the limit. Whoever moved them waits until then, so
those that share a bucket queue up behind each other, each for its own bytes: at the same size
of steps they get the same share. Because it is time that is owed and not bytes, a limit can be
changed at any moment, and what comes next already moves at the new one.

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

    Raises:
      ValueError: It is lower than that.
    """

    def __init__(self, rate: float = math.inf) -> None:
        self._free_at = -math.inf  # when everything so far has moved, at the limit
        self.rate = rate

    @property
    def rate(self) -> float:
        """Bytes per second; may be set at any time, from any thread."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        if not rate >= MIN_RATE:
            raise ValueError(f"a limit of {rate} bytes a second is too low")
        self._rate = rate

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

    def take(self, count: int, /) -> float:
        """Count bytes that have just moved.

        Returns:
          How long to wait before more move, in seconds; the strictest limit says it.
        """
        with self._lock:
            now = self._clock()
            return max((bucket.take(count, now) for bucket in self._buckets), default=0.0)
