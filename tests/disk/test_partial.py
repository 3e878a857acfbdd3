from __future__ import annotations

import errno
import fcntl
import itertools
import os
import resource
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import blake3
import pytest

from syncd.disk import beneath, blocks, partial, paths, room
from syncd.disk.partial import (
    Action,
    Identity,
    PartialFile,
    Place,
    clean,
    identity_of,
    key_of,
)
from syncd.errors import ErrorType, TransferError
from tests.support.disk import small_disk
from tests.support.peers import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import tzinfo

CONTENT = b"what was sent"
DIGEST = blake3.blake3(CONTENT).digest()
SIZE = len(CONTENT)
MTIME = 1_900_000_000_123_456_789
KEY = key_of("alice@example.org", "photos", "a/file.txt", SIZE, MTIME)
KEPT = [KEY, f"{KEY}.blocks"]  # what stays to go on from
WHERE = ("a", "file.txt")
PIECE = blake3.blake3(b"piece").digest(64 << 10)  # one block of a file of this size
BIG = 1_000_000
BIG_KEY = key_of("alice@example.org", "f", "big", BIG, MTIME)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary").write_bytes(b"alive")
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def slow_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if whatever comes had taken so long that notes are worth it."""
    monkeypatch.setattr(blocks, "FIRST_MOMENT", 0.0)


@contextmanager
def arrived(root: Path, content: bytes = CONTENT, key: str = KEY) -> Iterator[PartialFile]:
    """A partial file in which all bytes are."""
    file = PartialFile(root, key, len(content))
    try:
        os.pwrite(file.fd, content, 0)
        file.blocks.update(memoryview(content))
        file.seal(MTIME)
        yield file
    finally:
        file.close()


@contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """Let no more than so many be opened."""
    # To list the directory would take one.
    numbers = itertools.count()
    free = (number for number in numbers if not Path(f"/proc/self/fd/{number}").is_symlink())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (next(itertools.islice(free, count, None)), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def private(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".syncd").iterdir())


def existing(root: Path, content: bytes = b"ours") -> Identity:
    (root / "a" / "file.txt").write_bytes(content)
    identity = identity_of(root, WHERE)
    assert identity is not None
    return identity


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "a").iterdir()}


# Keys


def test_key_tells_apart_who_what_and_which_version() -> None:
    keys = [
        key_of("a@b", "f", "p", 1, 2),
        key_of("a@c", "f", "p", 1, 2),
        key_of("a@b", "g", "p", 1, 2),
        key_of("a@b", "f", "q", 1, 2),
        key_of("a@b", "f", "p", 12, 2),
        key_of("a@b", "f", "p", 1, 22),
        key_of("a@b", "fp", "", 1, 2),
    ]
    assert len(set(keys)) == len(keys)
    firsts = [key.partition("-")[0] for key in keys]
    assert [first == firsts[0] for first in firsts] == [
        True, False, False, False, True, True, False,
    ]  # fmt: skip
    assert key_of("é@b", "f", "\n/ü", 1, 2).isascii()


# Arriving


def test_new_partial_file_is_empty_private_and_has_its_room(root: Path) -> None:
    with closing(PartialFile(root, KEY, 100_000)) as file:
        status = os.fstat(file.fd)
        assert (file.offset, status.st_size, status.st_mode & 0o777) == (0, 0, 0o600)
        assert status.st_blocks * 512 >= 100_000
        assert (root / ".syncd").stat().st_mode & 0o077 == 0
        assert private(root) == [KEY]


def begun(root: Path, content: bytes, size: int = BIG, *, key: str = BIG_KEY) -> PartialFile:
    """A partial file of which a beginning has come."""
    file = PartialFile(root, key, size)
    os.pwrite(file.fd, content, 0)
    file.blocks.update(memoryview(content))
    return file


def test_partial_file_goes_on_where_it_ended(root: Path) -> None:
    begun(root, CONTENT[:5], SIZE, key=KEY).close()
    assert private(root) == [KEY, f"{KEY}.blocks"]
    with closing(PartialFile(root, KEY, SIZE)) as again:
        assert (again.offset, again.prove(), again.offset) == (5, 5, 5)
        assert os.pread(again.fd, 100, 0) == CONTENT[:5]
        assert again.blocks.digest() == blake3.blake3(CONTENT[:5]).digest()


def test_length_alone_is_nothing_to_go_on_from(root: Path) -> None:
    with closing(PartialFile(root, KEY, SIZE)) as file:
        os.pwrite(file.fd, CONTENT, 0)
    with closing(PartialFile(root, KEY, SIZE)) as again:
        assert (again.offset, again.prove()) == (0, 0)
        assert os.fstat(again.fd).st_size == 0


def test_what_is_not_proved_is_cut_off_and_keeps_its_room(root: Path) -> None:
    """Here a sector went bad in the third block after the last offer."""
    begun(root, PIECE * 5).close()
    with (root / ".syncd" / BIG_KEY).open("r+b") as damaged:
        damaged.seek(2 * len(PIECE) + 9)
        damaged.write(b"?")
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert file.offset == 5 * len(PIECE)  # as it is told, before the proof
        assert file.prove() == file.offset == 2 * len(PIECE)
        status = os.fstat(file.fd)
        assert status.st_size == 2 * len(PIECE)
        assert status.st_blocks * 512 >= BIG
        assert file.blocks.digest() == blake3.blake3(PIECE * 2).digest()


def test_proof_that_is_stopped_cuts_nothing(root: Path) -> None:
    begun(root, PIECE * 5).close()
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        file.prove(lambda: True)
        assert os.fstat(file.fd).st_size == 5 * len(PIECE)
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert file.prove() == 5 * len(PIECE)


def test_file_that_nobody_resumes_is_gone_on_with_by_nobody(root: Path) -> None:
    """It has a random name, so what stands there is not ours."""
    with closing(begun(root, PIECE * 3, key="0123.part")):
        assert private(root) == ["0123.part"]
        with pytest.raises(TransferError):
            PartialFile(root, "0123.part", BIG)
        assert (root / ".syncd" / "0123.part").read_bytes() == PIECE * 3
    assert private(root) == []


def test_notes_go_with_their_file(root: Path) -> None:
    with closing(begun(root, PIECE * 3)) as file:
        assert private(root) == [BIG_KEY, f"{BIG_KEY}.blocks"]
        file.discard()
    assert private(root) == []
    with closing(begun(root, PIECE * 3)) as file:
        file.publish(Place(Action.NEW, WHERE))
    assert private(root) == []
    begun(root, PIECE * 3).close()
    PartialFile(root, key_of("alice@example.org", "f", "big", BIG, MTIME + 1), 5).close()
    assert private(root) == []


def test_file_whose_notes_cannot_be_deleted_has_its_name_all_the_same(root: Path) -> None:
    with closing(begun(root, PIECE * 3)) as file:
        notes = root / ".syncd" / f"{BIG_KEY}.blocks"
        notes.unlink()
        notes.mkdir()
        file.publish(Place(Action.NEW, WHERE))
    assert files(root) == {"file.txt": PIECE * 3}


def test_partial_file_larger_than_the_file_starts_anew(root: Path) -> None:
    first = PartialFile(root, KEY, SIZE)
    os.pwrite(first.fd, CONTENT + b"!", 0)
    first.close()
    second = PartialFile(root, KEY, SIZE)
    assert (second.offset, os.fstat(second.fd).st_size) == (0, 0)
    second.close()


def test_restart_forgets_what_has_arrived(root: Path) -> None:
    begun(root, PIECE * 3).close()
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        file.restart()
        assert (file.offset, os.fstat(file.fd).st_size) == (0, 0)
        assert os.fstat(file.fd).st_blocks * 512 >= BIG
        assert file.blocks.digest() == blake3.blake3().digest()


def test_restart_may_keep_a_beginning(root: Path) -> None:
    """Of a client that was asked to go on, and began anew."""
    begun(root, PIECE * 3).close()
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        file.prove()
        file.restart(7)
        assert (file.offset, os.fstat(file.fd).st_size) == (7, 7)
        assert file.blocks.digest() == blake3.blake3(PIECE[:7]).digest()
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert file.prove() == 7


# What is kept, and what is not


@pytest.mark.parametrize("key", [BIG_KEY, "0123.part"])
def test_file_of_which_nothing_came_leaves_nothing(root: Path, key: str) -> None:
    PartialFile(root, key, BIG).close()
    assert private(root) == []


def test_file_whose_bytes_nothing_proves_leaves_nothing(root: Path) -> None:
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        os.pwrite(file.fd, CONTENT, 0)
    assert private(root) == []


@pytest.mark.parametrize("small", [False, True], ids=["here", "tmpfs"])
def test_what_was_only_reserved_is_given_back(root: Path, small: bool) -> None:
    with small_disk(root) if small else nullcontext():
        begun(root, PIECE).close()
        kept = root / ".syncd" / BIG_KEY
        assert kept.read_bytes() == PIECE
        assert kept.stat().st_blocks * 512 < BIG // 2
        with closing(PartialFile(root, BIG_KEY, BIG)) as file:
            assert kept.stat().st_blocks * 512 >= BIG
            assert file.prove() == len(PIECE)


def test_offer_that_is_refused_in_the_end_loses_nothing(root: Path) -> None:
    """Neither what was only claimed, nor what was being proved when it ended."""
    begun(root, PIECE * 2).close()
    PartialFile(root, BIG_KEY, BIG).close()
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        file.prove(lambda: True)
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert file.prove() == 2 * len(PIECE)


def test_file_that_turns_out_to_be_damaged_throughout_leaves_nothing(root: Path) -> None:
    begun(root, PIECE * 2).close()
    (root / ".syncd" / BIG_KEY).write_bytes(bytes(2 * len(PIECE)))
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert file.prove() == 0
    assert private(root) == []


def test_file_is_received_once_at_a_time(root: Path) -> None:
    """Who comes second cuts nothing off, and takes nothing away."""
    with closing(begun(root, PIECE)) as first:
        with pytest.raises(TransferError, match="being received already") as caught:
            PartialFile(root, BIG_KEY, BIG)
        assert caught.value.type == ErrorType.WAIT
        assert os.fstat(first.fd).st_blocks * 512 >= BIG
        os.pwrite(first.fd, PIECE, len(PIECE))
        first.publish(Place(Action.NEW, WHERE))
    assert files(root) == {"file.txt": PIECE * 2}


def test_finished_file_keeps_its_time_when_it_is_closed(root: Path) -> None:
    with arrived(root) as file:
        sealed = Identity.of(os.fstat(file.fd))
        file.publish(Place(Action.NEW, WHERE))
    assert identity_of(root, WHERE) == sealed


def test_what_replaced_the_folder_meanwhile_is_not_touched(root: Path) -> None:
    with closing(PartialFile(root, KEY, SIZE)):
        root.rename(root.with_name("moved"))
        (root / ".syncd").mkdir(parents=True, mode=0o700)
        (root / ".syncd" / KEY).write_bytes(b"another")
    assert (root / ".syncd" / KEY).read_bytes() == b"another"


def test_where_there_are_no_locks_nothing_is_taken_away(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might be the next transfer's already."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    PartialFile(root, KEY, SIZE).close()
    assert private(root) == [KEY]


# Claims


def test_claim_says_what_will_be_gone_on_from_and_makes_nothing(root: Path) -> None:
    assert partial.claim(root, BIG_KEY, BIG) == 0
    assert not (root / ".syncd").exists()
    begun(root, PIECE * 3).close()
    before = snapshot(root)
    assert partial.claim(root, BIG_KEY, BIG) == 3 * len(PIECE)
    assert partial.claim(root, BIG_KEY, len(PIECE)) == 0
    assert partial.claim(root, "0123.part", BIG) == 0
    assert snapshot(root) == before


def test_claim_on_a_folder_that_is_not_ours_is_an_error_to_tell(root: Path) -> None:
    (root / ".syncd").symlink_to(root.parent / "outside")
    with pytest.raises(TransferError, match="is a link"):
        partial.claim(root, BIG_KEY, BIG)


def test_notes_that_cannot_be_opened_now_are_not_taken_for_none(root: Path) -> None:
    """Too many files are open. What has come is neither offered anew nor thrown away."""
    begun(root, PIECE * 3).close()
    with few_descriptors(2), pytest.raises(TransferError, match="Too many open") as caught:
        partial.claim(root, BIG_KEY, BIG)
    assert caught.value.type == ErrorType.WAIT
    with few_descriptors(5), pytest.raises(TransferError, match="Too many open") as caught:
        PartialFile(root, BIG_KEY, BIG)
    assert caught.value.type == ErrorType.WAIT
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        with few_descriptors(2), pytest.raises(TransferError, match="Too many open") as caught:
            file.prove()
        assert caught.value.type == ErrorType.WAIT
        assert file.offset == os.fstat(file.fd).st_size == 3 * len(PIECE)
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert file.prove() == 3 * len(PIECE)


def test_what_is_not_gone_on_with_now_gives_back_its_room(root: Path) -> None:
    begun(root, PIECE).close()
    with few_descriptors(5), pytest.raises(TransferError, match="Too many open"):
        PartialFile(root, BIG_KEY, BIG)
    assert (root / ".syncd" / BIG_KEY).stat().st_blocks * 512 < BIG // 2


@pytest.mark.parametrize("kind", ["link", "directory", "nothing", "another file's"])
def test_notes_that_are_none_are_a_new_beginning(root: Path, kind: str) -> None:
    begun(root, PIECE * 3).close()
    notes = root / ".syncd" / f"{BIG_KEY}.blocks"
    notes.unlink()
    match kind:
        case "link":
            notes.symlink_to(root.parent / "outside" / "canary")
        case "directory":
            notes.mkdir()
        case "another file's":
            notes.write_bytes(b"notes")
        case _:
            pass
    assert partial.claim(root, BIG_KEY, BIG) == 0
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert (file.offset, file.prove()) == (0, 0)


# Quarantine


def test_damaged_file_is_put_aside_and_the_next_one_starts_anew(root: Path) -> None:
    with closing(begun(root, PIECE * 3)) as file:
        where = file.quarantine()
        file.discard()
    assert (root / where).read_bytes() == PIECE * 3
    assert private(root) == [where.removeprefix(".syncd/")]
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert file.prove() == 0
        assert len(private(root)) == 2


def test_quarantine_keeps_the_newest(root: Path) -> None:
    for number in range(room.MAX_BAD + 3):
        with closing(begun(root, b"bad", 3, key=f"{number:04}.part")) as file:
            file.quarantine()
    assert private(root) == [f"{number:04}.bad" for number in range(3, room.MAX_BAD + 3)]


def test_quarantine_that_is_gone_is_told(root: Path) -> None:
    with closing(begun(root, PIECE)) as file:
        (root / ".syncd" / BIG_KEY).unlink()
        with pytest.raises(TransferError, match="cannot be put aside"):
            file.quarantine()


# Arriving, where something is in the way


def test_other_versions_of_the_same_file_are_forgotten(root: Path) -> None:
    """And nothing else: neither other files, nor those that nobody resumes."""
    older = key_of("alice@example.org", "photos", "a/file.txt", 99, 1)
    other = key_of("alice@example.org", "photos", "a/other.txt", 99, 1)
    with closing(begun(root, CONTENT, key="0123.part")):
        for key in (older, other):
            begun(root, CONTENT, 99, key=key).close()
        with closing(PartialFile(root, KEY, SIZE)):
            assert private(root) == sorted([other, f"{other}.blocks", "0123.part", KEY])


def test_version_that_is_arriving_is_not_forgotten_for_another(root: Path) -> None:
    """Two machines of one account have each its own version, and offer them at once."""
    other = key_of("alice@example.org", "photos", "a/file.txt", BIG, 1)
    with closing(begun(root, PIECE * 3, key=other)) as first:
        with closing(PartialFile(root, KEY, SIZE)):
            assert private(root) == sorted([other, f"{other}.blocks", KEY])
        first.publish(Place(Action.NEW, WHERE))
    assert files(root) == {"file.txt": PIECE * 3}
    assert private(root) == []


def test_notes_stay_as_long_as_their_file(root: Path) -> None:
    """One that is cut off while another version comes loses nothing of what had arrived."""
    other = key_of("alice@example.org", "photos", "a/file.txt", BIG, 1)
    first = begun(root, PIECE * 3, key=other)
    with closing(PartialFile(root, KEY, SIZE)):
        killed(first)
    with closing(PartialFile(root, other, BIG)) as again:
        assert again.prove() == 3 * len(PIECE)


def test_file_that_is_cleared_up_while_it_is_opened_is_not_written_to(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is locked, another transfer may take it for one that nobody uses."""
    begun(root, PIECE).close()
    real = room.occupy

    def late(fd: int) -> bool:
        (root / ".syncd" / BIG_KEY).unlink()
        return real(fd)

    with monkeypatch.context() as patched:
        patched.setattr(room, "occupy", late)
        with pytest.raises(TransferError, match="cleared up at this moment") as caught:
            PartialFile(root, BIG_KEY, BIG)
    assert caught.value.type == ErrorType.WAIT
    with closing(PartialFile(root, BIG_KEY, BIG)) as file:
        assert file.prove() == 0


