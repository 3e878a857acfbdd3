"""Which delivery starts now, and when to look again. Sans-IO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

# Started deliveries, those included that only wait for their peer's answer: each is a task
# and an open file.
MAX_RUNNING = 32  # deliveries
# A file up to this size never waits for a place behind larger ones: one place of each peer,
# and one of all, is kept free of files above it.
SMALL = 4 * 1024 * 1024  # bytes
# Larger ones to a peer at a time, however many small ones may run: each keeps one of the eight
# threads that either end has for the other, and one is for small files.
MAX_LARGE = 7  # deliveries
# A delivery takes up one of the places that move bytes from its beginning, or more would be
# offered than can move. A peer that has not answered for so long may never do so: its place
# goes to somebody else, and if it answers after all, it waits for the next that is free.
ANSWER_GRACE = 5.0  # seconds

# Doubling from the first to the last; a peer that comes online is tried at once anyway.
RETRY_FIRST = 2.0  # seconds
RETRY_LAST = 900.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class FileVersion:
    """One version of one file.

    The ctime is no part of it: a ``chmod -R``, a hard link, a backup that puts the atime back
    would each send everything again. So a change that keeps the size and puts the mtime back
    makes no new version once the file was delivered, as with rsync's quick check. While a file
    settles, and while it is sent, the ctime does count: what is delivered is never torn.

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


@dataclass(frozen=True, slots=True)
class Running:
    """A delivery that was started and has not ended.

    Attributes:
      delivery: Which.
      began: When, seconds since 1970.
      answered: The peer has taken the offer: bytes move, or are about to.
    """

    delivery: Delivery
    began: float
    answered: bool = False


def next_deliveries(
    pending: Iterable[Delivery],
    *,
    running: Collection[Running],
    online: frozenset[str],
    limit_of: Callable[[str], int],
    places: int,
    now: float,
) -> tuple[list[Delivery], float]:
    """Choose what to start.

    The next place goes to the peer that has the fewest. Among those that have as many it goes
    to what was owed first, so that one file to several peers starts at about the same time,
    and is read from the disk once. A peer's deliveries start in the order given, but its last
    place, and the last of all, is kept for small files: none waits for a huge one.

    Args:
      pending: What is owed, in the order in which it shall start.
      running: What has been started.
      online: The peers that can be sent to.
      limit_of: How many may run to a peer.
      places: How many can move bytes at a time.
      now: Seconds since 1970.

    Returns:
      The deliveries to start now, and when to ask again (`math.inf`: only when something
      changes).
    """
    held = _Held(running, limit_of, places, now)
    queues: dict[str, list[Delivery]] = {}
    wake = math.inf
    for delivery in pending:
        if delivery.peer not in online or delivery.slot in held.slots:
            continue
        # No retry is set further off than RETRY_LAST: then the clock was set back.
        if now < delivery.not_before <= now + RETRY_LAST:
            wake = min(wake, delivery.not_before)
            continue
        queues.setdefault(delivery.peer, []).append(delivery)
    for queue in queues.values():
        queue.reverse()  # so that pop() takes the oldest
    chosen: list[Delivery] = []
    while queues and held.free > 0:
        peer = min(queues, key=lambda peer: (held.count(peer), _age(queues[peer][-1])))
        while queue := queues[peer]:
            delivery = queue.pop()
            if held.has_room_for(delivery):
                held.take(delivery)
                chosen.append(delivery)
                break
        if not queue:
            del queues[peer]
    if queues:
        wake = min(wake, held.next_silence)
    return chosen, wake


def _age(delivery: Delivery) -> tuple[float, int]:
    """What was owed earlier, and never failed, is less."""
    return delivery.not_before, delivery.id


class _Held:
    """The places that are taken, by whom and for what."""

    def __init__(
        self,
        running: Collection[Running],
        limit_of: Callable[[str], int],
        places: int,
        now: float,
    ) -> None:
        self.slots: set[tuple[str, str, str]] = set()
        self.free = MAX_RUNNING
        self.next_silence = math.inf  # when a place is given up, seconds since 1970
        self._limit_of = limit_of
        self._counts: dict[str, int] = {}
        self._large: dict[str, int] = {}
        self._all_large = 0
        self._places = places
        moving = 0
        for each in running:
            is_silent = not each.answered and now - each.began >= ANSWER_GRACE
            if not each.answered and not is_silent:
                self.next_silence = min(self.next_silence, each.began + ANSWER_GRACE)
            self.take(each.delivery, counts=not is_silent)
            moving += not is_silent
        self.free = min(MAX_RUNNING - len(running), places - moving)

    def count(self, peer: str) -> int:
        """How many run to a peer."""
        return self._counts.get(peer, 0)

    def has_room_for(self, delivery: Delivery) -> bool:
        """Whether it may start, as far as there are places at all."""
        limit, peer = self._limit_of(delivery.peer), delivery.peer
        if delivery.slot in self.slots or self.count(peer) >= limit:
            return False
        # Of one single place huge files must have their share.
        return delivery.version.size <= SMALL or (
            self._large.get(peer, 0) < min(MAX_LARGE, max(1, limit - 1))
            and self._all_large < max(1, self._places - 1)
        )

    def take(self, delivery: Delivery, *, counts: bool = True) -> None:
        """Give it a place; its peer's in any case, one of all if it counts."""
        is_large = delivery.version.size > SMALL
        self.slots.add(delivery.slot)
        self._counts[delivery.peer] = self.count(delivery.peer) + 1
        self._large[delivery.peer] = self._large.get(delivery.peer, 0) + is_large
        self._all_large += is_large and counts
        self.free -= 1


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
