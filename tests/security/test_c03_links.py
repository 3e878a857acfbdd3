"""C-03: links and races. Whoever may write to a folder gains nothing outside of it by syncd.

While syncd works in a folder, another process exchanges its directories, its private directory
and its files with links that lead outside, where everything has the same names. Whatever
happens then may fail; but nothing outside changes, not even a time, and the secret that lies
there is never found, read or sent.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import blake3
import pytest

from syncd.disk import beneath, room
from syncd.disk.partial import Action, PartialFile, clean, identity_of, key_of
from syncd.errors import SyncdError, TransferError
from syncd.sync.walk import look_at, missing, walk
from tests.support.hostile import tree_state
from tests.support.peers import open_peers
from tests.support.swapping import swapping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET = b"nobody shall ever see this"
OTHERS = b"what lies in the folder"
CONTENT = b"what a peer has sent" * 100
DIGEST = blake3.blake3(CONTENT).digest()
KEY = key_of("alice@example.org", "photos", "a/file", len(CONTENT), 0)
LEFT = "0123-4567.part"

# In all of them together more than 300,000.
SWAPS = 30_000  # swaps, at least, in each of the races

# What is swapped with what. A link beside each directory leads to its likeness outside.
PAIRS = {"a": "to-a", ".syncd": "to-private", "leaf": "to-leaf"}

Work = Callable[["Path", int], None]


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of files, of which none has to be there after a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder, and outside the same once more."""
    outside = tmp_path / "outside"
    for top, content in ((tmp_path / "folder", OTHERS), (outside, SECRET)):
        (top / "a" / "b").mkdir(parents=True)
        (top / ".syncd").mkdir(mode=0o700)
        for path in ("leaf", "a/file", "a/b/file", f".syncd/{KEY}", ".syncd/0.part"):
            (top / path).write_bytes(content)
    (outside / "a" / "secret").write_bytes(SECRET)
    folder = tmp_path / "folder"
    (folder / "to-a").symlink_to("../outside/a")
    (folder / "to-private").symlink_to(outside / ".syncd")
    (folder / "to-leaf").symlink_to("../outside/leaf")
    return folder