def test_partial_file_of_a_plain_client_leaves_the_others_alone(root: Path) -> None:
    begun(root, CONTENT, SIZE, key=KEY).close()
    with closing(PartialFile(root, "4567.part", SIZE)):
        assert private(root) == sorted([*KEPT, "4567.part"])


def test_closing_twice_closes_once(root: Path) -> None:
    file = PartialFile(root, KEY, SIZE)
    file.close()
    taken = os.open(root, os.O_RDONLY)  # most likely the number that was just let go
    file.close()
    assert os.fstat(taken).st_ino == root.stat().st_ino
    os.close(taken)


def test_discarding_deletes_once(root: Path) -> None:
    file = PartialFile(root, KEY, SIZE)
    file.discard()
    file.close()
    begun(root, CONTENT, SIZE, key=KEY).close()  # the next one's
    file.discard()
    assert private(root) == KEPT


def test_discarding_what_somebody_else_deleted_is_no_failure(root: Path) -> None:
    file = PartialFile(root, KEY, SIZE)
    (root / ".syncd" / KEY).unlink()
    file.discard()
    file.close()
    assert private(root) == []


def test_folder_that_is_gone_is_an_error_to_tell(root: Path) -> None:
    file = PartialFile(root, KEY, SIZE)
    root.rename(root.with_name("moved"))
    with pytest.raises(TransferError, match="No such file"):
        file.discard()
    file.close()
    with pytest.raises(TransferError, match="No such file"):
        PartialFile(root, KEY, SIZE)


