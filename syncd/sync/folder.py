"""One watched folder: what changed in it, and what of that is whole.

Events are hints, never the truth: they are lost when the kernel's queue overflows, they come
twice, they lack a close. An event only says where to look; the truth is what `lstat` shows, a
scan of the whole folder at the start, after an overflow, now and then, and on request, and
what the journal knows.

More than 400 lines: what watchdog's threads tell, and what is made of it, are two halves of
one machine.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import trio
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import DEFAULT_OBSERVER_TIMEOUT, BaseObserver
from watchdog.observers.inotify import InotifyFullEmitter, InotifyObserver
from watchdog.observers.inotify_c import InotifyFD

from syncd.sync.plan import FileVersion
from syncd.sync.settle import Settling
from syncd.sync.walk import (
    BATCH,
    count_files,
    explain,
    is_ignored,
    look_at,
    missing,
    unsendable,
    walk,
)

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Container,
        Iterator,
        Sequence,
    )

    from watchdog.observers.inotify_c import (
        CallbackId,
        InotifyEvent,
        Mask,
        WatchCallback,
        WatchDescriptor,
    )

    from syncd.sync.settle import Look

T = TypeVar("T")

log = logging.getLogger(__name__)

# What watchdog shall tell: opened and closed-unwritten would echo our own reading.
_EVENTS: list[type[FileSystemEvent]] = [
    FileClosedEvent, FileCreatedEvent, FileMovedEvent, FileDeletedEvent,
    DirCreatedEvent, DirMovedEvent, DirDeletedEvent,
]  # fmt: skip

# What no event has told is found after this at the latest. A scan costs 0.25 s per 100,000
# files, in a thread.
RESCAN = 600.0  # seconds
# How soon a folder whose root went away is tried again, and how often it is looked for: no
# event tells of a root that is renamed, or that a disk is mounted over.
RETRY = 5.0  # seconds
# A walk that takes no longer may be made just to count the files for the status,
CHEAP_WALK = 0.05  # seconds
# which does not wait for it longer than this: a disk that hangs must not hang the status.
COUNT_PATIENCE = 0.01  # seconds
# After an overflow the burst may still go on.
AFTER_OVERFLOW = 0.5  # seconds
# Hints that wait for their look; beyond, one scan is cheaper than remembering all.
MAX_HINTS = 50_000  # events
# Directories that wait to be walked; likewise.
MAX_TREES = 1_000  # directories


class Folder:
    """Watches one folder.

    Args:
      folder: Its id.
      root: Where it is.
      quiet: How long a file written in place must rest, seconds.
      settled: Gets the versions that may be sent now, at most `BATCH` at a time.
      vanished: Gets the paths of files that were looked for and are gone, at most `BATCH`.
      owed: Tells which paths somebody waits for, in their order: those after the given one,
        a bounded number. No event tells of what went away while nobody watched.

    Attributes:
      files: How many files it holds, as of the last scan; `count` knows better.
      scanning: A scan that somebody may wait for is under way.
      problem: Why it cannot be used, or empty.
      skipped: What cannot be sent and why, a few of them.
      unwatched: The kernel watches no more directories, so that what changes in some of them
        is found only by a scan.
    """

    def __init__(
        self,
        folder: str,
        root: Path,
        quiet: float,
        settled: Callable[[list[FileVersion]], Awaitable[None]],
        vanished: Callable[[list[str]], Awaitable[None]],
        owed: Callable[[str], Awaitable[list[str]]],
    ) -> None:
        self.id = folder
        self.root = root
        self.files = 0
        self.scanning = True
        self.problem = ""
        self.hint = ""
        self.skipped: list[tuple[str, str]] = []
        self.unwatched = False
        self._settled = settled
        self._vanished = vanished
        self._owed = owed
        self._settling = Settling(quiet)
        self._quiet = quiet
        self._hints: deque[tuple[str, bool]] = deque()  # path, came by rename
        self._unseen: dict[str, None] = {}  # could not be looked at, in order
        self._unseen_until = math.inf  # when that is tried again
        self._trees: dict[str, None] = {}  # directories that came or went, in order
        self._in_hand = 0  # files and trees that are being looked at, and told
        self._overflowed = False
        self._scan_at = -math.inf
        self._wake = trio.Event()
        self._scan_waiters: list[trio.Event] = []
        self._changed = False  # since the files were counted
        self._walk_seconds = math.inf  # the last scan took
        self._limiter = trio.CapacityLimiter(1)
        self._counter = trio.CapacityLimiter(1)

    @property
    def settling(self) -> int:
        """How many files have changed and do not rest yet, or were not looked at yet."""
        # A sum without gaps: what leaves one of these is in the next, or was told.
        waiting = len(self._hints) + len(self._trees) + len(self._unseen) + self._overflowed
        return len(self._settling) + waiting + self._in_hand

    async def run(self) -> None:
        """Watch, for ever."""
        while True:
            try:
                async with self._watching() as watch:
                    self.problem = self.hint = ""
                    await self._work(watch)
            except OSError as error:
                self.problem, self.hint = explain(error, self.root)
                log.warning("folder %s: %s; %s", self.id, self.problem, self.hint)
                # Only now: who waits looks at `problem` next.
                self._release_waiters(len(self._scan_waiters))
            # The root is gone or cannot be watched: somebody has to bring it back.
            with trio.move_on_after(RETRY):
                await self._wake.wait()
            self._wake = trio.Event()
            self._scan_at = -math.inf

    async def rescan(self) -> None:
        """Scan now; returns when all that lies there now is settling or was told."""
        done = trio.Event()
        self._scan_waiters.append(done)
        self._scan_at = -math.inf
        self._wake.set()
        await done.wait()

    async def count(self) -> int:
        """How many files it holds: now, if that is soon known, else as of the last scan."""
        is_cheap = self._changed and self._walk_seconds < CHEAP_WALK and not self.problem
        if is_cheap and not self._counter.borrowed_tokens:
            self._changed = False
            with trio.move_on_after(COUNT_PATIENCE) as patience, contextlib.suppress(OSError):
                self.files = await trio.to_thread.run_sync(
                    count_files, self.root, abandon_on_cancel=True, limiter=self._counter
                )
            # What an abandoned walk finds is lost, and may be old by then.
            self._changed = self._changed or patience.cancelled_caught
        return self.files

    async def identify(self, path: str) -> FileVersion | None:
        """Say which version lies at a path now; None if no regular file does."""
        looks = await self._in_thread(look_at, self.root, {path: False}, [])
        look, _ = looks.get(path, (None, False))
        return None if look is None else self._version(path, look)

    def rests(self, path: str) -> bool:
        """Whether nothing is known to be at work on a file."""
        return path not in self._settling

    def look_again(self, path: str) -> None:
        """Look at a file as if it had changed."""
        self._hint(path, renamed=False)
        self._wake.set()

    def _hint(self, path: str, *, renamed: bool) -> None:
        if len(self._hints) >= MAX_HINTS:
            self._overflow()
        else:
            self._hints.append((path, renamed))

    async def _work(self, watch: _Watch) -> None:
        check_at = -math.inf
        while True:
            now = trio.current_time()
            if min(check_at, self._scan_at) <= now:
                await self._in_thread(watch.check, self.root)
                self.unwatched = watch.is_incomplete
                check_at = now + RETRY
            if self._scan_at <= now:
                await self._scan()
            await self._look_at_changes()
            if self._trees:
                await self._look_through(next(iter(self._trees)))
            elif not self._hints:
                looks_at = min(self._settling.next_look(), self._unseen_until)
                with trio.move_on_at(min(check_at, self._scan_at, looks_at)):
                    await self._wake.wait()
                self._wake = trio.Event()

    async def _look_at_changes(self) -> None:
        if self._unseen_until <= trio.current_time():
            self._unseen_until = math.inf
            again, self._unseen = self._unseen, {}
            for path in again:
                self._hint(path, renamed=False)
        await self._look_at_hints()
        due = self._settling.due(trio.current_time())
        for start in range(0, len(due), BATCH):
            await self._look(dict.fromkeys(due[start : start + BATCH], False))

    async def _look_at_hints(self) -> None:
        while self._hints:
            paths: dict[str, bool] = {}
            while self._hints and len(paths) < BATCH:
                path, renamed = self._hints.popleft()
                paths[path] = renamed or paths.get(path, False)
            await self._look(paths)

    async def _look(self, paths: dict[str, bool]) -> None:
        """Look at files; tell those that are whole."""
        with self._holding(sum(path not in self._settling for path in paths)):
            unseen: list[str] = []
            looks = await self._in_thread(look_at, self.root, paths, unseen)
        now = trio.current_time()
        for path in paths.keys() - looks.keys():
            # What was seen of it before means nothing any more.
            self._settling.looked(path, None, now)
        if unseen:
            self._postpone(unseen)
        whole, gone = [], []
        for path, (look, complete) in looks.items():
            if self._settling.looked(path, look, now, complete=complete):
                assert look is not None
                whole.append(self._version(path, look))
            elif look is None:
                gone.append(path)
        # First what went: a file may have gone from one name to another.
        with self._holding(len(whole)):
            if gone:
                await self._vanished(gone)
            if whole:
                await self._settled(whole)

    def _postpone(self, unseen: list[str]) -> None:
        """Come back to files of which it cannot be told now whether they are there."""
        log.warning("folder %s: %d files cannot be looked at now", self.id, len(unseen))
        self._unseen_until = min(self._unseen_until, trio.current_time() + RETRY)
        for path in unseen:
            if len(self._unseen) >= MAX_HINTS:
                self._overflow()
                break
            self._unseen[path] = None

    @contextlib.contextmanager
    def _holding(self, count: int) -> Iterator[None]:
        """Count what nothing else counts, so that nobody takes it for delivered."""
        self._in_hand += count
        try:
            yield
        finally:
            self._in_hand -= count

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        # One at a time: two walks of one disk are slower than one after the other.
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._limiter)

    async def _scan(self) -> None:
        waiting = len(self._scan_waiters)  # who comes later waits for another scan
        self.scanning = True
        self._scan_at = trio.current_time() + RESCAN
        self._overflowed = self._changed = False
        self._trees.clear()
        files, seconds, skipped = 0, 0.0, list[tuple[str, str]]()
        batches = walk(self.root, skipped)
        while True:
            began = time.monotonic()
            batch = await self._in_thread(next, batches, ())
            seconds += time.monotonic() - began
            if not batch:
                break
            files += len(batch)
            await self._take_scanned(batch)
            # A scan of a large folder takes long; what changes meanwhile does not wait for it.
            await self._look_at_changes()
        await self._miss("")
        self.files, self._walk_seconds, self.skipped = files, seconds, skipped
        self._release_waiters(waiting)

    async def _look_through(self, tree: str) -> None:
        """Look at all in a directory that came or went."""
        with self._holding(1):
            del self._trees[tree]  # what happens to it from now on is news
            batches = walk(self.root, [], tree)
            while batch := await self._in_thread(next, batches, ()):
                await self._take_scanned(batch)
                await self._look_at_changes()
            await self._miss(f"{tree}/")

    async def _take_scanned(self, batch: Sequence[tuple[str, Look]]) -> None:
        now, wall = trio.current_time(), time.time()
        # What has rested for long enough by its own times need not rest again. A time in the
        # future proves nothing.
        whole = [
            self._version(path, look)
            for path, look in batch
            if self._settling.looked(
                path, look, now, complete=wall - look.changed >= self._quiet
            )
        ]
        if whole:
            await self._settled(whole)

    async def _miss(self, prefix: str) -> None:
        """Tell what is owed and is not there any more, of the paths that begin like this."""
        last = prefix
        while paths := await self._owed(last):
            last = paths[-1]
            paths = [path for path in paths if path.startswith(prefix)]
            if gone := await self._in_thread(missing, self.root, paths):
                await self._vanished(gone)
            if not last.startswith(prefix):
                break  # they are sorted

    def _version(self, path: str, look: Look) -> FileVersion:
        return FileVersion(
            folder=self.id,
            path=path,
            size=look.size,
            mtime_ns=look.mtime_ns,
            inode=look.inode,
        )

    def _take(self, event: FileSystemEvent) -> None:
        """Turn an event into hints; in trio's thread."""
        self._changed = True
        # Of a move, the end that lies outside is empty.
        is_tree = isinstance(event, DirCreatedEvent | DirMovedEvent | DirDeletedEvent)
        renamed = isinstance(event, FileMovedEvent)
        for raw, came in ((event.src_path, False), (event.dest_path, renamed)):
            if not raw:
                continue
            path = os.path.relpath(os.fsdecode(raw), self.root)
            if is_ignored(path):
                continue
            if is_tree:
                self._tree(path)
            else:
                self._hint(path, renamed=came)

    def _tree(self, path: str) -> None:
        """Of the files in a directory that comes or goes there may be no events."""
        # The root is checked before a scan; what cannot be sent is noted by one.
        if path == os.curdir or unsendable(path) or len(self._trees) >= MAX_TREES:
            self._scan_at = min(self._scan_at, trio.current_time())
        elif not _is_below(path, self._trees):
            self._trees[path] = None

    def _overflow(self) -> None:
        if not self._overflowed:
            self._overflowed = True
            self._scan_at = min(self._scan_at, trio.current_time() + AFTER_OVERFLOW)
        self._hints.clear()

    def _release_waiters(self, count: int) -> None:
        """The first so many have waited for a scan that is over."""
        waiters, self._scan_waiters = self._scan_waiters[:count], self._scan_waiters[count:]
        self.scanning = False
        for waiter in waiters:
            waiter.set()

    @contextlib.asynccontextmanager
    async def _watching(self) -> AsyncIterator[_Watch]:
        token = trio.lowlevel.current_trio_token()
        events: deque[FileSystemEvent | None] = deque(maxlen=MAX_HINTS)

        def drain() -> None:
            while events:
                event = events.popleft()
                if event is None:
                    self._overflow()
                else:
                    self._take(event)
            self._wake.set()

        def tell(event: FileSystemEvent | None) -> None:
            # In a thread of watchdog's. A full deque loses its oldest hint: an overflow.
            events.append(None if len(events) == MAX_HINTS else event)
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(drain, idempotent=True)

        # Blocks for the whole tree: 0.3 s for 10,000 directories.
        watch = await trio.to_thread.run_sync(_Watch, self.root, tell)
        try:
            yield watch
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(watch.close)


