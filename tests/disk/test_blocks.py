from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from syncd.disk import blocks
from syncd.disk.blocks import (
    FIRST_BYTES,
    FIRST_MOMENT,
    MAX_BLOCK,
    MIN_BLOCK,
    PARTS,
    Blocks,
    block_size,
    open_notes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 5 * MIN_BLOCK + 17
CONTENT = blake3(b"content").digest(SIZE)
HEADER, NOTE = 28, 44  # bytes


@dataclass
class Disk:
    """A file and its notes."""

    path: Path
    fd: int
    notes: Path
    directory: int

    def blocks(self, size: int = SIZE) -> Blocks:
        # As if each look at the clock were in a later moment, for which notes are kept.
        return Blocks(self.fd, size, self.open, clock=partial(next, count(step=FIRST_MOMENT)))

    def open(self, create: bool) -> int:
        return open_notes(self.notes.name, self.directory, create=create)

    def content(self) -> bytes:
        return self.path.read_bytes()

    def reset(self) -> None:
        os.ftruncate(self.fd, 0)
        self.notes.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "f.part"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    directory = os.open(tmp_path, os.O_RDONLY)
    yield Disk(path, fd, tmp_path / "f.part.blocks", directory)
    os.close(fd)
    os.close(directory)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """One for all examples of a property, each of which begins by emptying it."""
    folder = tmp_path_factory.mktemp("shared")
    fd = os.open(folder / "f.part", os.O_RDWR | os.O_CREAT)
    directory = os.open(folder, os.O_RDONLY)
    yield Disk(folder / "f.part", fd, folder / "f.part.blocks", directory)
    os.close(fd)
    os.close(directory)


def arrive(disk: Disk, arriving: Blocks, content: bytes, *, step: int = MIN_BLOCK) -> None:
    """Write what comes next, as the pump does: first to the disk, then to the hasher."""
    while arriving.offset < len(content):
        data = content[arriving.offset : arriving.offset + step]
        os.pwrite(disk.fd, data, arriving.offset)
        arriving.update(memoryview(data))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def prove(disk: Disk, size: int = SIZE) -> int:
    """What another process finds."""
    found = disk.blocks(size)
    claimed = found.claim(os.fstat(disk.fd).st_size)
    offset = found.prove(os.fstat(disk.fd).st_size)
    assert offset <= claimed <= size
    assert found.offset == offset
    assert found.digest() == blake3(disk.content()[:offset]).digest()
    found.forget()
    return offset


# Blocks


@settings(deadline=None)
@given(st.integers(0, 1 << 50))
@example(0)
@example(MIN_BLOCK * 100 - 1)
@example(MAX_BLOCK * 100)
def test_block_is_a_hundredth_of_the_file_at_most(size: int) -> None:
    block = block_size(size)
    assert MIN_BLOCK <= block <= MAX_BLOCK
    assert block & (block - 1) == 0
    assert block <= max(size / 100, MIN_BLOCK)
    assert block == MAX_BLOCK or block > size / 200


@settings(deadline=None)
@given(st.lists(st.integers(1, 3 * MIN_BLOCK), max_size=9))
def test_digest_is_that_of_the_file_however_it_comes(shared: Disk, steps: list[int]) -> None:
    shared.reset()
    arriving = shared.blocks()
    for step in steps:
        end = min(arriving.offset + step, SIZE)
        arrive(shared, arriving, CONTENT[:end], step=max(step, 99))
        assert arriving.offset == end
        assert arriving.digest() == blake3(CONTENT[:end]).digest()
    arriving.close()


# What is proved


@settings(deadline=None)
@given(
    st.integers(0, SIZE), st.integers(999, 2 * MIN_BLOCK), st.booleans(), st.integers(0, SIZE)
)
def test_what_has_arrived_is_proved(
    shared: Disk, cut: int, step: int, orderly: bool, second: int
) -> None:
    """Nothing is lost by an orderly end, and less than a block by any other; also twice."""
    shared.reset()
    for end in sorted((cut, second)):
        arriving = shared.blocks()
        begin = arriving.prove(os.fstat(shared.fd).st_size)
        os.ftruncate(shared.fd, begin)
        arrive(shared, arriving, CONTENT[:end], step=step)
        if orderly:
            arriving.close()
        proved = prove(shared)
        # It is told to the sender before it is proved, so it had better be right.
        assert shared.blocks().claim(end) == proved
        if orderly:
            assert proved == end
        else:
            assert end - MIN_BLOCK < proved or (proved, end) == (0, MIN_BLOCK)
            assert proved <= end
    assert shared.content()[:proved] == CONTENT[:proved]


@settings(deadline=None)
@given(st.integers(0, SIZE - 1), st.integers(1, 255), st.booleans())
def test_what_changed_meanwhile_is_not_proved(
    shared: Disk, place: int, flip: int, orderly: bool
) -> None:
    """All before the block with the bit that turned, and nothing from there on."""
    shared.reset()
    arriving = shared.blocks()
    arrive(shared, arriving, CONTENT)
    if orderly:
        arriving.close()
    os.pwrite(shared.fd, bytes([CONTENT[place] ^ flip]), place)
    proved = prove(shared)
    assert proved == place // MIN_BLOCK * MIN_BLOCK
    assert shared.content()[:proved] == CONTENT[:proved]


@settings(deadline=None)
@given(st.integers(0, SIZE), st.booleans())
def test_file_that_became_shorter_is_proved_as_far_as_it_goes(
    shared: Disk, length: int, zeros: bool
) -> None:
    """As after a power cut: the end is gone, or there are zeros where it was."""
    shared.reset()
    arriving = shared.blocks()
    arrive(shared, arriving, CONTENT)
    arriving.close()
    os.ftruncate(shared.fd, length)
    if zeros:
        os.ftruncate(shared.fd, SIZE)
    assert prove(shared) == (SIZE if length == SIZE else length // MIN_BLOCK * MIN_BLOCK)


@settings(deadline=None)
@given(st.integers(0, HEADER + 6 * NOTE - 1), st.integers(1, 255))
def test_damaged_notes_prove_less_and_never_what_is_wrong(
    shared: Disk, place: int, flip: int
) -> None:
    """One that is torn is passed over: those behind it speak for the same bytes."""
    shared.reset()
    arriving = shared.blocks()
    arrive(shared, arriving, CONTENT)
    arriving.close()
    notes = bytearray(shared.notes.read_bytes())
    assert len(notes) == HEADER + 6 * NOTE
    notes[place] ^= flip
    shared.notes.write_bytes(notes)
    if place < HEADER:
        assert prove(shared) == 0
    elif place < HEADER + 5 * NOTE:
        assert prove(shared) == SIZE
    else:
        assert prove(shared) == 5 * MIN_BLOCK


@settings(deadline=None)
@given(st.integers(0, HEADER + 6 * NOTE))
def test_notes_that_end_in_the_middle_prove_up_to_there(shared: Disk, length: int) -> None:
    shared.reset()
    arriving = shared.blocks()
    arrive(shared, arriving, CONTENT)
    arriving.close()
    os.truncate(shared.notes, length)
    whole = max(0, length - HEADER) // NOTE
    assert prove(shared) == min(whole * MIN_BLOCK, SIZE)


@settings(deadline=None)
@given(st.binary(max_size=HEADER + 10 * NOTE))
@example(b"")
@example(bytes(HEADER + 10 * NOTE))
def test_any_bytes_are_no_proof(shared: Disk, notes: bytes) -> None:
    shared.reset()
    os.pwrite(shared.fd, CONTENT, 0)
    shared.notes.write_bytes(notes)
    assert prove(shared) == 0


def test_notes_behind_a_right_header_must_be_right_too(disk: Disk) -> None:
    """Each note in its own place only, so that they cannot be moved or lead beyond the end."""
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()
    notes = disk.notes.read_bytes()
    header, each = notes[:HEADER], [notes[HEADER + i * NOTE :][:NOTE] for i in range(6)]
    disk.notes.write_bytes(header + each[1] + each[0] + each[2])
    assert prove(disk) == 3 * MIN_BLOCK
    disk.notes.write_bytes(header + each[5] * 6)
    assert prove(disk) == SIZE
    disk.notes.write_bytes(header + each[5] * 5)
    assert prove(disk) == 0


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 1000 * SIZE])
def test_notes_of_a_file_of_another_size_prove_nothing(disk: Disk, size: int) -> None:
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()
    assert prove(disk, size) == 0