def test_file_that_the_disk_refuses_leaves_nothing(root: Path) -> None:
    """A peer cannot fill the directory with the names of files that are never sent."""
    with pytest.raises(TransferError):
        PartialFile(root, "0123.part", 2**63 - 1)
    assert private(root) == []


def test_file_that_no_disk_takes_is_not_waited_for(root: Path) -> None:
    with pytest.raises(TransferError) as caught:
        PartialFile(root, KEY, 2**63 - 1)
    assert caught.value.type == ErrorType.CANCEL


def test_notes_that_cannot_be_closed_end_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS tells only then that the quota is used up."""
    file = begun(root, PIECE * 3)
    notes = (root / ".syncd" / f"{BIG_KEY}.blocks").stat().st_ino
    real = os.close

    def close(fd: int) -> None:
        inode = os.fstat(fd).st_ino
        real(fd)
        if inode == notes:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        file.close()
    assert file.fd == -1
    with closing(PartialFile(root, BIG_KEY, BIG)) as again:
        assert again.prove() == 3 * len(PIECE)


# Links


def test_linked_private_directory_is_not_followed(root: Path) -> None:
    (root / ".syncd").symlink_to(root.parent / "outside")
    before = snapshot(root.parent)
    with pytest.raises(TransferError):
        PartialFile(root, KEY, SIZE)
    assert snapshot(root.parent) == before


def test_linked_partial_file_is_not_followed(root: Path) -> None:
    PartialFile(root, KEY, SIZE).close()
    (root / ".syncd" / KEY).symlink_to(root.parent / "outside" / "canary")
    before = snapshot(root.parent)
    with pytest.raises(TransferError):
        PartialFile(root, KEY, SIZE)
    assert snapshot(root.parent) == before


def test_file_that_has_a_second_name_is_not_changed(root: Path) -> None:
    """The other one may be its final name: here a crash came between link and unlink."""
    killed_between_link_and_unlink(root)
    before = identity_of(root, WHERE)
    with pytest.raises(TransferError, match="no plain file"):
        PartialFile(root, KEY, SIZE)
    with closing(PartialFile(root, KEY, SIZE)) as file:
        assert file.offset == 0
    assert identity_of(root, WHERE) == before


@pytest.mark.parametrize("kind", ["hard link", "fifo", "directory"])
def test_only_a_plain_file_is_gone_on_from(root: Path, kind: str) -> None:
    """A second name of the canary would be written to, and lose its mode."""
    PartialFile(root, KEY, SIZE).close()
    place = root / ".syncd" / KEY
    match kind:
        case "hard link":
            place.hardlink_to(root.parent / "outside" / "canary")
        case "fifo":
            os.mkfifo(place)
        case _:
            place.mkdir()
    with pytest.raises(TransferError):
        PartialFile(root, KEY, SIZE)
    assert (root.parent / "outside" / "canary").read_bytes() == b"alive"


@pytest.mark.parametrize("where", [("link", "file.txt"), ("a", "link", "file.txt")])
def test_linked_directories_are_never_written_through(
    root: Path, where: tuple[str, ...]
) -> None:
    for directory in (root, root / "a"):
        (directory / "link").symlink_to(root.parent / "outside")
    before = snapshot(root.parent / "outside")
    with arrived(root) as file:
        with pytest.raises(TransferError):
            file.choose_place(where, None, DIGEST, "alice")
        with pytest.raises(TransferError):
            file.publish(Place(Action.NEW, where))
    assert snapshot(root.parent / "outside") == before
    assert private(root) == KEPT


def test_linked_final_name_is_kept_and_never_followed(root: Path) -> None:
    """Even a link to the very same content is somebody's link, not this file."""
    (root.parent / "outside" / "canary").write_bytes(CONTENT)
    (root / "a" / "file.txt").symlink_to(root.parent / "outside" / "canary")
    with arrived(root) as file:
        place = file.choose_place(WHERE, None, DIGEST, "alice")
        file.publish(place)
    assert place.action == Action.CONFLICT
    assert (root / "a" / "file.txt").is_symlink()
    assert (root / "a" / place.components[1]).read_bytes() == CONTENT


