"""The limits of bandwidth at work: for each peer a throttle in either direction."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

from syncd.wiring.throttle import MIN_RATE, Bucket, Throttle

if TYPE_CHECKING:
    from syncd.sync.limits import Rates
    from syncd.xmpp.jid import JID


class Throttles:
    """All of them; those for everybody are shared.

    There is one for each peer that is configured, also where there is no limit: one that is
    set later holds for the transfers that run by then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._up: dict[str, Bucket] = {"": Bucket()}
        self._down: dict[str, Bucket] = {"": Bucket()}

    def change(self, peer: str, rates: Rates) -> None:
        """Set limits.

        Args:
          peer: Whose: a bare JID, or empty for everybody's together.
          rates: Bytes per second; 0 lifts a limit.
        """
        with self._lock:
            for buckets, rate in ((self._up, rates.up), (self._down, rates.down)):
                bucket = buckets.setdefault(peer, Bucket())
                bucket.rate = max(rate, MIN_RATE) if rate else math.inf

    def up(self, peer: JID) -> Throttle:
        """What slows down the bytes to a bare JID."""
        return self._throttle(self._up, peer)

    def down(self, peer: JID) -> Throttle:
        """What slows down the bytes from a bare JID."""
        return self._throttle(self._down, peer)

    def _throttle(self, buckets: dict[str, Bucket], peer: JID) -> Throttle:
        own = buckets.setdefault(str(peer), Bucket())
        return Throttle([own, buckets[""]], clock=time.monotonic, lock=self._lock)
