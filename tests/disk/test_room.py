from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import closing
from typing import TYPE_CHECKING

import blake3
import pytest

from syncd.disk import beneath, blocks, room
from syncd.disk.partial import PartialFile, clean, expire, key_of
from syncd.errors import ErrorType, TransferError

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
# Of the small disk, which is 1 MiB: two of these fit, three do not.
PART = 400 << 10  # bytes
CONTENT = blake3.blake3(b"content").digest(PART)
DAY = 24 * 3600.0  # seconds


@pytest.fixture(autouse=True)
def slow_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if whatever comes had taken so long that notes are worth it."""
    monkeypatch.setattr(blocks, "FIRST_MOMENT", 0.0)


def key(path: str, sender: str = "alice@example.org") -> str:
    return key_of(sender, "photos", path, PART, 1)


def begun(root: Path, name: str, content: bytes = CONTENT, size: int = PART) -> PartialFile:
    """A partial file of which a beginning has come."""
    file = PartialFile(root, name, size)
    os.pwrite(file.fd, content, 0)
    file.blocks.update(memoryview(content))
    return file


def killed(file: PartialFile) -> None:
    """Let go of it as kill -9 does: nothing is given back."""
    os.close(file.fd)
    file.blocks.forget()


def parts(root: Path) -> set[str]:
    return {path.name for path in (root / ".syncd").iterdir() if path.suffix != room.NOTES}


def taken(root: Path, name: str) -> int:
    """What a partial file takes of the disk, bytes."""
    return (root / ".syncd" / name).stat().st_blocks * 512


# On a full disk


def test_the_oldest_that_nobody_uses_makes_room(full: Path) -> None:
    for name in ("a", "b"):
        begun(full, key(name)).close()
    with closing(PartialFile(full, key("c"), PART)):
        assert parts(full) == {key("b"), key("c")}


def test_what_is_not_what_was_sent_makes_room_first(full: Path) -> None:
    begun(full, key("a")).close()
    with closing(begun(full, "0123.part")) as file:
        file.quarantine()
    with closing(PartialFile(full, key("c"), PART)):
        assert parts(full) == {key("a"), key("c")}


def test_what_is_in_use_stays(full: Path) -> None:
    with closing(begun(full, key("a"))), closing(begun(full, key("b"))):
        with pytest.raises(TransferError, match="too little room") as caught:
            PartialFile(full, key("c"), PART)
        assert (caught.value.type, bool(caught.value.hint)) == (ErrorType.WAIT, True)
        assert parts(full) == {key("a"), key("b")}


def test_nothing_goes_for_what_does_not_fit_even_then(full: Path) -> None:
    """Or an offer of more than there is would cost all others what has arrived of theirs."""
    for name in ("a", "b"):
        begun(full, key(name)).close()
    with pytest.raises(TransferError, match="too little room"):
        PartialFile(full, key("c"), 2 * MIB)
    assert parts(full) == {key("a"), key("b")}


def test_a_file_does_not_go_for_itself(full: Path) -> None:
    begun(full, key("a"), size=2 * PART).close()
    (full / "other").write_bytes(bytes(PART))
    with pytest.raises(TransferError, match="too little room"):
        PartialFile(full, key("a"), 2 * PART)
    assert parts(full) == {key("a")}
    (full / "other").unlink()
    with closing(PartialFile(full, key("a"), 2 * PART)) as file:
        assert file.prove() == PART


def test_a_part_of_the_disk_stays_free(full: Path) -> None:
    disk = os.statvfs(full)
    least = int(disk.f_blocks * room.LEAST_FREE)
    free = disk.f_bavail * disk.f_frsize
    # Two blocks: the private directory may take one.
    with pytest.raises(TransferError, match="too little room"):
        PartialFile(full, key("a"), free - (least - 1) * disk.f_frsize)
    with closing(PartialFile(full, key("a"), free - (least + 2) * disk.f_frsize)) as file:
        assert os.fstat(file.fd).st_blocks * 512 >= free - (least + 2) * disk.f_frsize


def test_what_has_its_room_already_goes_on_on_any_disk(full: Path) -> None:
    begun(full, key("a")).close()
    disk = os.statvfs(full)
    (full / "other").write_bytes(bytes(disk.f_bavail * disk.f_frsize))
    with closing(PartialFile(full, key("a"), PART)) as file:
        assert file.prove() == PART
    with closing(PartialFile(full, key("empty"), 0)) as file:
        assert file.offset == 0


def test_a_quota_makes_room_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system has room, and refuses all the same."""
    begun(tmp_path, key("a")).close()
    real = beneath.reserve

    def reserve(fd: int, size: int) -> None:
        if key("a") in parts(tmp_path):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(fd, size)

    monkeypatch.setattr(beneath, "reserve", reserve)
    with closing(PartialFile(tmp_path, key("b"), PART)):
        assert parts(tmp_path) == {key("b")}