def test_file_without_notes_is_not_trusted_for_its_length(disk: Disk) -> None:
    os.pwrite(disk.fd, CONTENT, 0)
    assert prove(disk) == 0


def test_what_is_going_on_after_a_proof_is_noted_again(disk: Disk) -> None:
    first = disk.blocks()
    arrive(disk, first, CONTENT[: MIN_BLOCK + 5])
    first.close()
    second = disk.blocks()
    assert second.prove(MIN_BLOCK + 5) == MIN_BLOCK + 5
    arrive(disk, second, CONTENT[: 2 * MIN_BLOCK + 7], step=1000)
    # Killed here: the tail's note gave way to that of its block.
    assert prove(disk) == 2 * MIN_BLOCK
    second.close()
    assert prove(disk) == 2 * MIN_BLOCK + 7


def test_notes_that_proved_nothing_are_begun_anew(disk: Disk) -> None:
    first = disk.blocks()
    arrive(disk, first, bytes(SIZE))
    first.close()
    os.pwrite(disk.fd, b"!", 0)
    second = disk.blocks()
    assert second.prove(SIZE) == 0
    os.ftruncate(disk.fd, 0)
    arrive(disk, second, CONTENT[: 2 * MIN_BLOCK])
    assert disk.notes.stat().st_size == HEADER + 2 * NOTE
    assert prove(disk) == 2 * MIN_BLOCK
    second.forget()


