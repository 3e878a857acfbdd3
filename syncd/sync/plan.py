"""Which delivery starts now, and when to look again. Sans-IO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# Each running delivery has a task and, while bytes flow, a thread; beyond this many the
# disk and the link only get slower.
MAX_RUNNING = 32  # deliveries
# A file up to this size never waits for a place behind larger ones: one place of each peer
# is kept free of files above it.
SMALL = 4 * 1024 * 1024  # bytes

# Doubling from the first to the last; a peer that comes online is tried at once anyway.
RETRY_FIRST = 2.0  # seconds
RETRY_LAST = 900.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class FileVersion:
    """One version of one file.

    Attributes:
      folder: Id of its folder.
      path: Below the folder, ``/`` between the components, as on disk.
      size: Bytes.
      mtime_ns: Time of the last change, nanoseconds since 1970.
      inode: Number of the inode.
    """

    folder: str
    path: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A version that is owed to a peer.

    Attributes:
      id: Of the journal.
      version: What is owed.
      peer: To whom, as configured.
      attempts: How often it was tried.
      not_before: When it may be tried again, seconds since 1970.
    """

    id: int
    version: FileVersion
    peer: str
    attempts: int = 0
    not_before: float = 0.0

    @property
    def slot(self) -> tuple[str, str, str]:
        """What no two running deliveries may share."""
        return self.peer, self.version.folder, self.version.path


def next_deliveries(
    pending: Iterable[Delivery],
    *,
    running: Collection[Delivery],
    online: frozenset[str],
    parallel: int,
    now: float,
) -> tuple[list[Delivery], float]:
    """Choose what to start.

    Peers take turns; a peer's deliveries start in the order given, but its last place is kept
    for small files, so that none waits for a huge one.

    Args:
      pending: What is owed, in the order in which it shall start.
      running: What has been started.
      online: The peers that can be sent to.
      parallel: How many may run to one peer.
      now: Seconds since 1970.

    Returns:
      The deliveries to start now, and when to ask again (`math.inf`: only when something
      changes).
    """
    taken = {delivery.slot for delivery in running}
    count: dict[str, int] = {}
    large: dict[str, int] = {}
    for delivery in running:
        count[delivery.peer] = count.get(delivery.peer, 0) + 1
        large[delivery.peer] = large.get(delivery.peer, 0) + (delivery.version.size > SMALL)
    queues: dict[str, list[Delivery]] = {}
    wake = math.inf
    for delivery in pending:
        if delivery.peer not in online or delivery.slot in taken:
            continue
        # No retry is set further off than RETRY_LAST: then the clock was set back.
        if now < delivery.not_before <= now + RETRY_LAST:
            wake = min(wake, delivery.not_before)
            continue
        queues.setdefault(delivery.peer, []).append(delivery)
    chosen: list[Delivery] = []
    for queue in queues.values():
        queue.reverse()  # so that pop() takes the oldest
    while queues and len(running) + len(chosen) < MAX_RUNNING:
        for peer in list(queues):
            picked = _pop(queues, peer, taken, large, count, parallel)
            if picked is None:
                continue
            chosen.append(picked)
            taken.add(picked.slot)
            count[peer] = count.get(peer, 0) + 1
            large[peer] = large.get(peer, 0) + (picked.version.size > SMALL)
            if len(running) + len(chosen) >= MAX_RUNNING:
                break
    return chosen, wake


def _pop(
    queues: dict[str, list[Delivery]],
    peer: str,
    taken: set[tuple[str, str, str]],
    large: dict[str, int],
    count: dict[str, int],
    parallel: int,
) -> Delivery | None:
    """Take the next delivery of a peer; drops its queue when there is none."""
    queue = queues[peer]
    if count.get(peer, 0) < parallel:
        room_for_large = large.get(peer, 0) < max(1, parallel - 1)
        while queue:
            delivery = queue.pop()
            if delivery.slot in taken:
                continue
            if delivery.version.size <= SMALL or room_for_large:
                return delivery
    del queues[peer]
    return None


def retry_delay(attempts: int, jitter: float) -> float:
    """How long to wait after a failed attempt.

    Args:
      attempts: How many there were, at least 1.
      jitter: 0 to 1, so that many failures of one moment do not come back as one.

    Returns:
      Seconds.
    """
    delay = RETRY_FIRST * 2.0 ** min(max(attempts, 1) - 1, 30)
    return min(delay, RETRY_LAST) * (0.5 + jitter / 2)
