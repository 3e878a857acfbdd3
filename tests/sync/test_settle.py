from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.sync.settle import Look, Settling

if TYPE_CHECKING:
    from pathlib import Path

QUIET = 1.0  # seconds

LOOK = Look(size=5, mtime_ns=1_000, ctime_ns=1_000, inode=7)

# The tests' time moves in eighths of a second, which floats hold exactly.
steps = st.integers(1, 40).map(lambda eighths: eighths / 8)
short_steps = st.integers(0, 7).map(lambda eighths: eighths / 8)


def other(field: str) -> Look:
    """What the file looks like after one of its four numbers has changed."""
    values = {name: getattr(LOOK, name) for name in ("size", "mtime_ns", "ctime_ns", "inode")}
    values[field] += 1
    return Look(**values)


@given(st.lists(short_steps, min_size=1))
def test_a_file_that_changes_within_the_quiet_is_never_due(waits: list[float]) -> None:
    settling, now = Settling(QUIET), 0.0
    for size, wait in enumerate(waits):
        now += wait
        assert settling.due(now) == []
        look = Look(size, LOOK.mtime_ns, LOOK.ctime_ns, LOOK.inode)
        assert settling.looked("a", look, now) is False
        assert settling.next_look() == now + QUIET


@given(st.lists(steps, min_size=1))
def test_a_file_that_rests_may_be_sent_exactly_once(waits: list[float]) -> None:
    """However often it is looked at: as soon as it has rested, and then it is forgotten."""
    settling, now, sent = Settling(QUIET), 0.0, 0
    settling.looked("a", LOOK, now)
    for wait in waits:
        now += wait
        for path in settling.due(now):
            assert settling.looked(path, LOOK, now) is True
            sent += 1
    assert sent == (1 if now >= QUIET else 0)
    assert len(settling) == 1 - sent


def test_a_look_before_the_quiet_is_over_does_not_begin_it_anew() -> None:
    settling = Settling(QUIET)
    settling.looked("a", LOOK, 0.0)
    assert settling.looked("a", LOOK, 0.875) is False
    assert settling.looked("a", LOOK, 1.0) is True


@pytest.mark.parametrize("field", ["size", "mtime_ns", "ctime_ns", "inode"])
def test_any_difference_begins_the_quiet_anew(field: str) -> None:
    settling = Settling(QUIET)
    settling.looked("a", LOOK, 0.0)
    assert settling.looked("a", other(field), 1.0) is False
    assert settling.looked("a", other(field), 1.875) is False
    assert settling.looked("a", other(field), 2.0) is True


def test_a_complete_file_need_not_rest() -> None:
    settling = Settling(QUIET)
    assert settling.looked("new", LOOK, 0.0, complete=True) is True
    settling.looked("known", LOOK, 0.0)
    assert settling.looked("known", other("size"), 0.5, complete=True) is True
    assert len(settling) == 0


def test_a_file_that_is_gone_is_forgotten() -> None:
    settling = Settling(QUIET)
    settling.looked("a", LOOK, 0.0)
    assert settling.looked("a", None, 5.0) is False
    assert settling.due(math.inf) == []
    assert settling.looked("a", LOOK, 6.0) is False


def test_without_a_quiet_the_second_look_suffices() -> None:
    settling = Settling(0.0)
    assert settling.looked("a", LOOK, 3.0) is False
    assert settling.due(3.0) == ["a"]
    assert settling.looked("a", LOOK, 3.0) is True


def test_each_file_has_its_own_time() -> None:
    settling = Settling(QUIET)
    assert settling.next_look() == math.inf
    settling.looked("a", LOOK, 1.0)
    settling.looked("b", LOOK, 1.5)
    assert (settling.next_look(), settling.due(1.75)) == (2.0, [])
    assert settling.due(2.0) == ["a"]
    assert settling.due(2.5) == ["a", "b"]
    assert settling.looked("a", LOOK, 2.0) is True
    assert settling.next_look() == 2.5


def test_a_file_that_changed_again_comes_after_those_that_did_not() -> None:
    settling = Settling(QUIET)
    settling.looked("a", LOOK, 1.0)
    settling.looked("b", LOOK, 1.25)
    settling.looked("a", other("size"), 1.5)
    assert (settling.next_look(), settling.due(2.25)) == (2.25, ["b"])
    assert settling.due(2.5) == ["b", "a"]
    assert ("a" in settling, "c" in settling) == (True, False)


def test_a_file_is_due_at_the_very_time_that_was_told() -> None:
    """Or somebody who waits until then would look, and wait again for no time at all."""
    settling = Settling(0.1)
    for number in range(1000):
        settling.looked("a", LOOK, number / 7)
        assert settling.looked("a", LOOK, settling.next_look()) is True


def test_a_look_is_taken_from_a_stat(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    os.utime(file, ns=(0, 5_000_000_000))
    status = file.stat()
    look = Look.of(status)
    assert look == Look(5, 5_000_000_000, status.st_ctime_ns, status.st_ino)
    # It was written long ago, by its own account, but something was done to it just now.
    assert look.changed == status.st_ctime_ns / 1e9
    assert Look(5, 7_000_000_000, 5_000_000_000, 1).changed == 7.0