def test_proving_can_be_stopped(disk: Disk) -> None:
    """And what was found until then is right all the same."""
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()
    asked = iter([False, False, True])
    found = disk.blocks()
    assert found.prove(SIZE, partial(next, asked)) == 2 * MIN_BLOCK
    assert found.digest() == blake3(CONTENT[: 2 * MIN_BLOCK]).digest()
    found.close()
    assert prove(disk) == SIZE


def test_file_that_cannot_be_read_is_not_proved(disk: Disk) -> None:
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()
    unreadable = os.open(disk.path, os.O_WRONLY)
    found = Blocks(unreadable, SIZE, disk.open)
    assert found.prove(SIZE) == 0
    os.close(unreadable)


def test_file_that_is_shorter_than_told_is_not_proved_beyond_its_end(disk: Disk) -> None:
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()
    os.ftruncate(disk.fd, 3 * MIN_BLOCK + 1)
    found = disk.blocks()
    assert found.prove(SIZE) == 3 * MIN_BLOCK
    found.forget()


# What is written


def test_small_file_that_arrives_at_once_costs_no_notes(disk: Disk) -> None:
    arriving = disk.blocks(MIN_BLOCK)
    arrive(disk, arriving, CONTENT[:MIN_BLOCK])
    arriving.forget()
    assert not disk.notes.exists()


def test_file_that_nobody_resumes_has_no_notes(disk: Disk) -> None:
    arriving = Blocks(disk.fd, SIZE)
    arrive(disk, arriving, CONTENT)
    arriving.close()
    assert not disk.notes.exists()
    assert arriving.digest() == blake3(CONTENT).digest()
    assert Blocks(disk.fd, SIZE).prove(SIZE) == 0


def test_nothing_that_arrived_is_no_note(disk: Disk) -> None:
    disk.blocks().close()
    assert not disk.notes.exists()