def test_parent_that_becomes_a_link_after_the_choice_is_not_followed(root: Path) -> None:
    before = snapshot(root.parent / "outside")
    with arrived(root) as file:
        place = file.choose_place(WHERE, None, DIGEST, "alice")
        (root / "a").rmdir()
        (root / "a").symlink_to(root.parent / "outside")
        with pytest.raises(TransferError):
            file.publish(place)
    assert snapshot(root.parent / "outside") == before
    assert private(root) == KEPT


def test_directory_at_the_final_name_is_a_conflict(root: Path) -> None:
    (root / "a" / "file.txt").mkdir()
    with arrived(root) as file:
        place = file.choose_place(WHERE, None, DIGEST, "alice")
        file.publish(place)
    assert place.action == Action.CONFLICT
    assert (root / "a" / "file.txt").is_dir()


# Sealing


def test_sealed_file_has_the_senders_time_and_ordinary_permissions(root: Path) -> None:
    (root / "ordinary").touch()
    with arrived(root) as file:
        sealed = file.seal(MTIME)
        status = os.fstat(file.fd)
    assert status.st_mode == (root / "ordinary").stat().st_mode
    assert sealed == Identity(SIZE, MTIME, status.st_ino)


def test_file_without_a_time_of_the_sender_keeps_that_of_its_last_byte(root: Path) -> None:
    with closing(PartialFile(root, KEY, SIZE)) as file:
        os.pwrite(file.fd, CONTENT, 0)
        written = os.fstat(file.fd).st_mtime_ns
        assert file.seal(None).mtime_ns == written


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_umask_is_honoured(root: Path, umask: int, mode: int) -> None:
    """In a process of its own: the umask of this one belongs to all threads."""
    code = (
        "import sys, pathlib; from syncd.disk.partial import PartialFile;"
        "f = PartialFile(pathlib.Path(sys.argv[1]), 'x.part', 0); f.seal(None);"
        "from syncd.disk.partial import Place, Action;"
        "f.publish(Place(Action.NEW, ('d', 'f')))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(root)],
        check=True,
        umask=umask,
    )
    assert (root / "d" / "f").stat().st_mode & 0o777 == mode
    assert (root / "d").stat().st_mode & 0o777 == 0o777 & ~umask


