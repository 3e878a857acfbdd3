"""What happens to disks, files and processes in the middle of a transfer, and is no crash."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from syncd.transfer.pump import IDLE_TIMEOUT
from tests.chaos.world import open_world
from tests.support.daemons import DELIVERY_TIMEOUT, Daemons
from tests.support.disk import make_room, small_disk
from tests.support.pair import (
    ARRIVED,
    BIG,
    FIRST,
    MIB,
    Pair,
    assert_delivered,
    noise,
    offset,
    transfers,
    until_all_there,
    visible,
)
from tests.support.processes import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemons import Daemon

pytestmark = pytest.mark.prosody


@pytest.fixture
def pair(daemons: Daemons) -> Iterator[Pair]:
    """A pair whose gate is open; neither is started."""
    home = Path(tempfile.mkdtemp(prefix="sf"))
    try:
        with open_world("direct", home, daemons) as world:
            yield world.pair
    finally:
        shutil.rmtree(home)


@pytest.fixture
def held(pair: Pair) -> Pair:
    """A pair, started, in the middle of a big file that the gate holds."""
    pair.gate.hold_after(FIRST)
    pair.start()
    pair.alice.drop("big.bin", noise(BIG))
    until(lambda: offset(pair.bob) >= ARRIVED, "some of the file has arrived", DELIVERY_TIMEOUT)
    return pair


# --- Disks


def test_a_full_disk_is_said_and_what_waits_comes_when_there_is_room(pair: Pair) -> None:
    with small_disk(pair.bob.folder):
        pair.start()
        pair.alice.drop("big.bin", noise(3 * MIB))
        until(lambda: "too little room" in pair.alice.peer("bob").last_error, "alice hears why")
        assert visible(pair.bob) == set()
        assert pair.alice.peer("bob").pending == 1
        make_room(pair.bob.folder)
        until_all_there(pair)
        assert_delivered(pair)
        # Before its folder is unmounted.
        assert pair.bob.terminate() == 0


def test_a_folder_that_is_taken_away_gets_the_file_when_it_is_back(held: Pair) -> None:
    elsewhere = held.bob.folder.with_name("elsewhere")
    held.bob.folder.rename(elsewhere)
    held.gate.open()
    until(lambda: not transfers(held.bob), "the transfer has ended")
    assert not held.bob.folder.exists()
    assert {path.name for path in elsewhere.iterdir()} <= {".syncd", "big.bin"}
    elsewhere.rename(held.bob.folder)
    until_all_there(held)
    assert_delivered(held)


# --- The file that is sent


def _truncate(file: Path) -> None:
    os.truncate(file, 3 * MIB)


def _overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(noise(MIB, seed=5))


def _replace(file: Path) -> None:
    other = file.parent.parent / "other"
    other.write_bytes(noise(2 * MIB, seed=6))
    other.rename(file)


@pytest.mark.parametrize("change", [_truncate, _overwrite, _replace])
def test_a_file_that_changes_while_it_is_sent_arrives_as_it_is_in_the_end(
    held: Pair, change: object
) -> None:
    assert callable(change)
    change(held.alice.folder / "big.bin")
    held.gate.open()
    until_all_there(held)
    assert_delivered(held)


def test_a_file_that_is_deleted_while_it_is_sent_does_not_arrive(held: Pair) -> None:
    (held.alice.folder / "big.bin").unlink()
    held.gate.open()
    until(lambda: held.alice.peer("bob").pending == 0, "nothing is owed")
    held.alice.drop("next", b"arrives")
    held.alice.wait_delivered()
    assert visible(held.bob) == {"next"}


# --- Processes that stand still


def _frozen(daemon: Daemon, seconds: float) -> None:
    daemon.process.signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        daemon.process.signal(signal.SIGCONT)


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_an_end_that_stands_still_for_a_moment_costs_nothing(held: Pair, end: str) -> None:
    """As a laptop's lid does; the time itself is what is tested."""
    held.gate.open()
    _frozen(held.alice if end == "sender" else held.bob, 2.0)
    until_all_there(held)
    assert_delivered(held)
    assert len(held.gate.passed) == 1


@pytest.mark.skipif(
    not os.environ.get("SYNCD_CHAOS_SLOW"), reason="SYNCD_CHAOS_SLOW is not set: takes minutes"
)
@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_an_end_that_stands_still_for_long_goes_on_where_it_was(held: Pair, end: str) -> None:
    """Longer than anybody waits for a byte."""
    _frozen(held.alice if end == "sender" else held.bob, IDLE_TIMEOUT + 10.0)
    # A kernel resets what is closed with bytes unread; the gate only hangs up.
    held.gate.reset()
    held.gate.open()
    until_all_there(held)
    assert_delivered(held)
    assert sum(held.gate.passed) <= BIG + FIRST