def test_many_cuts_do_not_make_the_notes_grow(disk: Disk) -> None:
    for end in range(1, SIZE, 2_500):
        arriving = disk.blocks()
        assert arriving.prove(os.fstat(disk.fd).st_size) == max(0, end - 2_500)
        arrive(disk, arriving, CONTENT[:end])
        arriving.close()
        assert disk.notes.stat().st_size == HEADER + -(-end // MIN_BLOCK) * NOTE


def test_closing_twice_notes_once(disk: Disk) -> None:
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT[:5])
    arriving.close()
    disk.notes.unlink()
    arriving.close()
    assert not disk.notes.exists()


def test_notes_are_nobody_elses_to_read(disk: Disk) -> None:
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT[:5])
    arriving.close()
    assert disk.notes.stat().st_mode & 0o777 == 0o600


def test_disk_that_takes_no_notes_takes_the_file(disk: Disk) -> None:
    """A block that is not noted is passed over when the next one is."""
    refuse = True

    def sometimes(create: bool) -> int:
        if refuse:
            raise OSError
        return disk.open(create)

    clock = partial(next, count(step=FIRST_MOMENT))
    arriving = Blocks(disk.fd, SIZE, sometimes, clock=clock)
    arrive(disk, arriving, CONTENT[: 2 * MIN_BLOCK])
    refuse = False
    arrive(disk, arriving, CONTENT[: 3 * MIN_BLOCK + 1])
    assert arriving.digest() == blake3(CONTENT[: 3 * MIN_BLOCK + 1]).digest()
    assert prove(disk) == 3 * MIN_BLOCK
    arriving.close()
    assert prove(disk) == 3 * MIN_BLOCK + 1


def test_full_disk_takes_the_notes_in_the_place_of_the_end(disk: Disk) -> None:
    def sometimes(create: bool) -> int:
        if disk.path.stat().st_size == 3 * MIN_BLOCK + 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return disk.open(create)

    arriving = Blocks(disk.fd, SIZE, sometimes, clock=lambda: 5.0)
    arrive(disk, arriving, CONTENT[: 3 * MIN_BLOCK + 5])
    arriving.close()
    # The third block's end is too near: not enough would become free.
    assert os.fstat(disk.fd).st_size == prove(disk) == 2 * MIN_BLOCK


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_that_takes_nothing_any_more_is_left_alone(disk: Disk, code: int) -> None:
    def never(create: bool) -> int:
        raise OSError(code, os.strerror(code))

    arriving = Blocks(disk.fd, SIZE, never, clock=lambda: 5.0)
    arrive(disk, arriving, CONTENT[: MIN_BLOCK + 5])
    arriving.close()
    assert disk.content() == CONTENT[: MIN_BLOCK + 5]


def test_notes_that_cannot_be_read_are_none(disk: Disk) -> None:
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()
    unreadable = Blocks(disk.fd, SIZE, lambda _: os.open(disk.notes, os.O_WRONLY))
    assert (unreadable.claim(SIZE), unreadable.prove(SIZE)) == (0, 0)
    arriving._notes = os.open(disk.notes, os.O_WRONLY)
    assert arriving._read_note(0) is None
    arriving.forget()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO])
def test_notes_that_cannot_be_read_now_are_not_taken_for_none(disk: Disk, code: int) -> None:
    """Else the caller would cut off what they prove."""
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()

    def refuse(_: bool) -> int:
        raise OSError(code, os.strerror(code))

    found = Blocks(disk.fd, SIZE, refuse)
    for look in (found.claim, found.prove):
        with pytest.raises(OSError, match=os.strerror(code)):
            look(SIZE)
    found.close()
    assert prove(disk) == SIZE


