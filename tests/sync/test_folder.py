"""Real files, the real kernel's events; what only time brings is brought by a clock of ours.

Almost every test lets a file rest for an hour: what is told all the same was known to be
whole. A barrier is such a file. It is told after all that happened before it was looked at.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import socket
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileCreatedEvent,
)
from watchdog.observers.inotify_c import (
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    WatchDescriptor,
)

from syncd.sync import folder as folder_module
from syncd.sync import walk
from syncd.sync.folder import AFTER_OVERFLOW, RESCAN, RETRY, Folder
from syncd.sync.walk import BATCH, count_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from trio.testing import MockClock
    from watchdog.events import FileSystemEvent
    from watchdog.observers.inotify_c import Mask, Watch

    from syncd.sync.plan import FileVersion
    from syncd.sync.settle import Look

HOUR = 3600.0  # seconds

# How long anything here may take on a busy machine; only reached when a test fails.
PATIENCE = 60.0  # seconds


@dataclass
class Watched:
    """A folder that is watched, and what it has told.

    Attributes:
      root: Where it is.
      outside: A directory beside it, on the same file system.
      told: What may be sent, in order.
      gone: What has vanished, in order.
      owed: What somebody waits for, sorted.
      counted: How many files were said to be settling while something was told, in order.
    """

    root: Path
    outside: Path
    quiet: float
    told: list[FileVersion] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    owed: list[str] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    barriers: int = 0

    def __post_init__(self) -> None:
        self._news = trio.Event()
        self.folder = Folder(
            "photos", self.root, self.quiet, self._settled, self._vanished, self._owed
        )

    @property
    def paths(self) -> list[str]:
        """What was told, without the barriers."""
        paths = [version.path for version in self.told]
        return [path for path in paths if not path.startswith("barrier-")]

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until what is told makes it true."""
        with bounded():
            while not condition():
                await self._news.wait()

    async def rescan(self) -> None:
        with bounded():
            await self.folder.rescan()

    async def barrier(self) -> None:
        """Return when all that has happened so far was heard and looked at."""
        assert self.folder.problem == ""
        self.barriers += 1
        name = f"barrier-{self.barriers}"
        self.move_in(name)
        await self.until(lambda: any(version.path == name for version in self.told))

    def move_in(self, path: str, content: bytes = b"x") -> Path:
        """Rename a file from outside into the folder; it was written a while ago."""
        made = self.outside / "being-made"
        made.write_bytes(content)
        age(made)
        return made.rename(self.root / path)

    async def _settled(self, versions: list[FileVersion]) -> None:
        assert 0 < len(versions) <= BATCH
        self.counted.append(self.folder.settling)
        self.told += versions
        self._tell()

    async def _vanished(self, paths: list[str]) -> None:
        assert 0 < len(paths) <= BATCH
        self.counted.append(self.folder.settling)
        self.gone += paths
        self._tell()

    async def _owed(self, after: str) -> list[str]:
        return [path for path in self.owed if path > after][:2]

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine counts slowly, and here it is the count that matters."""
    monkeypatch.setattr(folder_module, "COUNT_PATIENCE", PATIENCE)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """End what takes too long, by the real clock; trio's may be one that stands still."""
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        timer = threading.Timer(PATIENCE, lambda: token.run_sync_soon(scope.cancel))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
    assert not scope.cancelled_caught, f"not within {PATIENCE:g} s"


@contextlib.asynccontextmanager
async def watching(
    tmp_path: Path, quiet: float = HOUR, *, owed: tuple[str, ...] = ()
) -> AsyncIterator[Watched]:
    """Watch ``tmp_path/root``; it is made if missing, and was scanned once."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(exist_ok=True)
    outside.mkdir()
    watched = Watched(root, outside, quiet, owed=sorted(owed))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.folder.run)
        await watched.rescan()
        yield watched
        nursery.cancel_scope.cancel()


def age(file: Path) -> None:
    """Let a file have been written a minute ago; what is done to it from now on shows."""
    then = time.time() - 60
    os.utime(file, (then, then))


def keep_watches(monkeypatch: pytest.MonkeyPatch) -> list[folder_module._Watch]:
    """Let a test reach the threads of the folder that it will make."""
    watches: list[folder_module._Watch] = []

    class Kept(folder_module._Watch):
        def __init__(self, root: Path, tell: Callable[..., None]) -> None:
            super().__init__(root, tell)
            watches.append(self)

    monkeypatch.setattr(folder_module, "_Watch", Kept)
    return watches


def dispatch(watch: folder_module._Watch, event: FileSystemEvent) -> None:
    """Let watchdog tell something, as if the kernel had."""
    [handlers] = watch._observer._handlers.values()
    for handler in handlers:
        handler.dispatch(event)


async def poll(condition: Callable[[], object]) -> None:
    """Wait for what the kernel does in its own time, and nobody tells us."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await trio.to_thread.run_sync(time.sleep, 0.005)


