"""Brings what changed to whom it is owed: folders in, deliveries out, the journal between."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import trio

from syncd.errors import (
    ChangedError,
    ErrorType,
    JournalError,
    NotFoundError,
    SyncdError,
    TransferError,
)
from syncd.sync.folder import Folder
from syncd.sync.journal import OUTSIDE
from syncd.sync.plan import (
    RETRY_LAST,
    Delivery,
    FileVersion,
    Running,
    next_deliveries,
    retry_delay,
)
from syncd.sync.walk import BATCH, look_outside

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from syncd.sync.journal import Arrival, Counts, Journal, Standing

T = TypeVar("T")

log = logging.getLogger(__name__)

# More than can run at a time, so that there is a choice; not so many that they weigh.
CANDIDATES = 64  # deliveries of one peer
# The status shows a handful; the log has them all.
MAX_ERRORS = 20  # errors
# A transfer that was cut goes on at once if it got so much further than the last time, at its
# beginning, which the peer has kept, or at its end, which it may have. So a line that breaks
# all the time costs little, and a full disk over there does not have us send for ever what it
# cannot take.
PROGRESS = 65_536  # bytes
# Those that were cut lately are remembered for that; more than can run are waiting.
MAX_REACHED = 1_024  # deliveries
# A file that changed while it was sent is looked at again; by then it is owed anew.
AFTER_CHANGE = 2.0  # seconds
# Files outside any folder that are looked at at a time; their disks may hang.
MAX_LOOKS = 4  # threads
# How soon the journal is tried again when its disk refuses to be written.
JOURNAL_RETRY = 5.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRule:
    """One folder, as the user wants it.

    Attributes:
      id: Its id, the same at both ends.
      path: Where it is.
      send_to: Who gets its files: JIDs as configured.
      settle: How long a file written in place must rest, seconds.
    """

    id: str
    path: Path
    send_to: tuple[str, ...]
    settle: float


@dataclass(frozen=True, slots=True)
class Sent:
    """How a delivery ended well.

    Attributes:
      outcome: ``delivered``: the peer confirmed it; ``sent``: it cannot confirm.
      digest: BLAKE3 of the content, hexadecimal.
      in_place: The peer has it under this very path, and not beside another file there.
    """

    outcome: Literal["delivered", "sent"]
    digest: str
    in_place: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A delivery that failed.

    Attributes:
      at: Seconds since 1970.
    """

    at: float
    peer: str
    folder: str
    path: str
    text: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderState:
    """How a folder stands.

    Attributes:
      files: How many it holds.
      settling: How many have changed and do not rest yet.
      scanning: Whether a scan is under way.
      problem: Why it cannot be used, or empty.
      hint: What to do about it.
      skipped: What cannot be sent: path and reason, a few of them.
      unwatched: What changes in some of its directories is found only by a scan.
    """

    files: int
    settling: int
    scanning: bool
    problem: str
    hint: str
    skipped: tuple[tuple[str, str], ...]
    unwatched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """How everything stands.

    Attributes:
      folders: By id.
      counts: Of the journal.
      counted: How old the counts may be, seconds: so long the journal's disk has been at work.
      failures: The last ones, newest first.
    """

    folders: dict[str, FolderState]
    counts: Counts
    counted: float
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reached:
    """How far a delivery was when it was cut, and it was worth going on with at once.

    Attributes:
      began: Where its bytes began, the last time.
      end: Where they ended, at most.
      attempts: How many had failed before.
    """

    began: int
    end: int
    attempts: int


_NOWHERE = _Reached(began=-PROGRESS, end=0, attempts=0)