def test_umask_that_the_kernel_does_not_tell_is_taken_as_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 4.7."""
    (tmp_path / "status").write_text("Name:\tsyncd\n")
    monkeypatch.setattr(partial, "Path", lambda _: tmp_path / "status")
    assert partial._read_umask() == 0o077


# Choosing and publishing


def test_new_file_gets_its_name(root: Path) -> None:
    with arrived(root) as file:
        place = file.choose_place(WHERE, None, DIGEST, "alice")
        assert place == Place(Action.NEW, WHERE)
        sealed = Identity.of(os.fstat(file.fd))
        file.publish(place)
    assert files(root) == {"file.txt": CONTENT}
    assert identity_of(root, WHERE) == sealed
    assert private(root) == []


def test_directories_are_made_for_a_new_file(root: Path) -> None:
    with arrived(root) as file:
        file.publish(file.choose_place(("x", "y", "z"), None, DIGEST, "alice"))
    assert (root / "x" / "y" / "z").read_bytes() == CONTENT


def test_published_file_is_not_discarded_any_more(root: Path) -> None:
    with arrived(root) as file:
        file.publish(Place(Action.NEW, WHERE))
        file.discard()
    assert files(root) == {"file.txt": CONTENT}


def test_same_content_needs_no_second_copy(root: Path) -> None:
    identity = existing(root, CONTENT)
    with arrived(root) as file:
        assert file.choose_place(WHERE, None, DIGEST, "alice") == Place(
            Action.SAME, WHERE, identity
        )


def test_same_size_is_not_the_same_content(root: Path) -> None:
    existing(root, b"x" * SIZE)
    with arrived(root) as file:
        assert file.choose_place(WHERE, None, DIGEST, "alice").action == Action.CONFLICT


def test_content_that_is_not_known_is_never_the_same(root: Path) -> None:
    existing(root, CONTENT)
    with arrived(root) as file:
        assert file.choose_place(WHERE, None, None, "alice").action == Action.CONFLICT


def test_untouched_version_of_the_same_sender_is_replaced(root: Path) -> None:
    known = existing(root)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        file.publish(place)
    assert place == Place(Action.REPLACE, WHERE, known)
    assert files(root) == {"file.txt": CONTENT}
    assert private(root) == []


@pytest.mark.parametrize("change", ["content", "time", "file"])
def test_version_that_was_touched_since_is_kept(root: Path, change: str) -> None:
    known = existing(root)
    path = root / "a" / "file.txt"
    match change:
        case "content":
            path.write_bytes(b"our edit")
        case "time":
            os.utime(path, ns=(1, 1))
        case _:
            path.rename(root / "a" / "elsewhere")
            path.write_bytes(b"ours")
            os.utime(path, ns=(known.mtime_ns, known.mtime_ns))
    before = files(root)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        file.publish(place)
    assert place.action == Action.CONFLICT
    assert files(root) == before | {place.components[1]: CONTENT}


def test_version_that_changes_in_the_last_instant_is_kept_aside(root: Path) -> None:
    known = existing(root)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        (root / "a" / "file.txt").write_bytes(b"our last word")
        file.publish(place)
    [aside] = set(files(root)) - {"file.txt"}
    assert aside.startswith("file.conflict-local-")
    assert aside.endswith(".txt")
    assert files(root) == {"file.txt": CONTENT, aside: b"our last word"}
    assert private(root) == []


def test_name_that_is_taken_while_a_version_is_kept_aside_is_passed_over(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program is always faster, twice: nothing is lost, and nothing replaced."""
    known = existing(root)
    real = beneath.rename_new
    rivals: list[str] = []

    def raced(source: str, source_fd: int, target: str, target_fd: int) -> None:
        if len(rivals) < 2:
            rivals.append(target)
            (root / "a" / target).write_bytes(b"rival")
        real(source, source_fd, target, target_fd)

    monkeypatch.setattr(partial, "rename_new", raced)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        (root / "a" / "file.txt").write_bytes(b"our last word")
        file.publish(place)
    assert sorted(files(root).values()) == sorted(
        [CONTENT, b"our last word", b"rival", b"rival"]
    )
    assert files(root)["file.txt"] == CONTENT
    assert private(root) == []


def refuses_conflicts(source: str, source_fd: int, target: str, target_fd: int) -> None:
    """Rename, but to no name that is not there yet: the directory cannot grow."""
    if ".conflict-" in target:
        raise OSError(errno.ENOSPC, "No space left on device")
    beneath.rename_new(source, source_fd, target, target_fd)