# --- Files written in place


async def test_a_file_written_in_place_waits_for_its_quiet(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        (watched.root / "a").write_bytes(b"content")
        await watched.barrier()
        assert (watched.paths, watched.folder.settling) == ([], 1)


async def test_a_file_that_is_appended_to_is_told_once_it_rests(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """Once, and then as it lies there; not while less than the quiet has passed."""
    async with watching(tmp_path, quiet=10.0) as watched:
        for _ in range(4):
            with (watched.root / "log").open("ab") as file:
                file.write(b"line\n")
            await watched.barrier()
            mock_clock.jump(9.875)
            await watched.barrier()
            assert watched.paths == []
        mock_clock.jump(0.125)
        await watched.until(lambda: watched.paths)
        mock_clock.jump(100)
        await watched.barrier()
        [version] = [version for version in watched.told if version.path == "log"]
        status = (watched.root / "log").stat()
        assert (version.folder, version.size, version.mtime_ns, version.inode) == (
            "photos", 20, status.st_mtime_ns, status.st_ino,
        )  # fmt: skip
        assert watched.folder.settling == 0


async def test_a_file_is_counted_until_it_was_told(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """Else somebody who waits for its delivery would see nothing to wait for."""
    async with watching(tmp_path, quiet=10.0) as watched:
        watched.move_in("at-once")
        await watched.until(lambda: watched.paths == ["at-once"])
        (watched.root / "in-place").write_bytes(b"x")
        await watched.barrier()
        mock_clock.jump(10)
        await watched.until(lambda: "in-place" in watched.paths)
        # The barrier is counted beside the file that rests.
        assert watched.counted == [1, 2, 1]
        await poll(lambda: watched.folder.settling == 0)


@pytest.mark.parametrize("quiet", [0.0, HOUR])
async def test_what_no_look_was_taken_at_yet_is_counted(tmp_path: Path, quiet: float) -> None:
    """A file, a directory and an overflow each say that there is something."""
    folder = Watched(tmp_path, tmp_path, quiet).folder
    folder._take(FileCreatedEvent(f"{tmp_path}/a"))
    assert folder.settling == 1
    folder._take(DirCreatedEvent(f"{tmp_path}/d"))
    assert folder.settling == 2
    folder._overflow()
    assert folder.settling == 2


@pytest.mark.parametrize("change", ["mode", "time"])
async def test_a_file_made_in_place_is_not_taken_for_one_that_was_renamed(
    tmp_path: Path, change: str
) -> None:
    """Its times differ, as after a rename; but it is half."""
    async with watching(tmp_path) as watched:
        file = watched.root / "a"
        file.write_bytes(b"half")
        if change == "time":
            age(file)
        else:
            probe = watched.outside / "probe"

            def ticked() -> bool:
                probe.touch()
                return probe.stat().st_mtime_ns > file.stat().st_mtime_ns

            await poll(ticked)
            file.chmod(0o600)
        await watched.barrier()
        assert (watched.paths, watched.folder.settling) == ([], 1)


async def test_a_file_that_is_asked_for_is_looked_at_again(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """As when it changed while it was being sent."""
    async with watching(tmp_path, quiet=10.0) as watched:
        watched.move_in("a")
        await watched.until(lambda: watched.paths == ["a"])
        watched.folder.look_again("a")
        watched.folder.look_again("nothing")
        await watched.until(lambda: watched.gone == ["nothing"])
        mock_clock.jump(10)
        await watched.until(lambda: watched.paths == ["a", "a"])
        assert watched.told[0] == watched.told[1]


@pytest.mark.parametrize("settling", [False, True])
async def test_a_file_that_cannot_be_looked_at_is_neither_gone_nor_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settling: bool
) -> None:
    """Descriptors are used up, or the disk fails; until that is over it counts as settling."""
    monkeypatch.setattr(folder_module, "RETRY", 0.01)
    fails = True

    def look_at(
        root: Path, paths: dict[str, bool], unseen: list[str]
    ) -> dict[str, tuple[Look | None, bool]]:
        looks = walk.look_at(root, paths, unseen)
        if "a" in looks and fails:
            del looks["a"]
            unseen.append("a")
        return looks

    async with watching(tmp_path) as watched:
        if settling:
            (watched.root / "a").write_bytes(b"x")
            await watched.barrier()
        monkeypatch.setattr(folder_module, "look_at", look_at)
        if settling:
            watched.folder.look_again("a")
        else:
            watched.move_in("a")
        await poll(lambda: "a" in watched.folder._unseen)
        await watched.barrier()
        assert (watched.gone, watched.paths) == ([], [])
        assert watched.folder.settling >= 1
        fails = False
        # Whether it was renamed is forgotten: it rests like any other.
        await poll(lambda: not watched.folder.rests("a"))
        await poll(lambda: watched.folder.settling == 1)
        assert (watched.gone, watched.paths) == ([], [])


async def test_a_file_that_may_not_be_looked_at_is_left_to_the_next_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody keeps looking at it, and nobody takes it for gone."""
    async with watching(tmp_path) as watched:
        (watched.root / "a").write_bytes(b"x")
        await watched.barrier()
        assert watched.folder.settling == 1
        monkeypatch.setattr(folder_module, "look_at", lambda *_: {})
        watched.folder.look_again("a")
        await poll(lambda: watched.folder.settling == 0)
        assert (watched.gone, watched.paths) == ([], [])


async def test_more_files_that_cannot_be_looked_at_than_can_be_remembered_lead_to_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "MAX_HINTS", 3)
    monkeypatch.setattr(folder_module, "RETRY", HOUR)

    def look_at(
        _: Path, paths: dict[str, bool], unseen: list[str]
    ) -> dict[str, tuple[Look | None, bool]]:
        unseen.extend(paths)
        return {}

    async with watching(tmp_path) as watched:
        monkeypatch.setattr(folder_module, "look_at", look_at)
        for name in "abcde":
            watched.folder.look_again(name)
            await poll(lambda: not watched.folder._hints)
        await poll(lambda: watched.folder._overflowed or watched.folder._scan_at < HOUR)
        assert sorted(watched.folder._unseen) == ["a", "b", "c"]


async def test_a_file_that_turns_into_a_directory_is_forgotten(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """Nobody keeps looking at it."""
    async with watching(tmp_path, quiet=10.0) as watched:
        (watched.root / "a").write_bytes(b"x")
        await watched.barrier()
        assert watched.folder.settling == 1
        (watched.root / "a").unlink()
        (watched.root / "a").mkdir()
        await watched.until(lambda: "a" in watched.gone)
        await watched.rescan()
        mock_clock.jump(20)
        await poll(lambda: watched.folder.settling == 0)
        await wait_all_tasks_blocked(0.05)
        assert watched.paths == []


# --- Files that come by rename


async def test_a_file_renamed_into_the_folder_is_told_at_once(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        file = watched.move_in("a", b"content")
        await watched.until(lambda: watched.paths == ["a"])
        [version] = watched.told
        status = file.stat()
        assert (version.size, version.mtime_ns, version.inode) == (
            7, status.st_mtime_ns, status.st_ino,
        )  # fmt: skip


async def test_a_file_written_just_before_its_rename_is_told_at_once(tmp_path: Path) -> None:
    """As programs do it; the kernel's clock need only have ticked between the two."""
    async with watching(tmp_path) as watched:
        made = watched.outside / "being-made"
        made.write_bytes(b"x")
        probe = watched.outside / "probe"

        def ticked() -> bool:
            probe.touch()
            return probe.stat().st_mtime_ns > made.stat().st_mtime_ns

        await poll(ticked)
        made.rename(watched.root / "a")
        await watched.until(lambda: watched.paths == ["a"])


async def test_a_file_renamed_inside_the_folder_is_told_at_once(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        file = watched.root / "a.part"
        file.write_bytes(b"x")
        age(file)
        await watched.barrier()
        assert (watched.paths, watched.folder.settling) == ([], 0)
        file = file.rename(watched.root / "a")
        await watched.until(lambda: watched.paths == ["a"])
        file.rename(watched.root / "b")
        await watched.until(lambda: watched.paths == ["a", "b"])
        assert watched.gone == ["a"]


async def test_a_rename_over_a_file_tells_the_new_one(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        watched.move_in("a", b"old")
        await watched.until(lambda: watched.paths == ["a"])
        watched.move_in("a", b"newer")
        await watched.until(lambda: watched.paths == ["a", "a"])
        assert [version.size for version in watched.told] == [3, 5]
        assert watched.gone == []


async def test_a_file_that_somebody_still_writes_to_is_not_told_at_once(
    tmp_path: Path,
) -> None:
    async with watching(tmp_path) as watched:
        made = watched.outside / "download"
        made.write_bytes(b"first half, ")
        with made.open("ab") as writer:
            age(made)
            made.rename(watched.root / "download")
            await watched.barrier()
            assert (watched.paths, watched.folder.settling) == ([], 1)
            writer.write(b"second half")
        await watched.barrier()
        assert (watched.paths, watched.folder.settling) == ([], 1)


async def test_another_hint_does_not_hide_that_a_file_was_renamed(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_bytes(b"x")
    age(tmp_path / "root" / "a")
    async with watching(tmp_path) as watched:
        assert watched.folder.settling == 1
        watched.folder._hint("a", renamed=True)
        watched.folder.look_again("a")
        await watched.until(lambda: watched.paths == ["a"])


# --- Directories


async def test_files_in_directories_made_just_before_are_told(tmp_path: Path) -> None:
    """There was nobody yet to hear of them, or of their end."""
    async with watching(tmp_path, quiet=0.05) as watched:
        expected = set()
        for number in range(30):
            path = f"{number}/x/y/z"
            (watched.root / path).mkdir(parents=True)
            (watched.root / path / "file").write_bytes(b"x")
            expected.add(f"{path}/file")
        await watched.until(lambda: set(watched.paths) == expected)
        assert await watched.folder.count() == 30


async def test_a_tree_that_is_moved_in_is_told(tmp_path: Path) -> None:
    async with watching(tmp_path, quiet=0.05) as watched:
        tree = watched.outside / "tree"
        (tree / "a" / "b").mkdir(parents=True)
        for path in ("1", "a/2", "a/b/3"):
            (tree / path).write_bytes(b"x")
        tree.rename(watched.root / "tree")
        expected = {"tree/1", "tree/a/2", "tree/a/b/3"}
        await watched.until(lambda: set(watched.paths) == expected)
        # And it is watched from now on.
        (watched.root / "tree" / "a" / "b" / "4").write_bytes(b"x")
        await watched.until(lambda: "tree/a/b/4" in watched.paths)


async def test_a_directory_renamed_inside_is_told_anew_and_the_old_is_gone(
    tmp_path: Path,
) -> None:
    async with watching(tmp_path, quiet=0.05) as watched:
        (watched.root / "old" / "below").mkdir(parents=True)
        for path in ("old/1", "old/below/2"):
            (watched.root / path).write_bytes(b"x")
        await watched.until(lambda: set(watched.paths) == {"old/1", "old/below/2"})
        (watched.root / "old").rename(watched.root / "new")
        await watched.until(lambda: {"new/1", "new/below/2"} <= set(watched.paths))
        await watched.until(lambda: {"old/1", "old/below/2"} <= set(watched.gone))
        (watched.root / "new" / "below" / "3").write_bytes(b"x")
        await watched.until(lambda: "new/below/3" in watched.paths)


@pytest.mark.parametrize(
    "event",
    [
        DirCreatedEvent("{}/d"), DirDeletedEvent("{}/d"), DirMovedEvent("{}/old", "{}/d"),
        DirMovedEvent("", "{}/d"), DirMovedEvent("{}/d", ""), DirDeletedEvent("{}/"),
    ],
)  # fmt: skip
async def test_whatever_happens_to_a_directory_all_in_it_is_looked_at(
    tmp_path: Path, event: FileSystemEvent
) -> None:
    """Of the files in it there may be no events."""
    (tmp_path / "root" / "d").mkdir(parents=True)
    async with watching(tmp_path, quiet=0.0) as watched:
        file = watched.move_in("d/a", b"content")
        await watched.until(lambda: watched.paths == ["d/a"])
        os.truncate(file, 3)
        await watched.barrier()
        assert watched.paths == ["d/a"]
        event = replace(
            event,
            src_path=str(event.src_path).format(watched.root),
            dest_path=str(event.dest_path).format(watched.root),
        )
        watched.folder._take(event)
        watched.folder._wake.set()
        await watched.until(lambda: watched.told[-1].size == 3)


async def test_a_directory_that_comes_leads_to_no_scan_of_everything(tmp_path: Path) -> None:
    """A tree that is unpacked into a large folder would be one scan for each directory."""
    async with watching(tmp_path, quiet=0.0) as watched:
        file = watched.move_in("a", b"content")
        await watched.until(lambda: watched.paths == ["a"])
        os.truncate(file, 3)  # only a scan finds it
        (watched.root / "d" / "e").mkdir(parents=True)
        watched.move_in("d/e/b")
        await watched.until(lambda: "d/e/b" in watched.paths)
        await watched.barrier()
        assert watched.paths.count("a") == 1
        await watched.rescan()
        assert watched.paths.count("a") == 2


async def test_more_directories_than_can_be_remembered_lead_to_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "MAX_TREES", 3)
    async with watching(tmp_path, quiet=0.0) as watched:
        expected = set()
        for number in range(50):
            (watched.root / f"{number}").mkdir()
            (watched.root / f"{number}" / "file").write_bytes(b"x")
            expected.add(f"{number}/file")
        await watched.until(lambda: set(watched.paths) == expected)


async def test_what_is_owed_of_a_directory_that_is_moved_out_is_gone(tmp_path: Path) -> None:
    (tmp_path / "root" / "d" / "e").mkdir(parents=True)
    owed = ("d", "d-not", "d/1", "d/e/2", "d/e/3", "e")
    for path in ("d-not", "d/1", "d/e/2", "d/e/3", "e"):
        (tmp_path / "root" / path).write_bytes(b"x")
    async with watching(tmp_path, owed=owed) as watched:
        assert watched.gone == ["d"]  # a directory is no file
        (watched.root / "d").rename(watched.outside / "d")
        await watched.until(lambda: len(watched.gone) > 3)
        assert watched.gone == ["d", "d/1", "d/e/2", "d/e/3"]


async def test_what_changes_during_a_scan_does_not_wait_for_its_end(tmp_path: Path) -> None:
    (tmp_path / "root" / "d").mkdir(parents=True)
    for number in range(3 * BATCH):
        (tmp_path / "root" / "d" / f"{number}").touch()
    order: list[str] = []

    class Busy(Watched):
        async def _settled(self, versions: list[FileVersion]) -> None:
            order.append(versions[0].path.partition("/")[0])
            if order == ["d"]:
                # Where the scan has been already.
                self.move_in("late")
                self.folder._hint("late", renamed=True)
            await super()._settled(versions)

    watched = Busy(tmp_path / "root", tmp_path, 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.folder.run)
        await watched.rescan()
        nursery.cancel_scope.cancel()
    assert order[:2] == ["d", "late"]
    assert order.count("d") == 3


# --- What is nobody's, or cannot be sent


async def test_links_fifos_and_sockets_are_passed_by(tmp_path: Path) -> None:
    async with watching(tmp_path, quiet=0.0) as watched:
        (watched.outside / "secret").write_bytes(b"x")
        age(watched.outside / "secret")
        (watched.root / "link").symlink_to(watched.outside / "secret")
        (watched.root / "directory").symlink_to(watched.outside)
        os.mkfifo(watched.root / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(watched.outside / "socket"))
            (watched.outside / "socket").rename(watched.root / "socket")
            await watched.barrier()
            await watched.rescan()
        assert (watched.paths, watched.folder.settling) == ([], 0)
        assert (await watched.folder.count(), watched.folder.skipped) == (1, [])


async def test_nobodys_files_are_never_told(tmp_path: Path) -> None:
    async with watching(tmp_path, quiet=0.0) as watched:
        (watched.root / ".syncd").mkdir()
        for name in (".a.swp", "a~", "a.part", ".syncd/partial"):
            watched.move_in(name)
        (watched.root / "b.tmp").write_bytes(b"x")
        await watched.barrier()
        await watched.rescan()
        assert (watched.paths, watched.gone, watched.folder.settling) == ([], [], 0)
        # What is received lies in the private directory until it is whole.
        (watched.root / ".syncd" / "partial").rename(watched.root / "whole")
        await watched.until(lambda: watched.paths == ["whole"])
        assert watched.gone == []


async def test_what_cannot_be_sent_is_skipped_and_reported(tmp_path: Path) -> None:
    async with watching(tmp_path, quiet=0.0) as watched:
        watched.move_in("caf\udce9")
        await watched.barrier()
        await watched.rescan()
        assert watched.paths == []
        assert watched.folder.skipped == [("caf\udce9", "the name is no valid UTF-8")]
        assert await watched.folder.count() == 1
        (watched.root / "caf\udce9").rename(watched.root / "café")
        await watched.until(lambda: watched.paths == ["café"])
        await watched.rescan()
        assert watched.folder.skipped == []


# --- Scans


async def test_what_lies_there_at_the_start_is_told(tmp_path: Path) -> None:
    """If it has rested by its own times; or else it is settling."""
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    for path in ("old", "below/old", "new"):
        (root / path).write_bytes(b"x")
    (root / ".syncd").mkdir()
    (root / ".syncd" / "partial").write_bytes(b"x")
    async with watching(tmp_path, quiet=HOUR) as watched:
        assert (watched.paths, watched.folder.settling, watched.folder.files) == ([], 3, 3)
    shutil.rmtree(tmp_path / "outside")
    async with watching(tmp_path, quiet=0.0) as watched:
        assert set(watched.paths) == {"old", "below/old", "new"}
        assert watched.folder.settling == 0


async def test_a_time_in_the_future_proves_no_rest(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(b"x")
    os.utime(root / "a", (time.time() + 1e6, time.time() + 1e6))
    async with watching(tmp_path, quiet=10.0) as watched:
        assert (watched.paths, watched.folder.settling) == ([], 1)
        mock_clock.jump(10)
        await watched.until(lambda: watched.paths == ["a"])


async def test_a_rescan_covers_everything_that_lies_there(tmp_path: Path) -> None:
    """When it returns, each file is settling or was told, whatever the kernel has said."""
    async with watching(tmp_path) as watched:
        for directory in range(20):
            (watched.root / f"{directory}").mkdir()
            for number in range(100):
                (watched.root / f"{directory}" / f"{number}").write_bytes(b"x")
            await watched.rescan()
            assert watched.folder.settling >= 100 * (directory + 1)
        assert watched.folder.files == 2000


async def test_each_of_several_rescans_is_answered(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        watched.move_in("a")
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(watched.rescan)
                await trio.lowlevel.checkpoint()
        assert (watched.folder.files, watched.folder.scanning) == (1, False)


async def test_what_no_event_tells_is_found_in_time(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """A file cut by its path tells nothing; the periodic scan sees it."""
    async with watching(tmp_path, quiet=10.0) as watched:
        file = watched.move_in("a", b"content")
        await watched.until(lambda: watched.paths == ["a"])
        os.truncate(file, 3)
        await watched.barrier()
        assert watched.folder.settling == 0
        mock_clock.jump(RESCAN)
        await poll(lambda: watched.folder.settling)
        mock_clock.jump(10)
        await watched.until(lambda: watched.paths[1:] == ["a"])
        assert watched.told[-1].size == 3


async def test_an_overflow_of_the_kernels_queue_leads_to_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches = keep_watches(monkeypatch)
    monkeypatch.setattr(folder_module, "AFTER_OVERFLOW", 0.0)
    async with watching(tmp_path, quiet=0.0) as watched:
        file = watched.move_in("a", b"content")
        await watched.until(lambda: watched.paths == ["a"])
        os.truncate(file, 3)
        await watched.barrier()
        assert watched.paths == ["a"]
        lost = InotifyEvent(WatchDescriptor(-1), InotifyConstants.IN_Q_OVERFLOW, 0, b"")
        await trio.to_thread.run_sync(watches[0]._observer._inotify_fd.handle_event, lost)
        await watched.until(lambda: watched.told[-1].size == 3)
        await watched.barrier()


async def test_more_events_than_can_be_remembered_lead_to_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "MAX_HINTS", 20)
    monkeypatch.setattr(folder_module, "AFTER_OVERFLOW", 0.0)
    async with watching(tmp_path, quiet=0.0) as watched:
        for number in range(500):
            (watched.root / f"{number}").write_bytes(b"x")
        await watched.until(lambda: len(set(watched.paths)) == 500)


_BURST = """
import os, sys
for number in range(20_000):
    if number < 20:
        os.mkdir(f"{sys.argv[1]}/{number}")
    os.close(os.open(f"{sys.argv[1]}/{number % 20}/{number}", os.O_WRONLY | os.O_CREAT))
"""


async def test_of_a_burst_every_file_is_told(tmp_path: Path) -> None:
    """Whatever the kernel's queue, or ours, could not hold."""
    async with watching(tmp_path, quiet=0.05) as watched:
        await trio.run_process([sys.executable, "-c", _BURST, str(watched.root)])
        expected = {f"{number % 20}/{number}" for number in range(20_000)}
        await watched.until(
            lambda: len(watched.told) >= 20_000 and set(watched.paths) == expected
        )
        await watched.rescan()
        assert await watched.folder.count() == 20_000


# --- What goes away


async def test_a_deleted_file_is_gone(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        file = watched.move_in("a")
        (watched.root / "settling").write_bytes(b"x")
        await watched.barrier()
        file.unlink()
        (watched.root / "settling").unlink()
        await watched.until(lambda: watched.gone == ["a", "settling"])
        assert watched.folder.settling == 0


async def test_what_is_owed_and_went_away_unwatched_is_gone(tmp_path: Path) -> None:
    """While the daemon was down, or with a directory that was moved out."""
    root = tmp_path / "root"
    root.mkdir()
    for path in ("b", "d"):
        (root / path).write_bytes(b"x")
    async with watching(tmp_path, owed=("a", "b", "c/d", "d", "e")) as watched:
        assert watched.gone == ["a", "c/d", "e"]


async def test_files_are_counted_as_they_come_and_go(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        assert await watched.folder.count() == 0
        file = watched.move_in("a")
        await watched.barrier()
        assert await watched.folder.count() == 2
        file.unlink()
        await watched.until(lambda: watched.gone == ["a"])
        assert await watched.folder.count() == 1


async def test_a_folder_too_large_to_walk_for_a_count_tells_that_of_its_last_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "CHEAP_WALK", 0.0)
    async with watching(tmp_path) as watched:
        await watched.barrier()
        assert await watched.folder.count() == 0
        await watched.rescan()
        assert await watched.folder.count() == 1


# --- The folder itself


async def test_a_root_that_is_removed_is_a_problem_until_it_is_back(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        shutil.rmtree(watched.root)
        await watched.rescan()
        assert watched.folder.problem == f"{watched.root} is gone or was replaced"
        assert watched.folder.hint == (
            "is its disk mounted? it is watched again as soon as it is back"
        )
        assert watched.folder.scanning is False
        watched.root.mkdir()
        await watched.rescan()
        assert (watched.folder.problem, watched.folder.hint) == ("", "")
        await watched.barrier()


async def test_a_root_that_is_removed_and_made_again_is_watched_again_by_itself(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """Even when it gets the same inode, and nobody asks."""
    async with watching(tmp_path) as watched:
        for _ in range(3):
            shutil.rmtree(watched.root)
            watched.root.mkdir()
            await poll(lambda: watched.folder.problem)
            mock_clock.jump(RETRY)
            await poll(lambda: not watched.folder.problem)
            await watched.rescan()
            await watched.barrier()


async def test_a_root_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        watched.root.rename(tmp_path / "away")
        watched.root.mkdir()
        (watched.root / "a").write_bytes(b"x")
        await watched.rescan()
        assert watched.folder.problem == f"{watched.root} is gone or was replaced"
        await watched.rescan()
        assert (watched.folder.problem, watched.folder.settling) == ("", 1)
        await watched.barrier()


async def test_a_root_that_is_replaced_is_noticed_though_nobody_asks(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """No event tells that it was renamed, or that a disk was mounted over it."""
    async with watching(tmp_path) as watched:
        watched.root.rename(tmp_path / "away")
        watched.root.mkdir()
        (watched.root / "a").write_bytes(b"x")
        await wait_all_tasks_blocked()
        mock_clock.jump(RETRY)
        await poll(lambda: watched.folder.problem)
        mock_clock.jump(RETRY)
        await poll(lambda: watched.folder.settling)
        assert watched.folder.problem == ""
        await watched.barrier()


async def test_a_root_that_is_a_link_is_watched_where_it_leads(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "root").symlink_to(real)
    async with watching(tmp_path, quiet=0.0) as watched:
        (real / "below").mkdir()
        watched.move_in("below/a")
        await watched.until(lambda: watched.paths == ["below/a"])
        (real / "below" / "a").unlink()
        await watched.until(lambda: watched.gone == ["below/a"])
        shutil.rmtree(real)
        await poll(lambda: watched.folder.problem)
        assert watched.folder.problem == f"{watched.root} is gone or was replaced"


async def test_a_root_that_is_not_there_at_the_start_is_waited_for(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        watched = Watched(tmp_path / "root", tmp_path, HOUR)
        assert watched.folder.scanning is True
        nursery.start_soon(watched.folder.run)
        await watched.rescan()
        assert watched.folder.problem == f"{watched.root} is gone or was replaced"
        watched.root.mkdir()
        await watched.rescan()
        assert watched.folder.problem == ""
        await watched.barrier()
        nursery.cancel_scope.cancel()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_fails_is_replaced(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would hear of anything until the next scan, and the one after it."""
    watches = keep_watches(monkeypatch)
    async with watching(tmp_path) as watched:
        thread = watches[0]._observer._inotify_fd

        def fail(event: InotifyEvent) -> None:
            raise RuntimeError(f"a bug of watchdog's: {event}")

        with monkeypatch.context() as patch:
            patch.setattr(thread, "handle_event", fail)
            watched.move_in("a")
            await poll(lambda: not thread.is_alive() and watched.folder._overflowed)
        mock_clock.jump(AFTER_OVERFLOW)
        await poll(lambda: watched.folder.problem)
        mock_clock.jump(RETRY)
        await poll(lambda: not watched.folder.problem)
        await watched.rescan()
        assert watched.folder.settling == 1
        await watched.barrier()


async def test_a_root_that_was_deleted_is_not_taken_for_what_is_there_now(
    tmp_path: Path,
) -> None:
    """Nobody watches that, even if it has the same inode and our threads still live."""
    watch = folder_module._Watch(tmp_path, lambda _: None)
    try:
        watch.check(tmp_path)
        dispatch(watch, DirDeletedEvent(str(tmp_path / "below")))
        watch.check(tmp_path)
        dispatch(watch, DirDeletedEvent(f"{tmp_path}/"))
        with pytest.raises(FileNotFoundError, match="was replaced"):
            watch.check(tmp_path)
    finally:
        watch.close()


@pytest.mark.parametrize(
    ("number", "problem", "hint"),
    [
        (errno.ENOSPC, "fs.inotify.max_user_watches", "sysctl fs.inotify.max_user_watches"),
        (errno.EMFILE, "fs.inotify.max_user_instances", "sysctl fs.inotify.max_user_inst"),
        (errno.EACCES, "root cannot be read: Permission denied", "give syncd access to it"),
        (errno.ENOTDIR, "is gone or was replaced", "is its disk mounted?"),
    ],
)
async def test_a_folder_that_cannot_be_watched_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, problem: str, hint: str
) -> None:
    class Refused(folder_module._OverflowFD):
        def add_callback(self, *_: object) -> WatchDescriptor:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_module, "_OverflowFD", Refused)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only to be counted
    async with watching(tmp_path) as watched:
        assert problem in watched.folder.problem
        assert hint in watched.folder.hint
        # What was begun was ended.
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - only to be counted


# --- At rest


async def test_our_own_reading_leads_to_nothing(tmp_path: Path) -> None:
    """After it is told, a file that is read for sending is not looked at for that."""
    async with watching(tmp_path, quiet=0.0) as watched:
        file = watched.move_in("a")
        await watched.until(lambda: watched.paths == ["a"])
        assert file.read_bytes() == b"x"
        file.chmod(0o600)
        os.close(os.open(watched.root, os.O_RDONLY))
        await watched.barrier()
        await watched.rescan()
        told = len(watched.told)
        await wait_all_tasks_blocked(0.1)
        assert len(watched.told) == told
        assert watched.paths == ["a", "a"]  # the scan tells all


async def test_when_it_ends_nothing_is_left_running(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only to be counted
    async with watching(tmp_path) as watched:
        await watched.barrier()
        assert len(os.listdir("/proc/self/fd")) > before  # noqa: PTH208 - only to be counted
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - only to be counted


async def test_the_status_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count is that of the last scan then, and is right again when the disk is."""
    hangs, counted = threading.Event(), threading.Event()

    def count(root: Path) -> int:
        hangs.wait(PATIENCE)
        counted.set()
        return count_files(root)

    async with watching(tmp_path) as watched:
        monkeypatch.setattr(folder_module, "count_files", count)
        monkeypatch.setattr(folder_module, "CHEAP_WALK", math.inf)
        monkeypatch.setattr(folder_module, "COUNT_PATIENCE", 0.01)
        watched.move_in("a")
        await watched.until(lambda: watched.paths == ["a"])
        # One thread hangs, and no other is sent after it.
        assert [await watched.folder.count() for _ in range(9)] == [0] * 9
        assert watched.folder._counter.borrowed_tokens == 1
        hangs.set()
        monkeypatch.setattr(folder_module, "COUNT_PATIENCE", PATIENCE)
        with bounded():
            while await watched.folder.count() != 1:  # noqa: ASYNC110 - a thread tells nobody
                await trio.sleep(0.001)


async def test_directories_that_the_kernel_does_not_watch_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the whole user's; reaching it would disturb everybody else's tests."""
    original = InotifyFD._get_or_create_watch

    def refuse(self: InotifyFD, path: bytes, mask: Mask) -> Watch:
        if path.endswith(b"one-more"):
            raise OSError(errno.ENOSPC, "inotify watch limit reached")
        return original(self, path, mask)

    monkeypatch.setattr(InotifyFD, "_get_or_create_watch", refuse)
    (tmp_path / "root" / "enough").mkdir(parents=True)
    async with watching(tmp_path) as watched:
        assert watched.folder.unwatched is False
    shutil.rmtree(tmp_path / "outside")
    (tmp_path / "root" / "one-more").mkdir(parents=True)
    async with watching(tmp_path) as watched:
        # It works on, by scans where it must.
        assert (watched.folder.unwatched, watched.folder.problem) == (True, "")
        await watched.barrier()