def test_notes_whose_header_cannot_be_read_now_are_let_go(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            disk.blocks().claim(SIZE)
    assert descriptors() == before
    assert prove(disk) == SIZE


def test_notes_that_cannot_be_closed_are_closed_once(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS tells then that the disk is full; the number is free all the same."""
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    real, closed = os.close, list[int]()

    def close(fd: int) -> None:
        closed.append(fd)
        real(fd)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        arriving.close()
        arriving.close()
    assert len(closed) == 1
    assert prove(disk) == SIZE


def test_notes_that_cannot_be_begun_are_let_go(disk: Disk) -> None:
    """Opened, but not for writing: the descriptor is not kept."""
    disk.notes.touch()
    before = descriptors()
    clock = partial(next, count(step=FIRST_MOMENT))
    arriving = Blocks(disk.fd, SIZE, lambda _: os.open(disk.notes, os.O_RDONLY), clock=clock)
    arrive(disk, arriving, CONTENT)
    assert descriptors() == before
    arriving.close()
    assert disk.notes.read_bytes() == b""


def test_kernel_is_told_to_write_from_time_to_time(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []

    def record(fd: int, offset: int, count: int) -> None:
        if fd == disk.fd:
            told.append((offset, count))

    monkeypatch.setattr(blocks, "start_writing", record)
    now = 0.0
    size = 20 * MAX_BLOCK * PARTS
    block = memoryview(bytes(MAX_BLOCK))
    arriving = Blocks(disk.fd, size, disk.open, clock=lambda: now)
    for _ in range(25):
        now += 0.125
        arriving.update(block)
    arriving.forget()
    # The disk has its own second since the last time, whatever came in it.
    assert told == [(number * 8 * MAX_BLOCK, 8 * MAX_BLOCK) for number in range(3)]


def test_notes_begin_after_the_first_megabyte(disk: Disk) -> None:
    content = bytes(3 * FIRST_BYTES)
    arriving = Blocks(disk.fd, len(content), disk.open, clock=lambda: 5.0)
    arrive(disk, arriving, content[: FIRST_BYTES + MIN_BLOCK - 1])
    assert not disk.notes.exists()
    arrive(disk, arriving, content[: FIRST_BYTES + MIN_BLOCK])
    arriving.forget()
    assert prove(disk, len(content)) == FIRST_BYTES + MIN_BLOCK


def test_notes_begin_after_the_first_moment(disk: Disk) -> None:
    """Which begins with the first byte: the peer may take its time before."""
    now = 5.0
    arriving = Blocks(disk.fd, SIZE, disk.open, clock=lambda: now)
    now += 1000
    arrive(disk, arriving, CONTENT[:MIN_BLOCK])
    now += FIRST_MOMENT
    arrive(disk, arriving, CONTENT[: 2 * MIN_BLOCK - 1])
    assert not disk.notes.exists()
    arrive(disk, arriving, CONTENT[: 2 * MIN_BLOCK])
    arriving.forget()
    assert prove(disk) == 2 * MIN_BLOCK


def test_orderly_end_is_noted_even_in_the_first_moment(disk: Disk) -> None:
    arriving = Blocks(disk.fd, SIZE, disk.open, clock=lambda: 5.0)
    arrive(disk, arriving, CONTENT[: MIN_BLOCK + 5])
    arriving.close()
    assert prove(disk) == MIN_BLOCK + 5


# Links


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "directory"])
@pytest.mark.parametrize("create", [False, True])
def test_only_a_plain_file_holds_notes(disk: Disk, kind: str, create: bool) -> None:
    canary = disk.path.with_name("canary")
    canary.write_bytes(b"alive")
    make: dict[str, Callable[[], None]] = {
        "link": lambda: disk.notes.symlink_to(canary),
        "hard link": lambda: disk.notes.hardlink_to(canary),
        "fifo": lambda: os.mkfifo(disk.notes),
        "directory": disk.notes.mkdir,
    }
    make[kind]()
    before = descriptors()
    with pytest.raises(OSError, match=r"f\.part\.blocks"):
        disk.open(create)
    assert descriptors() == before
    arriving = disk.blocks()
    arrive(disk, arriving, CONTENT)
    arriving.close()
    assert prove(disk) == 0
    assert canary.read_bytes() == b"alive"