class Engine:
    """Delivers what changes.

    Args:
      journal: Open.
      rules: The folders.
      send: Sends one delivery; raises a `SyncdError` if it could not. It calls `answered` when
        the peer has taken the offer.
      limit_of: How many deliveries may run to a peer.
      places: How many deliveries can move bytes at a time.
      others: Who can be sent files outside any folder, beside whom the folders name.
      clock: Seconds since 1970.
    """

    def __init__(
        self,
        journal: Journal,
        rules: Sequence[FolderRule],
        send: Callable[[Delivery], Awaitable[Sent]],
        *,
        limit_of: Callable[[str], int],
        places: int,
        others: Collection[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._rules = {rule.id: rule for rule in rules}
        self._send = send
        self._limit_of = limit_of
        self._places = places
        self._known = {peer for rule in rules for peer in rule.send_to} | set(others)
        self._clock = clock
        self._folders = {rule.id: self._folder(rule) for rule in rules}
        self._online: frozenset[str] = frozenset()
        self._came_online: set[str] = set()
        self._came_anew: set[str] = set()
        self._running: dict[tuple[str, str, str], Running] = {}  # by slot
        self._reached: dict[int, _Reached] = {}  # by the id of the delivery
        self._failures: deque[Failure] = deque(maxlen=MAX_ERRORS)
        self._wake = trio.Event()
        self._outside_limiter = trio.CapacityLimiter(MAX_LOOKS)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Watch and deliver, for ever; a delivery that is cancelled is still owed."""
        owed_to = {rule.id: rule.send_to for rule in self._rules.values()}
        await self._persist(
            lambda: self._journal.forget_others({**owed_to, OUTSIDE: self._known})
        )
        async with trio.open_nursery() as nursery:
            for folder in self._folders.values():
                nursery.start_soon(folder.run)
            task_status.started()
            await self._deliver(nursery)

    def set_online(self, peers: frozenset[str], anew: frozenset[str] = frozenset()) -> None:
        """Only these can be sent to now; who came back is tried at once.

        Args:
          peers: As configured.
          anew: Of these, whose syncd has just started: even what it had refused is offered
            once more, as its user may have changed the configuration.
        """
        self._came_online |= peers - self._online
        self._came_anew |= anew
        self._online = peers
        self._wake.set()

    def answered(self, delivery: Delivery) -> None:
        """The peer has taken the offer of this running delivery; bytes are about to move."""
        running = self._running[delivery.slot]
        self._running[delivery.slot] = replace(running, answered=True)

    async def send_outside(self, path: str, peer: str) -> None:
        """Owe one file, which may lie anywhere, to a peer; on disk when this returns.

        A file that was sent before is sent again.

        Args:
          path: Absolute.
          peer: As configured.

        Raises:
          NotFoundError: There is no such file, or the peer is not configured.
          SyncdError: The file cannot be sent, and why.
        """
        if peer not in self._known:
            raise NotFoundError(
                f"the configuration names no peer {peer}",
                hint='add it: [[peer]] jid = "..."; the peer then is asked to be seen',
            )
        await self._journal.send_anew(await self._look_outside(path), peer)
        self._wake.set()

    async def standing_outside(self, path: str, peer: str) -> Standing:
        """Say what has become of a file that was sent outside any folder."""
        return await self._journal.standing(OUTSIDE, path, peer)

    async def decided(self, account: str) -> None:
        """A person has decided about a peer (a bare JID): try at once what waited for that."""
        await self._persist(lambda: self._journal.unpark(account))
        self._wake.set()

    async def arriving(self, arrival: Arrival) -> None:
        """A received file is about to get its final name."""
        await self._journal.arriving(arrival)

    async def known_arrival(self, folder: str, path: str) -> Arrival | None:
        """What is known of a file that arrived; None if it did not arrive."""
        arrivals = await self._journal.arrivals(folder, path)
        if len(arrivals) < 2:
            return arrivals[0] if arrivals else None
        if folder not in self._folders:
            return arrivals[0]  # of the inbox, which nobody watches
        found = await self._folders[folder].identify(path)
        return next((known for known in arrivals if known.version == found), arrivals[0])

    async def kept_beside(self, folder: str, path: str) -> list[Arrival]:
        """What arrived for this path and was kept beside the file there."""
        return await self._journal.beside(folder, path)

    async def held(self, folder: str, path: str, account: str) -> FileVersion | None:
        """Which version of ours a peer, a bare JID, has had under this very path."""
        return await self._journal.held(folder, path, account)

    async def rescan(self) -> None:
        """Look through all folders; what lies there now is then settling or owed."""
        async with trio.open_nursery() as nursery:
            for folder in self._folders.values():
                nursery.start_soon(folder.rescan)

    async def statistics(self) -> Statistics:
        """How everything stands now; soon, whatever the disks do."""
        async with trio.open_nursery() as nursery:
            for folder in self._folders.values():
                nursery.start_soon(folder.count)
        # From here on without a pause: what leaves one of these sums is in another.
        busy_since = self._journal.busy_since
        return Statistics(
            folders={
                folder.id: FolderState(
                    files=folder.files,
                    settling=folder.settling,
                    scanning=folder.scanning,
                    problem=folder.problem,
                    hint=folder.hint,
                    skipped=tuple(folder.skipped),
                    unwatched=folder.unwatched,
                )
                for folder in self._folders.values()
            },
            counts=self._journal.counts(),
            counted=0.0 if busy_since is None else time.monotonic() - busy_since,
            failures=tuple(reversed(self._failures)),
        )

    def _folder(self, rule: FolderRule) -> Folder:
        async def settled(versions: list[FileVersion]) -> None:
            # On disk before anything is sent.
            await self._persist(lambda: self._journal.owe(versions, rule.send_to))
            self._wake.set()

        async def vanished(paths: list[str]) -> None:
            await self._persist(lambda: self._journal.gone(rule.id, paths))

        async def owed(after: str) -> list[str]:
            return await self._persist(lambda: self._journal.owed_paths(rule.id, after, BATCH))

        return Folder(rule.id, rule.path, rule.settle, settled, vanished, owed)

    async def _deliver(self, nursery: trio.Nursery) -> None:
        while True:
            self._wake = trio.Event()  # before the look, or a wake is lost
            while self._came_anew:
                peer = self._came_anew.pop()
                await self._persist(functools.partial(self._journal.unpark, peer))
            while self._came_online:
                peer = self._came_online.pop()
                await self._persist(functools.partial(self._journal.retry, peer))
            free = self._peers_with_room()
            pending = await self._persist(
                functools.partial(self._journal.pending, free, CANDIDATES)
            )
            now = self._clock()
            chosen, again = next_deliveries(
                pending,
                running=self._running.values(),
                online=self._online,
                limit_of=self._limit_of,
                places=self._places,
                now=now,
            )
            for delivery in chosen:
                self._running[delivery.slot] = Running(delivery, now)
                nursery.start_soon(self._run_one, delivery)
            # Not longer: the clock may be set meanwhile.
            with trio.move_on_after(min(max(0.0, again - now), RETRY_LAST)):
                await self._wake.wait()

    def _peers_with_room(self) -> list[str]:
        """Those who can get something now; of the others nobody need know what is owed."""
        counts = Counter(running.delivery.peer for running in self._running.values())
        return [peer for peer in self._online if counts[peer] < self._limit_of(peer)]

    async def _run_one(self, delivery: Delivery) -> None:
        version = delivery.version
        tried = False
        try:
            self._check_rests(delivery)
            tried = True
            sent = await self._send(delivery)
            self._reached.pop(delivery.id, None)
            await self._persist(
                lambda: self._journal.done(
                    delivery, sent.outcome, sent.digest, in_place=sent.in_place
                )
            )
        except ChangedError as error:
            await self._changed(delivery, error, tried=tried)
        except SyncdError as error:
            if self._got_further(delivery, error):
                # Not a failure, in the end: it goes on where it was as soon as it can.
                log.info("%s to %s: %s; going on", version.path, delivery.peer, error)
                return
            again = self._clock() + self._delay(delivery)
            waits = error.type is ErrorType.WAIT
            await self._failed(delivery, str(error), error.hint, again if waits else None)
        except Exception:
            # A bug of ours must not be retried for ever, nor stop everything else.
            log.exception("delivering %s to %s", version.path, delivery.peer)
            hint = "this is a bug in syncd; its log has the details"
            await self._failed(delivery, "an internal error", hint, None)
        finally:
            del self._running[delivery.slot]
            self._wake.set()

    def _check_rests(self, delivery: Delivery) -> None:
        """See that nobody is known to be at work on a file any more, if somebody was.

        Else what is sent may be half of a change that cannot be seen afterwards: some programs
        put size and mtime back.
        """
        version = delivery.version
        folder = self._folders.get(version.folder)
        if delivery.attempts and folder is not None and not folder.rests(version.path):
            raise ChangedError("the file is being changed")

    def _got_further(self, delivery: Delivery, error: SyncdError) -> bool:
        """Whether a delivery has only been cut, and is worth going on with at once."""
        before = self._reached.get(delivery.id, _NOWHERE)
        if not isinstance(error, TransferError) or error.type is not ErrorType.WAIT:
            return False
        end = error.began + error.moved
        further = error.began >= before.began + PROGRESS or end >= before.end + PROGRESS
        if not error.moved or not further:
            return False
        self._reached.pop(delivery.id, None)  # it becomes the youngest
        self._reached[delivery.id] = _Reached(
            began=error.began, end=max(end, before.end), attempts=delivery.attempts
        )
        if len(self._reached) > MAX_REACHED:
            del self._reached[next(iter(self._reached))]
        return True

    def _delay(self, delivery: Delivery) -> float:
        """How long to wait after a failure, seconds; only those without progress add up."""
        vain = delivery.attempts - self._reached.get(delivery.id, _NOWHERE).attempts
        return retry_delay(vain + 1, random.random())  # noqa: S311 - jitter

    async def _changed(self, delivery: Delivery, error: ChangedError, *, tried: bool) -> None:
        """What was to be sent is not there any more; something else may be."""
        self._reached.pop(delivery.id, None)
        version, peer = delivery.version, delivery.peer
        log.info("%s: %s; looking again", version.path, error)
        again = self._clock() + AFTER_CHANGE
        text, hint = str(error), error.hint
        if version.folder != OUTSIDE:
            if not tried:
                # Nothing can have failed. It rests then if it does not change once more; and
                # a version that is new is owed as soon as that rests.
                settle = self._rules[version.folder].settle
                again = self._clock() + min(max(settle, AFTER_CHANGE), RETRY_LAST)
            await self._persist(
                lambda: self._journal.failed(delivery, text, hint, again, counts=tried)
            )
            self._folders[version.folder].look_again(version.path)
            return
        try:
            found = await self._look_outside(version.path)
        except NotFoundError as gone:
            text = f"the file went away before it was sent: {gone}"
            await self._failed(delivery, text, gone.hint, None)
            await self._persist(lambda: self._journal.gone(OUTSIDE, [version.path]))
        except SyncdError as reason:
            await self._failed(delivery, str(reason), reason.hint, None)
        else:
            await self._persist(lambda: self._journal.send_anew(found, peer, not_before=again))

    async def _look_outside(self, path: str) -> FileVersion:
        look = await trio.to_thread.run_sync(
            look_outside, Path(path), limiter=self._outside_limiter
        )
        return FileVersion(
            folder=OUTSIDE,
            path=path,
            size=look.size,
            mtime_ns=look.mtime_ns,
            inode=look.inode,
        )

    async def _failed(
        self, delivery: Delivery, text: str, hint: str, again: float | None
    ) -> None:
        version = delivery.version
        log.warning("%s not delivered to %s: %s", version.path, delivery.peer, text)
        self._failures.append(
            Failure(
                at=self._clock(),
                peer=delivery.peer,
                folder=version.folder,
                path=version.path,
                text=text,
                hint=hint,
            )
        )
        await self._persist(lambda: self._journal.failed(delivery, text, hint, again))

    async def _persist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Use the journal; wait while its disk refuses to be written, which others must end.

        Raises:
          JournalError: The journal is damaged: only a new start finds out what is left.
        """
        told = False
        while True:
            try:
                # What has happened is noted even if we are being stopped.
                with trio.CancelScope(shield=True):
                    return await work()
            except JournalError as error:
                if error.type is not ErrorType.WAIT:
                    raise
                if not told:
                    told = True
                    log.error("%s; %s", error, error.hint)  # noqa: TRY400 - no bug
            await trio.sleep(JOURNAL_RETRY)