def test_version_that_cannot_be_kept_aside_changes_nothing_of_the_new_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the file would be sent back to where it came from; the start finds the old one."""
    known = existing(root)
    monkeypatch.setattr(partial, "rename_new", refuses_conflicts)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        (root / "a" / "file.txt").write_bytes(b"our last word")
        sealed = Identity.of(os.fstat(file.fd))
        with pytest.raises(TransferError, match="No space left"):
            file.publish(place)
    assert files(root) == {"file.txt": CONTENT}
    assert identity_of(root, WHERE) == sealed
    monkeypatch.undo()
    [found] = clean(root, NOW)
    assert (root / found).read_bytes() == b"our last word"


def test_published_file_makes_no_room_for_its_notes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, the end of a partial file goes for them."""
    known = existing(root)
    content = PIECE * 5

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(partial, "rename_new", refuses_conflicts)
    monkeypatch.setattr(partial, "open_notes", refuse)
    with arrived(root, content) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        (root / "a" / "file.txt").write_bytes(b"our last word")
        with pytest.raises(TransferError, match="No space left"):
            file.publish(place)
    assert files(root) == {"file.txt": content}


def test_file_that_got_its_name_and_could_not_lose_the_other_is_not_changed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where renaming without replacing takes a link, and an unlink after that."""

    def half(source: str, source_fd: int, target: str, target_fd: int) -> None:
        os.link(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(partial, "rename_new", half)
    with arrived(root) as file:
        sealed = Identity.of(os.fstat(file.fd))
        with pytest.raises(TransferError, match="Input/output error"):
            file.publish(Place(Action.NEW, WHERE))
    assert files(root) == {"file.txt": CONTENT}
    assert identity_of(root, WHERE) == sealed


def test_version_that_is_deleted_in_the_last_instant_is_no_hindrance(root: Path) -> None:
    known = existing(root)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        (root / "a" / "file.txt").unlink()
        file.publish(place)
    assert files(root) == {"file.txt": CONTENT}


def test_name_that_is_taken_in_the_last_instant_is_told_and_chosen_anew(root: Path) -> None:
    with arrived(root) as file:
        place = file.choose_place(WHERE, None, DIGEST, "alice")
        existing(root)
        with pytest.raises(FileExistsError):
            file.publish(place)
        again = file.choose_place(WHERE, None, DIGEST, "alice")
        file.publish(again)
    assert again.action == Action.CONFLICT
    assert files(root) == {"file.txt": b"ours", again.components[1]: CONTENT}


def test_two_programs_that_publish_at_once_lose_nothing(root: Path) -> None:
    """Every one of many files for one name is there in the end."""
    contents = [b"version %d" % number for number in range(12)]

    def deliver(content: bytes) -> None:
        key = f"{content.decode().replace(' ', '')}.part"
        with arrived(root, content, key) as file:
            while True:
                place = file.choose_place(WHERE, None, blake3.blake3(content).digest(), "alice")
                try:
                    file.publish(place)
                except FileExistsError:
                    continue
                return

    threads = [threading.Thread(target=deliver, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(files(root).values()) == sorted(contents)
    assert private(root) == []


def test_failure_of_the_disk_while_publishing_is_explained(root: Path) -> None:
    with arrived(root) as file:
        (root / ".syncd" / KEY).unlink()
        with pytest.raises(TransferError, match="cannot be stored"):
            file.publish(Place(Action.NEW, WHERE))


# Replacing, where files cannot be exchanged


@pytest.fixture(params=[errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def old_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's call that knows no flags, as on NFS and many a FUSE."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(partial, "exchange", refuse)
    if request.param != errno.EOPNOTSUPP:
        monkeypatch.setattr(beneath, "_renameat2", refuse)


@pytest.mark.usefixtures("old_system")
def test_version_is_replaced_on_any_file_system(root: Path) -> None:
    known = existing(root)
    with arrived(root) as file:
        file.publish(file.choose_place(WHERE, known, DIGEST, "alice"))
    assert files(root) == {"file.txt": CONTENT}
    assert private(root) == []


@pytest.mark.usefixtures("old_system")
def test_version_that_is_gone_is_no_hindrance_on_any_file_system(root: Path) -> None:
    known = existing(root)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        (root / "a" / "file.txt").unlink()
        file.publish(place)
    assert files(root) == {"file.txt": CONTENT}


@pytest.mark.usefixtures("old_system")
@pytest.mark.parametrize("rival", [False, True])
def test_version_that_changed_in_the_last_instant_stays_on_any_file_system(
    root: Path, monkeypatch: pytest.MonkeyPatch, rival: bool
) -> None:
    """And if its name is taken while it is looked at, it gets another; nothing is lost."""
    known = existing(root)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        (root / "a" / "file.txt").write_bytes(b"our last word")
        real = partial._look

        def raced(name: str, directory: int) -> Identity | None:
            if rival and ".aside." in name:
                (root / "a" / "file.txt").write_bytes(b"rival")
            return real(name, directory)

        with monkeypatch.context() as patched:
            patched.setattr(partial, "_look", raced)
            with pytest.raises(FileExistsError):
                file.publish(place)
        file.publish(file.choose_place(WHERE, known, DIGEST, "alice"))
    expected = {b"our last word", CONTENT} | ({b"rival"} if rival else set())
    assert set(files(root).values()) == expected
    assert files(root)["file.txt"] == (b"rival" if rival else b"our last word")
    assert private(root) == []


@pytest.mark.parametrize("step", [1, 2])
def test_file_system_that_can_neither_exchange_nor_link_loses_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The old version is back at its place, and the new one can be offered again."""
    known = existing(root)
    real, calls = beneath.rename_new, 0

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "no")

    def failing(source: str, source_fd: int, target: str, target_fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise PermissionError(errno.EPERM, "no links here")
        real(source, source_fd, target, target_fd)

    monkeypatch.setattr(partial, "exchange", refuse)
    monkeypatch.setattr(partial, "rename_new", failing)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        with pytest.raises(TransferError, match="no links here"):
            file.publish(place)
    assert files(root) == {"file.txt": b"ours"}
    assert private(root) == KEPT


def test_exchange_that_fails_leaves_both_as_they_were(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = existing(root)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(partial, "exchange", refuse)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        with pytest.raises(TransferError, match="Input/output error"):
            file.publish(place)
    assert files(root) == {"file.txt": b"ours"}
    assert private(root) == KEPT


# After a crash

NOW = time.time()
MONTH = 30 * 24 * 3600


class Killed(BaseException):
    """Nothing runs after this, as after kill -9."""


def killed(file: PartialFile) -> None:
    """Let go of a partial file as kill -9 does: nothing is given back."""
    os.close(file.fd)
    file.blocks.forget()


def killed_between_link_and_unlink(root: Path) -> None:
    file = begun(root, CONTENT, SIZE, key=KEY)
    file.seal(MTIME)
    (root / "a" / "file.txt").hardlink_to(root / ".syncd" / KEY)
    killed(file)


def killed_while_replacing(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, call: str, after: bool, edit: bytes = b""
) -> None:
    """Replace a file, and die at one of the calls of it."""
    known = existing(root)
    real: Callable[..., None] = getattr(partial, call)

    def die(*args: object) -> None:
        if after:
            real(*args)
        raise Killed

    file = PartialFile(root, KEY, SIZE)
    os.pwrite(file.fd, CONTENT, 0)
    file.blocks.update(memoryview(CONTENT))
    file.blocks.close()
    file.seal(MTIME)
    place = file.choose_place(WHERE, known, DIGEST, "alice")
    if edit:
        (root / "a" / "file.txt").write_bytes(edit)
    with monkeypatch.context() as patched:
        patched.setattr(partial, call, die)
        with pytest.raises(Killed):
            file.publish(place)
    os.close(file.fd)


def test_file_that_was_about_to_replace_another_is_gone_on_with(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_while_replacing(root, monkeypatch, call="exchange", after=False)
    assert private(root) != [KEY, f"{KEY}.blocks"]
    assert clean(root, NOW) == []
    assert private(root) == [KEY, f"{KEY}.blocks"]
    with closing(PartialFile(root, KEY, SIZE)) as file:
        assert file.prove() == SIZE
    assert files(root) == {"file.txt": b"ours"}


def test_version_that_was_just_replaced_is_cleared_up(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_while_replacing(root, monkeypatch, call="exchange", after=True)
    assert clean(root, NOW) == []
    assert private(root) == []
    assert files(root) == {"file.txt": CONTENT}


def test_last_word_that_nobody_could_keep_aside_any_more_is_found(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an offer of another version nor the start deletes it."""
    killed_while_replacing(root, monkeypatch, call="exchange", after=True, edit=b"last word")
    other = key_of("alice@example.org", "photos", "a/file.txt", 99, 1)
    with closing(PartialFile(root, other, 99)) as file:
        file.discard()
    [found] = clean(root, NOW)
    assert found.startswith("recovered.conflict-local-")
    assert (root / found).read_bytes() == b"last word"
    assert files(root) == {"file.txt": CONTENT}
    assert private(root) == []


def test_version_that_was_moved_out_of_the_way_is_found(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only case in which a name is gone: a crash, where files cannot be exchanged."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(partial, "exchange", refuse)
    real = partial._look

    def die(name: str, directory: int) -> Identity | None:
        if ".aside." in name:
            raise Killed
        return real(name, directory)

    known = existing(root)
    with arrived(root) as file:
        place = file.choose_place(WHERE, known, DIGEST, "alice")
        with monkeypatch.context() as patched:
            patched.setattr(partial, "_look", die)
            with pytest.raises(Killed):
                file.publish(place)
    [found] = clean(root, NOW)
    assert (root / found).read_bytes() == b"ours"
    assert private(root) == KEPT


def test_swap_whose_file_was_begun_anew_meanwhile_gives_way(root: Path) -> None:
    begun(root, CONTENT, SIZE, key=KEY).close()
    inner = root / ".syncd" / f"{KEY}.swap.0.1.2.3"
    inner.write_bytes(CONTENT)
    inner.rename(inner.with_name(f"{KEY}.swap.{inner.stat().st_ino}.1.2.3"))
    assert clean(root, NOW) == []
    assert private(root) == KEPT


def test_start_clears_up_what_nobody_resumes(root: Path) -> None:
    for key in ("0123.part", KEY):
        killed(begun(root, PIECE * 3, key=key))
    (root / ".syncd" / "stray.part.blocks").write_bytes(b"notes")
    (root / ".syncd" / "note from the user").write_bytes(b"!")
    assert clean(root, NOW) == []
    assert private(root) == sorted([KEY, f"{KEY}.blocks", "note from the user"])


def test_what_is_not_gone_on_with_for_a_month_is_cleared_up(root: Path) -> None:
    """However old its content says that it is: only the time on this disk counts."""
    with closing(begun(root, PIECE)) as file:
        file.seal(1)
    with closing(begun(root, PIECE, key="4567.part")) as file:
        file.quarantine()
    assert clean(root, time.time() + MONTH - 60) == []
    assert private(root) == sorted([BIG_KEY, f"{BIG_KEY}.blocks", "4567.bad"])
    assert clean(root, time.time() + MONTH + 60) == []
    assert private(root) == []


def test_what_another_process_receives_is_left_alone(root: Path) -> None:
    with closing(begun(root, PIECE, key="0123.part")), closing(begun(root, PIECE)):
        assert clean(root, time.time() + 2 * MONTH) == []
        assert private(root) == sorted(["0123.part", BIG_KEY, f"{BIG_KEY}.blocks"])


def test_file_that_has_its_name_already_is_no_partial_file_any_more(root: Path) -> None:
    """Where renaming without replacing takes a link and an unlink."""
    killed_between_link_and_unlink(root)
    assert clean(root, NOW) == []
    assert private(root) == []
    assert files(root) == {"file.txt": CONTENT}


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_start_touches_only_plain_files(root: Path, kind: str) -> None:
    PartialFile(root, KEY, SIZE).close()
    place = root / ".syncd" / "0123.part"
    match kind:
        case "link":
            place.symlink_to(root.parent / "outside" / "canary")
        case "fifo":
            os.mkfifo(place)
        case _:
            place.mkdir()
    before = snapshot(root.parent)
    assert clean(root, time.time()) == []
    assert snapshot(root.parent) == before


def test_linked_private_directory_is_not_cleared_up(root: Path) -> None:
    (root.parent / "outside" / "0123.part").write_bytes(b"alive")
    (root / ".syncd").symlink_to(root.parent / "outside")
    before = snapshot(root.parent)
    with pytest.raises(TransferError):
        clean(root, NOW)
    assert snapshot(root.parent) == before


def test_folder_without_leftovers_is_no_failure(root: Path) -> None:
    assert clean(root, NOW) == []
    assert not (root / ".syncd").exists()


def test_file_system_without_locks_is_cleared_up_by_name_and_age(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for key in ("0123.part", KEY):
        begun(root, PIECE, key=key).close()
    clean(root, NOW)
    assert private(root) == [KEY, f"{KEY}.blocks"]


# Names of conflicts


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("photo.jpeg", "photo.conflict-alice-", ".jpeg"),
        ("archive.tar.gz", "archive.tar.conflict-alice-", ".gz"),
        ("README", "README.conflict-alice-", ""),
        (".profile", ".profile.conflict-alice-", ""),
        ("x" * 251 + ".txt", "x" * 200, ".txt"),
        ("é" * 125 + ".txt", "é" * 100, ".txt"),
        ("\U0001f4c1" * 63 + "abc", "\U0001f4c1" * 50, ""),
        ("x." + "y" * 253, "x." + "y" * 200, ""),
        ("\U0001f4c1." + "y" * 250, "\U0001f4c1." + "y" * 190, ""),
    ],
)
def test_conflict_keeps_beginning_and_extension_and_fits(
    root: Path, name: str, begin: str, end: str
) -> None:
    (root / name).write_bytes(b"ours")
    with arrived(root) as file:
        place = file.choose_place((name,), None, DIGEST, "alice")
        file.publish(place)
    [conflict] = place.components
    assert conflict.startswith(begin)
    assert conflict.endswith(end)
    assert ".conflict-alice-" in conflict
    assert len(conflict.encode()) <= 255
    assert ((root / name).read_bytes(), (root / conflict).read_bytes()) == (b"ours", CONTENT)


@pytest.mark.parametrize("who", ["a|b", "a*?", "a\\b", 'a"<>:'])
def test_name_of_a_conflict_is_one_that_every_system_can_hold(root: Path, who: str) -> None:
    """RFC 7622 allows much before the @."""
    existing(root)
    with arrived(root) as file:
        place = file.choose_place(WHERE, None, DIGEST, who)
    assert place.action == Action.CONFLICT
    assert paths.split("/".join(place.components), portable=True) == place.components
    assert place.components[1].startswith("file.conflict-a_")


def test_name_of_a_conflict_can_be_told_from_all_others_everywhere(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "datetime", Noon)
    (root / "File.txt").write_bytes(b"ours")
    (root / "fILE.Conflict-alice-20300101-120000.TXT").touch()
    with arrived(root) as file:
        place = file.choose_place(("File.txt",), None, DIGEST, "alice")
    assert place.components == ("File.conflict-alice-20300101-120000-2.txt",)


class Noon(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Noon:
        return cls(2030, 1, 1, 12, tzinfo=tz)


def test_conflict_fits_even_with_the_longest_of_senders(root: Path) -> None:
    """A local part may have 1,023 bytes."""
    name = "x" * 200 + ".txt"
    (root / name).write_bytes(b"ours")
    with arrived(root) as file:
        place = file.choose_place((name,), None, DIGEST, "ü" * 511)
        file.publish(place)
    [conflict] = place.components
    assert conflict.startswith("x" * 100)
    assert conflict.endswith(".txt")
    assert (root / conflict).read_bytes() == CONTENT


def test_conflicts_of_the_same_second_are_counted(root: Path) -> None:
    existing(root)
    for number in range(5):
        with arrived(root, b"%d" % number, f"{number}.part") as file:
            file.publish(file.choose_place(WHERE, None, None, "alice"))
    assert sorted(files(root).values()) == [b"0", b"1", b"2", b"3", b"4", b"ours"]


def test_conflicts_have_an_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    existing(root)
    monkeypatch.setattr(partial, "_MAX_CONFLICTS", 1)
    with arrived(root) as file, pytest.raises(TransferError, match="conflicts"):
        file.choose_place(WHERE, None, DIGEST, "alice")


# Looking


def test_identity_is_of_regular_files_below_the_folder_only(root: Path) -> None:
    identity = existing(root)
    (root / "link").symlink_to(root / "a")
    status = (root / "a" / "file.txt").stat()
    assert identity == Identity(status.st_size, status.st_mtime_ns, status.st_ino)
    assert identity_of(root, ("link", "file.txt")) is None
    assert identity_of(root, ("missing",)) is None
    assert identity_of(root, ("missing", "file.txt")) is None


# A full disk


def test_full_disk_is_found_before_the_transfer_and_leaves_nothing(full: Path) -> None:
    with pytest.raises(TransferError) as caught:
        PartialFile(full, KEY, 2 << 20)
    assert caught.value.type == ErrorType.WAIT
    assert caught.value.hint
    assert private(full) == []


def test_full_disk_keeps_what_had_arrived_before(full: Path) -> None:
    begun(full, CONTENT, 900_000, key=KEY).close()
    with (full / "other").open("wb") as other:
        other.write(bytes(900_000))
    with pytest.raises(TransferError, match="too little room"):
        PartialFile(full, KEY, 900_000)
    assert private(full) == KEPT
    (full / "other").unlink()
    with closing(PartialFile(full, KEY, 900_000)) as file:
        assert file.prove() == SIZE


def test_room_that_is_needed_is_taken_from_the_quarantine(full: Path) -> None:
    with closing(PartialFile(full, "0123.part", 700_000)) as file:
        os.pwrite(file.fd, bytes(700_000), 0)
        file.quarantine()
    with closing(PartialFile(full, KEY, 700_000)):
        assert private(full) == [KEY]