class _Watch:
    """The threads of watchdog for one folder."""

    def __init__(self, root: Path, tell: Callable[[FileSystemEvent | None], None]) -> None:
        status = root.stat()
        self._root = (status.st_dev, status.st_ino)
        self._deleted = False
        self._observer = _Observer(tell)

        def hear(event: FileSystemEvent) -> None:
            # The emitter tells it and then ends, maybe only after `check` has asked; and what
            # is made in its place may get the same inode.
            if isinstance(event, DirDeletedEvent) and Path(os.fsdecode(event.src_path)) == root:
                self._deleted = True
            tell(event)

        try:
            self._observer.schedule(
                # The slash: of a root that is a link, what it leads to is watched.
                _Handler(hear),
                f"{root}/",
                recursive=True,
                event_filter=_EVENTS,
            )
            self._observer.start()
        except BaseException:
            self._observer.close_unstarted()
            raise

    @property
    def is_incomplete(self) -> bool:
        """Whether some of the directories could not be watched."""
        return self._observer.is_incomplete

    def check(self, root: Path) -> None:
        """Make sure that what is watched is what lies at the path.

        Raises:
          OSError: It was removed or replaced, or a watching thread has died.
        """
        status = root.stat()
        alive = self._observer.is_whole()
        if (status.st_dev, status.st_ino) != self._root or self._deleted or not alive:
            raise FileNotFoundError(errno.ESTALE, "the folder was replaced", str(root))

    def close(self) -> None:
        """Stop the threads, and wait for them."""
        self._observer.stop()
        self._observer.join()