@contextlib.contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Nothing in a tree changes."""
    before = tree_state(directory)
    yield
    assert tree_state(directory) == before


@contextlib.contextmanager
def arrived(root: Path, key: str) -> Iterator[PartialFile]:
    file = PartialFile(root, key, len(CONTENT))
    try:
        assert os.pwrite(file.fd, CONTENT, 0)
        file.seal(0)
        yield file
    finally:
        file.close()


def receive(root: Path, number: int) -> None:
    with arrived(root, f"{number}.part") as file:
        file.discard()


def resume(root: Path, number: int) -> None:
    file = PartialFile(root, KEY, len(CONTENT))
    file.prove()
    file.restart()
    os.pwrite(file.fd, CONTENT[: number % len(CONTENT)], 0)
    file.blocks.update(memoryview(CONTENT)[: number % len(CONTENT)])
    file.close()


def quarantine(root: Path, number: int) -> None:
    with arrived(root, f"{number}.part") as file:
        file.quarantine()


def publish(root: Path, number: int) -> None:
    for where in (("a", f"new{number}"), ("a", f"deep{number % 9}", f"new{number}")):
        with arrived(root, f"{number}.part") as file:
            file.publish(file.choose_place(where, None, DIGEST, "alice"))


def conflict(root: Path, number: int) -> None:
    for where in (("leaf",), ("a", "file"), ("a", "b", "file")):
        with arrived(root, f"{number}.part") as file:
            # Of the same content, now and then: only then what is there is read.
            place = file.choose_place(where, None, DIGEST, f"a{number}")
            if place.action is Action.SAME:
                file.discard()
            else:
                file.publish(place)


def replace(root: Path, number: int) -> None:
    for where in (("leaf",), ("a", "file"), ("a", "b", "file")):
        with arrived(root, f"{number}.part") as file:
            place = file.choose_place(where, identity_of(root, where), None, f"a{number}")
            if place.existing is None or place.existing.size >= 0:
                file.publish(place)


def clear_up(root: Path, number: int) -> None:
    names = (
        f"{number}.part", LEFT, f"{LEFT}.blocks", f"{number}.bad", f"{LEFT}.aside.{number}",
        f"{LEFT}.swap.1.2.3.4", f"{number}.part.blocks",
    )  # fmt: skip
    with beneath.open_private(root) as private:
        for name in names:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=private))
    clean(root, number * room.MAX_AGE)


def scan(root: Path, number: int) -> None:
    found = [path for batch in walk(root, []) for path, _ in batch]
    # A directory that a walk had found before; its likeness outside holds one more.
    found += [path for batch in walk(root, [], "a") for path, _ in batch]
    assert [path for path in found if "secret" in path] == []
    looks = look_at(root, {"a/secret": True, "a/b/file": True, "leaf": bool(number % 2)}, [])
    assert looks["a/secret"] == (None, False)
    for path in ("a/b/file", "leaf"):
        look, _ = looks[path]
        assert look is None or look.size != len(SECRET)
    assert "a/secret" in missing(root, ["a/secret", "leaf"])
    if looks["a/b/file"][0] is None:
        raise TransferError("the link stood there")


def read(root: Path, number: int) -> None:
    for where in (("leaf",), ("a", "file"), ("a", "b", "file"), ("a", "secret")):
        seen = identity_of(root, where)
        assert seen is None or seen.size != len(SECRET)
        with contextlib.suppress(SyncdError):
            fd = beneath.open_source(root, where)
            try:
                assert os.read(fd, 100) == OTHERS
            finally:
                os.close(fd)
    with beneath.open_directory(root, ("a", "b")):
        pass


RACES: dict[str, Work] = {
    work.__name__: work
    for work in (
        receive, resume, quarantine, publish, conflict, replace, clear_up, scan, read,
    )
}  # fmt: skip


def race(root: Path, work: Work, swaps: int = SWAPS, *, both: bool = True) -> tuple[int, int]:
    """Work against the swaps, until it has gone well and failed if both can be.

    Returns:
      How often it went well, and how often it failed.
    """
    done = failed = 0
    with unchanged(root.with_name("outside")), swapping(root, PAIRS) as count:
        start = count()
        while count() < start + swaps or (both and not (done and failed)):
            try:
                work(root, done + failed)
                done += 1
            except (TransferError, OSError):
                failed += 1
    return done, failed


@pytest.mark.parametrize("work", RACES.values(), ids=RACES)
def test_nothing_outside_is_reached_through_a_swapped_link(root: Path, work: Work) -> None:
    done, failed = race(root, work)
    assert done
    assert failed


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_nor_where_files_cannot_be_exchanged(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On NFS, and on many a FUSE, where a version is replaced in steps."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(beneath, "_renameat2", refuse)
    done, failed = race(root, replace)
    assert done
    assert failed


def follow_links(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    monkeypatch.setattr(beneath, "_DIRECTORY", flags)


@pytest.mark.parametrize("name", RACES)
def test_the_race_is_lost_by_whoever_follows_links(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each of the races would have shown it."""
    follow_links(monkeypatch)
    with pytest.raises(AssertionError):
        race(root, RACES[name], SWAPS // 10, both=False)


async def test_whole_transfers_reach_and_send_nothing_outside(tmp_path: Path) -> None:
    """Both ends at once: from a folder that is swapped, into a folder that is swapped."""
    outside = tmp_path / "outside"
    (outside / "a").mkdir(parents=True)
    for path in ("a/file", "a/secret", "leaf"):
        (outside / path).write_bytes(SECRET)
    async with open_peers(tmp_path) as peers:
        seen = peers.relay.listen_in()
        for end in (peers.source, peers.folder):
            (end / "a").mkdir()
            (end / "to-a").symlink_to(outside / "a")
            (end / "to-leaf").symlink_to(outside / "leaf")
            (end / ".syncd").mkdir()
            (end / "to-private").symlink_to(outside / "a")
            (end / "leaf").write_bytes(b"here")
        sources = [peers.write("a/file", CONTENT), peers.write("leaf", CONTENT)]
        done = failed = 0
        with (
            unchanged(outside),
            swapping(peers.source, PAIRS) as first,
            swapping(peers.folder, PAIRS) as second,
        ):
            while min(first(), second()) < SWAPS or not (done and failed):
                try:
                    # Sent anew each time: nothing is there already.
                    peers.journal.clear()
                    await peers.send(sources[(done + failed) % 2])
                    done += 1
                except SyncdError:
                    failed += 1
            # One whose sender has given up would wait for it.
            await peers.stop_receiver()
        assert SECRET not in seen
        assert SECRET not in [
            path.read_bytes()
            for path in peers.folder.rglob("*")
            if path.is_file() and not path.is_symlink() and "to-" not in str(path)
        ]