def test_a_quota_that_no_room_helps_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reserve(_fd: int, _size: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(beneath, "reserve", reserve)
    with pytest.raises(TransferError, match="quota exceeded"):
        PartialFile(tmp_path, key("a"), PART)
    assert parts(tmp_path) == set()


def test_a_file_system_that_does_not_tell_its_size_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda _: silent)
    with closing(PartialFile(tmp_path, key("a"), PART)):
        assert taken(tmp_path, key("a")) >= PART


# How many


def test_of_one_peer_only_so_many_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are in use, and those of others, do not go for it."""
    monkeypatch.setattr(room, "MAX_PARTS", 4)
    begun(tmp_path, key("of-bob", "bob@example.org"), b"x").close()
    with closing(begun(tmp_path, key("in-use"), b"x")):
        for name in "abcde":
            begun(tmp_path, key(name), b"x").close()
        expected = {key(name) for name in ("in-use", "c", "d", "e")}
        assert parts(tmp_path) == expected | {key("of-bob", "bob@example.org")}


def test_what_is_in_use_is_not_deleted(tmp_path: Path) -> None:
    with closing(begun(tmp_path, key("in-use"))):
        begun(tmp_path, key("a")).close()
        with beneath.open_private(tmp_path) as private:
            assert not room.delete_unused(key("in-use"), private)
            assert room.delete_unused(key("a"), private)
            assert not room.delete_unused(key("a"), private)
        names = {path.name for path in (tmp_path / ".syncd").iterdir()}
        assert names == {key("in-use"), f"{key('in-use')}.blocks"}


# What a crash leaves


def test_what_a_crash_left_reserved_is_given_back_at_the_start(tmp_path: Path) -> None:
    killed(begun(tmp_path, key("a"), CONTENT, 64 * MIB))
    killed(PartialFile(tmp_path, key("empty"), 64 * MIB))
    assert taken(tmp_path, key("a")) >= 64 * MIB
    assert clean(tmp_path, time.time()) == []
    assert parts(tmp_path) == {key("a")}
    assert PART <= taken(tmp_path, key("a")) < MIB


def test_a_start_does_not_make_old_files_young(tmp_path: Path) -> None:
    begun(tmp_path, key("a")).close()
    before = (tmp_path / ".syncd" / key("a")).stat().st_ctime_ns
    assert clean(tmp_path, time.time()) == []
    assert (tmp_path / ".syncd" / key("a")).stat().st_ctime_ns == before


# While transfers run


def test_what_nobody_comes_back_to_goes_in_the_end(tmp_path: Path) -> None:
    begun(tmp_path, key("a")).close()
    with closing(begun(tmp_path, key("in-use"))), closing(begun(tmp_path, "0123.part")):
        expire(tmp_path, time.time() + room.MAX_AGE - DAY)
        assert parts(tmp_path) == {key("a"), key("in-use"), "0123.part"}
        expire(tmp_path, time.time() + room.MAX_AGE + DAY)
        assert parts(tmp_path) == {key("in-use"), "0123.part"}
        assert not (tmp_path / ".syncd" / f"{key('a')}.blocks").exists()


def test_what_is_on_its_way_to_its_name_is_left_alone(tmp_path: Path) -> None:
    """Unlike at the start, when nobody is there to bring it any further."""
    (tmp_path / ".syncd").mkdir(mode=0o700)
    for name in (f"{key('a')}.swap.1.2.3.4", f"{key('a')}.aside.4", f"{key('a')}.blocks"):
        (tmp_path / ".syncd" / name).touch()
    before = sorted((tmp_path / ".syncd").iterdir())
    expire(tmp_path, time.time() + 2 * room.MAX_AGE)
    assert sorted((tmp_path / ".syncd").iterdir()) == before


def test_where_nothing_ever_came_nothing_goes(tmp_path: Path) -> None:
    expire(tmp_path, time.time())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_locked_goes_by_its_age_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(room, "MAX_PARTS", 1)
    for name in "ab":
        begun(tmp_path, key(name)).close()
    assert parts(tmp_path) == {key("a"), key("b")}
    expire(tmp_path, time.time() + room.MAX_AGE + DAY)
    assert parts(tmp_path) == set()