class _Observer(InotifyObserver):
    """An observer that tells when the kernel has lost events.

    COMPAT(watchdog 7.1): adds its watches again after an overflow, but tells nobody, and what
    happened meanwhile is never reported.
    """

    def __init__(self, tell: Callable[[None], None]) -> None:
        self._inotify_fd = self._kernel = _OverflowFD(tell)
        self._inotify_fd.start()
        # The full one tells a file that is moved in from one that is created.
        BaseObserver.__init__(
            self,
            InotifyFullEmitter,
            timeout=DEFAULT_OBSERVER_TIMEOUT,
            inotify_fd=self._inotify_fd,
        )

    @property
    def is_incomplete(self) -> bool:
        """Whether the kernel has refused to watch a directory."""
        return self._kernel.has_refused

    def is_whole(self) -> bool:
        """Whether all its threads live; one that fails ends alone and in silence."""
        threads = (self, self._inotify_fd, *self.emitters)
        return all(thread.is_alive() for thread in threads)

    def close_unstarted(self) -> None:
        """End what the constructor has begun."""
        self._inotify_fd.stop()
        self._inotify_fd.join()


class _OverflowFD(InotifyFD):
    """The thread that reads from the kernel."""

    def __init__(self, tell: Callable[[None], None]) -> None:
        super().__init__()
        self.has_refused = False
        self._tell = tell

    def run(self) -> None:
        try:
            super().run()
        except BaseException:
            # Nothing is heard from now on: the scan that this leads to finds us dead.
            self._tell(None)
            raise

    def _add_callback(
        self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId
    ) -> WatchDescriptor:
        # COMPAT(watchdog 7.1): a directory that is seen twice, as when it was made while its
        # parent was walked, is worth a warning there, which holds every path of the tree.
        try:
            watch = self._get_or_create_watch(path, mask)
        except OSError as error:
            # COMPAT(watchdog 7.1): passes over a directory below the root that it cannot watch.
            self.has_refused |= error.errno in {errno.ENOSPC, errno.ENOMEM}
            raise
        watch.callbacks[id_] = callback
        return watch.wd

    def handle_event(self, event: InotifyEvent) -> None:
        super().handle_event(event)
        if event.is_queue_overflow:
            self._tell(None)


class _Handler(FileSystemEventHandler):
    def __init__(self, tell: Callable[[FileSystemEvent], None]) -> None:
        self._tell = tell

    def on_any_event(self, event: FileSystemEvent) -> None:
        self._tell(event)


def _is_below(path: str, trees: Container[str]) -> bool:
    """Whether a path is, or lies in, one of these directories."""
    while path and path not in trees:
        path = path.rpartition("/")[0]
    return bool(path)
