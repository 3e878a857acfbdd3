"""A real journal, real folders; only what sends is ours."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio
import trio.testing

from syncd.errors import (
    ChangedError,
    DeclinedError,
    JournalError,
    NotFoundError,
    OfflineError,
    StalledError,
    TruncatedError,
)
from syncd.sync import engine as engine_module
from syncd.sync.engine import (
    AFTER_CHANGE,
    CANDIDATES,
    MAX_ERRORS,
    MAX_REACHED,
    PROGRESS,
    Engine,
    Failure,
    FolderRule,
    FolderState,
    Sent,
)
from syncd.sync.journal import OUTSIDE, Arrival, PeerCount, Standing, open_journal
from syncd.sync.plan import (
    ANSWER_GRACE,
    MAX_RUNNING,
    RETRY_FIRST,
    RETRY_LAST,
    Delivery,
    FileVersion,
)
from syncd.sync.settle import Settling

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from syncd.sync.engine import Statistics

NOW = 1_000_000.0  # seconds since 1970; the engine's wall clock stands still
BOB, CAROL = "bob@example.org", "carol@example.org"
DELIVERED = Sent("delivered", "d1" * 32)

# How long anything here may take on a busy machine; only reached when a test fails.
PATIENCE = 60.0  # seconds

# More than anything here waits by itself: so only an event can explain what happens.
NEVER = 3600.0  # seconds


Outcome: TypeAlias = "Exception | trio.Event | Callable[[], Exception]"


@dataclass
class World:
    """An engine at work on one folder, and who sends for it.

    Attributes:
      root: The folder.
      outcomes: What the next deliveries come to: an error, something that makes one, success
        after an event, or, when there are no more, success.
      begun: What was to be sent: peer and path, in order.
      deliveries: The same, as the engine gave them.
      seen: How often each was on disk as owed when it was to be sent.
    """

    root: Path
    state: Path
    outcomes: deque[Outcome] = field(default_factory=deque)
    begun: list[tuple[str, str]] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self._news = trio.Event()

    async def send(self, delivery: Delivery) -> Sent:
        self.begun.append((delivery.peer, delivery.version.path))
        self.deliveries.append(delivery)
        self.seen.append(self.owed_on_disk(delivery))
        outcome = self.outcomes.popleft() if self.outcomes else None
        self._news.set()
        self._news = trio.Event()
        if isinstance(outcome, trio.Event):
            await outcome.wait()
        elif isinstance(outcome, Exception):
            raise outcome
        elif outcome is not None:
            raise outcome()
        return DELIVERED

    def owed_on_disk(self, delivery: Delivery) -> int:
        """How many rows somebody else who opens the journal sees for a delivery."""
        with contextlib.closing(sqlite3.connect(self.state / "journal.db")) as database:
            [(count,)] = database.execute(
                "SELECT count(*) FROM owed WHERE peer = ? AND path = ? AND size = ?",
                (delivery.peer, delivery.version.path, delivery.version.size),
            )
        return int(count)

    def owed_paths(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.state / "journal.db")) as database:
            return [path for (path,) in database.execute("SELECT path FROM owed ORDER BY path")]

    async def until_begun(self, count: int) -> None:
        """Wait until so many deliveries were begun."""
        with trio.fail_after(PATIENCE):
            while len(self.begun) < count:
                await self._news.wait()

    async def until(self, true: Callable[[Statistics], object]) -> Statistics:
        """Wait until the statistics say so, and nothing else runs."""
        with trio.fail_after(PATIENCE):
            while not true(statistics := await self.engine.statistics()):  # noqa: ASYNC110 - a database tells nobody of a change
                await trio.sleep(0.005)
        return statistics

    async def until_at_work(self, path: str) -> None:
        """Wait until it is known that somebody is at work on a file."""
        await self.until(lambda _: not self.engine._folders["photos"].rests(path))

    async def until_idle(self) -> Statistics:
        """Wait until nothing is owed that could be sent now."""
        return await self.until(
            lambda now: (
                not self.engine._running
                and all(peer.pending == 0 for peer in now.counts.peers.values())
            )
        )

    async def until_put_off(self, again: float) -> None:
        """Wait until the only delivery is due at this time, seconds since 1970."""
        await self.until(lambda now: peer(now).next_try == again)

    def tick(self, seconds: float) -> None:
        """Set the engine's wall clock to so long after its start, and let it look at it."""
        self.engine._clock = lambda: NOW + seconds
        self.engine._wake.set()

    def drop(self, path: str, content: bytes = b"x") -> Path:
        """Rename a file into the folder; it was written a while ago."""
        made = self.root.parent / "being-made"
        made.write_bytes(content)
        os.utime(made, (time.time() - 60, time.time() - 60))
        (self.root / path).parent.mkdir(exist_ok=True)
        return made.rename(self.root / path)


@contextlib.asynccontextmanager
async def working(
    tmp_path: Path,
    *outcomes: Outcome,
    send_to: tuple[str, ...] = (BOB,),
    online: tuple[str, ...] = (BOB,),
    parallel: int = 4,
    settle: float = 0.0,
) -> AsyncIterator[World]:
    """Run an engine on ``tmp_path/root`` for as long as the block lasts."""
    world = World(tmp_path / "root", tmp_path / "state", deque(outcomes))
    world.root.mkdir(exist_ok=True)
    async with open_journal(world.state) as journal, trio.open_nursery() as nursery:
        rule = FolderRule(id="photos", path=world.root, send_to=send_to, settle=settle)
        world.engine = Engine(
            journal,
            [rule],
            world.send,
            limit_of=lambda _: parallel,
            places=MAX_RUNNING,
            clock=lambda: NOW,
        )
        world.engine.set_online(frozenset(online))
        await nursery.start(world.engine.run)
        await world.engine.rescan()  # so that it watches
        yield world
        nursery.cancel_scope.cancel()


def peer(statistics: Statistics, name: str = BOB) -> PeerCount:
    return statistics.counts.peers.get(name, PeerCount())


# --- Delivering


async def test_what_changes_is_on_disk_as_owed_before_it_is_sent(tmp_path: Path) -> None:
    async with working(tmp_path) as world:
        for number in range(5):
            world.drop(f"{number}")
        await world.until_begun(5)
        statistics = await world.until_idle()
        assert sorted(world.begun) == [(BOB, f"{number}") for number in range(5)]
        assert world.seen == [1] * 5
        assert peer(statistics) == PeerCount(delivered=5)
        assert statistics.counts.pending == {}


async def test_every_peer_gets_every_file_and_a_client_without_receipts_counts_apart(
    tmp_path: Path,
) -> None:
    async with working(tmp_path, send_to=(BOB, CAROL), online=(BOB, CAROL)) as world:

        async def send(delivery: Delivery) -> Sent:
            await World.send(world, delivery)
            return Sent("sent", "d2") if delivery.peer == CAROL else DELIVERED

        world.engine._send = send
        world.drop("a")
        await world.until_begun(2)
        statistics = await world.until_idle()
        assert sorted(world.begun) == [(BOB, "a"), (CAROL, "a")]
        assert (peer(statistics, CAROL), peer(statistics)) == (
            PeerCount(sent=1), PeerCount(delivered=1),
        )  # fmt: skip


async def test_what_is_owed_to_who_is_offline_waits_until_it_comes(tmp_path: Path) -> None:
    async with working(tmp_path, send_to=(BOB, CAROL), online=()) as world:
        world.drop("a")
        await world.until(lambda now: now.counts.pending == {"photos": 1})
        assert world.begun == []
        world.engine.set_online(frozenset({CAROL}))
        await world.until_begun(1)
        world.engine.set_online(frozenset({BOB, CAROL}))
        await world.until_begun(2)
        await world.until_idle()
        assert world.begun == [(CAROL, "a"), (BOB, "a")]


async def test_no_more_run_than_allowed_and_the_next_starts_when_one_ends(
    tmp_path: Path,
) -> None:
    gates = [trio.Event() for _ in range(6)]
    async with working(tmp_path, *gates, parallel=2) as world:
        for number in range(6):
            world.drop(f"{number}")
        await world.until(lambda now: peer(now).pending == 6)
        for ended, gate in enumerate(gates):
            await world.until_begun(min(6, ended + 2))
            assert len(world.begun) == min(6, ended + 2)
            gate.set()
        await world.until_idle()
        assert len(world.begun) == 6


async def test_of_many_files_all_are_sent_and_only_so_many_at_a_time(tmp_path: Path) -> None:
    """More than are candidates at a time."""
    count = 3 * CANDIDATES
    async with working(tmp_path, online=(), parallel=64) as world:
        for number in range(count):
            (world.root / f"{number}").touch()
        await world.engine.rescan()
        most = 0
        original = World.send

        async def send(delivery: Delivery) -> Sent:
            nonlocal most
            most = max(most, len(world.engine._running))
            return await original(world, delivery)

        world.engine._send = send
        world.engine.set_online(frozenset({BOB}))
        await world.until_begun(count)
        assert peer(await world.until_idle()).delivered == count
        assert most <= MAX_RUNNING
        assert len(set(world.begun)) == count


# --- Failing


async def test_what_may_be_tried_again_is_when_the_peer_comes_back(tmp_path: Path) -> None:
    async with working(tmp_path, OfflineError("bob went offline")) as world:
        world.drop("a")
        statistics = await world.until(lambda now: peer(now).error)
        count = peer(statistics)
        assert (count.pending, count.parked, count.error) == (1, 0, "bob went offline")
        assert count.next_try is not None
        assert NOW + RETRY_FIRST / 2 <= count.next_try <= NOW + RETRY_FIRST
        # The clock stands still, so it is not due; but bob is a new bob.
        world.engine.set_online(frozenset())
        world.engine.set_online(frozenset({BOB}))
        await world.until_begun(2)
        assert peer(await world.until_idle()) == PeerCount(delivered=1)
        assert [delivery.attempts for delivery in world.deliveries] == [0, 1]


async def test_a_peer_that_was_there_all_the_time_is_not_tried_for_another(
    tmp_path: Path,
) -> None:
    error = OfflineError("bob does not answer")
    async with working(tmp_path, error, send_to=(BOB, CAROL)) as world:
        world.drop("a")
        await world.until(lambda now: peer(now).error)
        world.engine.set_online(frozenset({BOB, CAROL}))
        await world.until(lambda now: peer(now, CAROL).delivered)
        assert world.begun == [(BOB, "a"), (CAROL, "a")]


async def test_what_may_be_tried_again_is_when_it_is_due(tmp_path: Path) -> None:
    now = NOW
    async with working(tmp_path, StalledError("no byte moved"), online=()) as world:
        world.engine._clock = lambda: now
        world.drop("a")
        world.engine.set_online(frozenset({BOB}))
        await world.until(lambda told: peer(told).error)
        now += RETRY_FIRST
        world.engine._wake.set()
        await world.until_begun(2)
        assert peer(await world.until_idle()).delivered == 1


def cut(began: int, moved: int = 1) -> TruncatedError:
    """What ends a transfer of which something has gone out."""
    error = TruncatedError("the peer hung up")
    error.began, error.moved = began, moved
    return error


async def test_a_transfer_that_was_cut_goes_on_at_once(tmp_path: Path) -> None:
    """As often as each has left more at the peer, or sent more; and nobody hears of it."""
    kept, out = cut(PROGRESS), cut(PROGRESS, 2 * PROGRESS)
    async with working(tmp_path, cut(0), kept, out) as world:
        world.drop("a")
        await world.until_begun(4)
        statistics = await world.until_idle()
        assert peer(statistics) == PeerCount(delivered=1)
        assert statistics.failures == ()
        assert [delivery.attempts for delivery in world.deliveries] == [0, 0, 0, 0]


async def test_a_transfer_that_gets_no_further_waits(tmp_path: Path) -> None:
    """Else a peer whose disk is full would be sent the same for ever."""
    async with working(tmp_path, cut(0), cut(PROGRESS - 1)) as world:
        world.drop("a")
        statistics = await world.until(lambda now: peer(now).error)
        assert len(world.begun) == 2
        # The clock stands still, so it is not due.
        assert peer(statistics).next_try is not None


async def test_a_transfer_that_never_began_to_move_waits(tmp_path: Path) -> None:
    async with working(tmp_path, cut(0, moved=0)) as world:
        world.drop("a")
        await world.until(lambda now: peer(now).error)
        assert len(world.begun) == 1


async def test_only_failures_without_progress_make_it_wait_longer(tmp_path: Path) -> None:
    """One that gets on in spite of many breaks is as fresh as one that has just begun."""
    now = NOW
    offline = [OfflineError("bob does not answer") for _ in range(9)]
    async with working(tmp_path, *offline, cut(0), cut(0), online=()) as world:
        world.engine._clock = lambda: now
        world.drop("a")
        world.engine.set_online(frozenset({BOB}))
        for count in range(1, 10):
            await world.until_begun(count)
            await world.until(lambda _: not world.engine._running)
            now += RETRY_LAST
            world.engine._wake.set()
        await world.until_begun(11)
        statistics = await world.until(lambda _: not world.engine._running)
        next_try = peer(statistics).next_try
        assert next_try is not None
        assert next_try <= now + RETRY_FIRST


async def test_of_transfers_that_were_cut_not_all_are_remembered(tmp_path: Path) -> None:
    cuts = [cut(0) for _ in range(MAX_REACHED + 1)]
    async with working(tmp_path, parallel=MAX_RUNNING) as world:
        for number, error in enumerate(cuts):
            version = FileVersion(folder="photos", path="a", size=1, mtime_ns=1, inode=1)
            assert world.engine._got_further(
                Delivery(id=number, version=version, peer=BOB), error
            )
        assert len(world.engine._reached) == MAX_REACHED
        assert min(world.engine._reached) == 1


async def test_a_refusal_waits_for_a_person_or_a_change(tmp_path: Path) -> None:
    refusal = DeclinedError("bob does not want it", hint="ask bob")
    async with working(tmp_path, refusal) as world:
        world.drop("a")
        statistics = await world.until(lambda now: peer(now).parked)
        assert peer(statistics) == PeerCount(
            pending=1, pending_bytes=1, parked=1, error="bob does not want it", hint="ask bob"
        )
        assert statistics.failures == (
            Failure(
                at=NOW, peer=BOB, folder="photos", path="a", text="bob does not want it",
                hint="ask bob",
            ),
        )  # fmt: skip
        # That bob comes back changes nothing; others are not held up; a new version is new.
        world.engine.set_online(frozenset())
        world.engine.set_online(frozenset({BOB}))
        world.drop("b")
        await world.until_begun(2)
        world.drop("a", b"better")
        await world.until_begun(3)
        assert peer(await world.until_idle()) == PeerCount(delivered=2)
        assert world.begun == [(BOB, "a"), (BOB, "b"), (BOB, "a")]
        assert world.deliveries[-1].version.size == 6


async def test_a_refusal_is_asked_about_again_when_the_peers_syncd_has_started_anew(
    tmp_path: Path,
) -> None:
    """Its user may have changed the configuration; who refuses still is not asked on and on."""
    refusals = [DeclinedError("not yet"), DeclinedError("not yet")]
    async with working(tmp_path, *refusals) as world:
        world.drop("a")
        await world.until(lambda now: peer(now).parked)
        world.engine.set_online(frozenset({BOB}), anew=frozenset({BOB}))
        await world.until_begun(2)
        await world.until(lambda now: peer(now).parked)
        world.engine.set_online(frozenset({BOB}), anew=frozenset({BOB}))
        assert peer(await world.until_idle()) == PeerCount(delivered=1)
        assert len(world.begun) == 3


async def test_what_a_person_has_decided_about_a_peer_is_tried_at_once(tmp_path: Path) -> None:
    async with working(tmp_path, DeclinedError("another key")) as world:
        world.drop("a")
        await world.until(lambda now: peer(now).parked)
        await world.engine.decided(BOB)
        assert peer(await world.until_idle()) == PeerCount(delivered=1)


async def test_a_file_that_changed_while_it_was_sent_is_looked_at_again(
    tmp_path: Path,
) -> None:
    """Even when no event tells of the change; then the new version is sent."""
    async with working(tmp_path) as world:

        def cut() -> Exception:
            os.truncate(world.root / "a", 3)
            return ChangedError("the file changed")

        world.outcomes.append(cut)
        world.drop("a", b"content")
        await world.until_begun(2)
        statistics = await world.until_idle()
        assert [delivery.version.size for delivery in world.deliveries] == [7, 3]
        assert (peer(statistics), statistics.failures) == (PeerCount(delivered=1), ())


async def test_a_file_that_is_said_to_have_changed_is_tried_again_soon(tmp_path: Path) -> None:
    """It may rest by the time it is looked at, or only have been touched."""
    async with working(tmp_path, ChangedError("the file changed")) as world:
        world.drop("a")
        statistics = await world.until(lambda now: peer(now).error)
        assert peer(statistics) == PeerCount(
            pending=1, pending_bytes=1, next_try=NOW + AFTER_CHANGE, error="the file changed"
        )
        assert statistics.failures == ()


async def test_a_file_that_changed_is_not_tried_again_before_it_rests(tmp_path: Path) -> None:
    """What is read of it before may be half of a change whose program puts the mtime back."""
    async with working(tmp_path, ChangedError("it changed"), settle=NEVER) as world:
        world.drop("a")
        await world.until(lambda now: peer(now).error == "it changed")
        await world.until_at_work("a")
        world.tick(AFTER_CHANGE)
        statistics = await world.until(lambda now: peer(now).error != "it changed")
        assert peer(statistics) == PeerCount(
            pending=1,
            pending_bytes=1,
            next_try=NOW + AFTER_CHANGE + RETRY_LAST,
            error="the file is being changed",
        )
        assert world.begun == [(BOB, "a")]


async def test_a_file_that_does_not_rest_is_asked_for_as_seldom_as_it_may(
    tmp_path: Path,
) -> None:
    """Not every other moment, for as long as somebody writes to it."""
    settle = 600.0
    async with working(tmp_path, ChangedError("it changed"), settle=settle) as world:
        world.drop("a")
        await world.until_at_work("a")
        for number in range(3):
            due = AFTER_CHANGE + number * settle
            world.tick(due)
            await world.until_put_off(NOW + due + settle)
        assert world.begun == [(BOB, "a")]


async def test_waiting_until_a_file_rests_is_no_failure(tmp_path: Path) -> None:
    """However long it takes, the next one that is, is retried as soon as if there were none."""
    errors = ChangedError("it changed"), OfflineError("bob is gone")
    async with working(tmp_path, *errors, settle=NEVER) as world:
        world.drop("a")
        await world.until_at_work("a")
        for number in range(20):
            due = AFTER_CHANGE + number * RETRY_LAST
            world.tick(due)
            await world.until_put_off(NOW + due + RETRY_LAST)
        standing = await world.engine._journal.standing("photos", "a", BOB)
        assert standing.attempts == 1
        world.engine._folders["photos"]._settling = Settling(0.0)  # nobody writes any more
        world.tick(AFTER_CHANGE + 20 * RETRY_LAST)
        statistics = await world.until(lambda now: peer(now).error == "bob is gone")
        again = peer(statistics).next_try
        assert again is not None
        assert RETRY_FIRST <= again - world.engine._clock() <= 2 * RETRY_FIRST


async def test_a_bug_parks_its_delivery_and_the_engine_lives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(tmp_path, RuntimeError("a bug")) as world:
        world.drop("a")
        statistics = await world.until(lambda now: peer(now).parked)
        assert peer(statistics).error == "an internal error"
        assert peer(statistics).hint == "this is a bug in syncd; its log has the details"
        [record] = [record for record in caplog.records if record.exc_info]
        assert record.getMessage() == f"delivering a to {BOB}"
        assert record.exc_info is not None
        assert repr(record.exc_info[1]) == "RuntimeError('a bug')"
        world.drop("b")
        await world.until_begun(2)
        await world.until(lambda now: peer(now).delivered == 1)
        assert world.begun == [(BOB, "a"), (BOB, "b")]


async def test_while_the_journal_cannot_be_written_the_engine_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk ends nothing, and nothing that happens meanwhile is lost."""
    monkeypatch.setattr(engine_module, "JOURNAL_RETRY", 0.01)
    gate = trio.Event()

    def refusals() -> list[str]:
        return [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]

    async with working(tmp_path, gate) as world:
        world.drop("sent-before")
        await world.until_begun(1)
        database = world.engine._journal._database.connection
        database.execute("PRAGMA query_only = 1")
        gate.set()
        world.drop("meanwhile")
        await world.until(lambda _: len(refusals()) == 2)
        statistics = await world.engine.statistics()
        # Somebody who waits sees both: one is still owed, one is counted where it came.
        assert peer(statistics) == PeerCount(pending=1, pending_bytes=1)
        assert statistics.folders["photos"].settling == 1
        database.execute("PRAGMA query_only = 0")
        await world.until_begun(2)
        assert peer(await world.until_idle()) == PeerCount(delivered=2)
        # Told once each, not at each try.
        assert refusals() == 2 * [
            "the journal cannot be written: attempt to write a readonly database;"
            " is the disk of the state directory full, or read-only?"
        ]
        assert statistics.failures == ()


async def test_an_engine_that_waits_for_its_journal_can_be_stopped(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with working(tmp_path) as world:
            world.engine._journal._database.connection.execute("PRAGMA query_only = 1")
            world.drop("a")
            await world.until(lambda now: now.folders["photos"].settling)
    async with working(tmp_path) as world:
        await world.until_begun(1)
        assert peer(await world.until_idle()).delivered == 1


async def test_without_its_journal_the_engine_ends(tmp_path: Path) -> None:
    """What cannot be written down cannot be promised; a new start finds out what is owed."""
    with pytest.RaisesGroup(JournalError, flatten_subgroups=True):
        async with working(tmp_path) as world:
            with contextlib.closing(sqlite3.connect(world.state / "journal.db")) as database:
                database.execute("DROP TABLE owed")
            world.drop("a")
            with trio.fail_after(PATIENCE):
                await trio.sleep_forever()


async def test_only_the_last_errors_are_kept_newest_first(tmp_path: Path) -> None:
    count = MAX_ERRORS + 5
    errors = [DeclinedError(f"{number}") for number in range(count)]
    async with working(tmp_path, *errors, parallel=1) as world:
        for number in range(count):
            world.drop(f"{number}")
        statistics = await world.until(lambda now: peer(now).parked == count)
        expected = [f"{number}" for number in reversed(range(5, count))]
        assert [failure.text for failure in statistics.failures] == expected


# --- Files that go away


async def test_a_file_that_is_deleted_is_not_owed_any_more(tmp_path: Path) -> None:
    async with working(tmp_path, online=()) as world:
        file = world.drop("a")
        await world.until(lambda now: peer(now).pending == 1)
        file.unlink()
        await world.until(lambda now: now.counts.pending == {})
        world.engine.set_online(frozenset({BOB}))
        world.drop("b")
        await world.until_begun(1)
        await world.until_idle()
        assert world.begun == [(BOB, "b")]


async def test_a_file_deleted_while_it_is_sent_leaves_room_for_another(
    tmp_path: Path,
) -> None:
    """The journal may give the other the id of the first, which is still under way."""
    first, second = trio.Event(), trio.Event()
    async with working(tmp_path, first, second) as world:
        file = world.drop("a")
        await world.until_begun(1)
        file.unlink()
        await world.until(lambda now: now.counts.pending == {})
        world.drop("b", b"another")
        await world.until_begun(2)
        assert world.deliveries[0].id == world.deliveries[1].id
        first.set()
        statistics = await world.until(lambda now: peer(now).delivered == 1)
        assert statistics.counts.pending == {"photos": 1}
        second.set()
        assert peer(await world.until_idle()) == PeerCount(delivered=2)
        assert world.begun == [(BOB, "a"), (BOB, "b")]


async def test_a_file_renamed_while_it_is_sent_is_sent_under_its_new_name(
    tmp_path: Path,
) -> None:
    gate = trio.Event()
    async with working(tmp_path, gate, parallel=1) as world:
        file = world.drop("a")
        await world.until_begun(1)
        file.rename(world.root / "b")
        await world.until(lambda _: world.owed_paths() == ["b"])
        gate.set()
        await world.until_begun(2)
        await world.until_idle()
        assert world.begun == [(BOB, "a"), (BOB, "b")]


async def test_a_file_that_was_deleted_while_nobody_watched_is_not_owed_any_more(
    tmp_path: Path,
) -> None:
    async with working(tmp_path, online=()) as world:
        file = world.drop("a")
        world.drop("b")
        await world.until(lambda now: peer(now).pending == 2)
    file.unlink()
    async with working(tmp_path, online=()) as world:
        await world.engine.rescan()
        assert peer(await world.engine.statistics()).pending == 1


async def test_a_directory_whose_name_cannot_be_sent_is_told_as_it_comes_and_goes(
    tmp_path: Path,
) -> None:
    """Such a name is none for the journal either."""
    async with working(tmp_path) as world:
        (world.root / "d\udcff").mkdir()
        world.drop("d\udcff/a")
        skipped = (("d\udcff", "the name is no valid UTF-8"),)
        await world.until(lambda now: now.folders["photos"].skipped == skipped)
        (world.root / "d\udcff").rename(world.root / "d")
        await world.until_begun(1)
        assert peer(await world.until_idle()) == PeerCount(delivered=1)
        assert world.begun == [(BOB, "d/a")]


# --- What arrives


async def test_what_arrived_is_relayed_but_not_sent_back(tmp_path: Path) -> None:
    async with working(tmp_path, send_to=(BOB, CAROL), online=(BOB, CAROL)) as world:
        partial = world.root / ".syncd" / "partial"
        partial.parent.mkdir()
        partial.write_bytes(b"received")
        os.utime(partial, ns=(0, 10**18))
        status = partial.stat()
        version = FileVersion(
            folder="photos",
            path="a",
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
        )
        arrival = Arrival(
            version=version, peer=BOB, digest="d1", source_size=8, source_mtime_ns=10**18
        )
        assert await world.engine.known_arrival("photos", "a") is None
        await world.engine.arriving(arrival)
        partial.rename(world.root / "a")
        await world.until_begun(1)
        await world.until_idle()
        assert await world.engine.known_arrival("photos", "a") == arrival
        # Nor after another look at everything.
        await world.engine.rescan()
        await world.until_idle()
        assert world.begun == [(CAROL, "a")]


async def test_of_two_arrivals_that_is_known_which_lies_there(tmp_path: Path) -> None:
    """Between the note that a file is about to arrive and its rename we may be killed."""
    async with working(tmp_path, settle=NEVER) as world:

        def arrival(file: Path) -> Arrival:
            status = file.stat()
            version = FileVersion(
                folder="photos", path="a", size=status.st_size,
                mtime_ns=status.st_mtime_ns, inode=status.st_ino,
            )  # fmt: skip
            return Arrival(
                version=version, peer=BOB, digest="d1", source_size=8, source_mtime_ns=10**18
            )

        old = arrival(world.drop("a", b"old"))
        await world.engine.arriving(old)
        await world.until(lambda now: not now.folders["photos"].settling)
        partial = world.root / ".syncd" / "partial"
        partial.parent.mkdir()
        partial.write_bytes(b"newer")
        new = arrival(partial)
        await world.engine.arriving(new)
        assert await world.engine.known_arrival("photos", "a") == old
        partial.rename(world.root / "a")
        assert await world.engine.known_arrival("photos", "a") == new


# --- Across lives


async def test_what_was_cut_off_is_owed_in_the_next_life(tmp_path: Path) -> None:
    async with working(tmp_path, trio.Event(), trio.Event()) as world:
        world.drop("a")
        world.drop("b")
        await world.until_begun(2)
    async with working(tmp_path) as world:
        await world.until_begun(2)
        assert peer(await world.until_idle()) == PeerCount(delivered=2)
        assert sorted(world.begun) == [(BOB, "a"), (BOB, "b")]
        # Nobody is to blame for it.
        assert [delivery.attempts for delivery in world.deliveries] == [0, 0]


async def test_a_restart_sends_nothing_twice(tmp_path: Path) -> None:
    async with working(tmp_path) as world:
        world.drop("a")
        world.drop("b")
        await world.until_begun(2)
        await world.until_idle()
    async with working(tmp_path) as world:
        await world.engine.rescan()
        world.drop("c")
        await world.until_begun(1)
        await world.until_idle()
        assert world.begun == [(BOB, "c")]


async def test_who_is_new_gets_everything_and_who_left_is_owed_nothing(
    tmp_path: Path,
) -> None:
    async with working(tmp_path, online=()) as world:
        world.drop("a")
        await world.until(lambda now: peer(now).pending == 1)
    async with working(tmp_path, send_to=(CAROL,), online=(BOB, CAROL)) as world:
        await world.until_begun(1)
        statistics = await world.until_idle()
        assert world.begun == [(CAROL, "a")]
        assert peer(statistics).pending == 0


# --- Statistics


async def test_the_statistics_tell_of_every_folder(tmp_path: Path) -> None:
    async with working(tmp_path, online=(), settle=NEVER) as world:
        world.drop("whole")
        (world.root / "growing").write_bytes(b"x")
        (world.root / "caf\udce9").write_bytes(b"x")
        await world.engine.rescan()
        statistics = await world.until(lambda now: now.counts.pending)
        assert statistics.folders == {
            "photos": FolderState(
                files=2, settling=1, scanning=False, problem="", hint="",
                skipped=(("caf\udce9", "the name is no valid UTF-8"),),
            )
        }  # fmt: skip
        assert statistics.counts.pending == {"photos": 1}
        assert statistics.failures == ()


async def test_a_folder_that_is_gone_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    world = World(there, tmp_path / "state")
    async with open_journal(world.state) as journal, trio.open_nursery() as nursery:
        rules = [
            FolderRule(id=path.name, path=path, send_to=(BOB,), settle=0.0)
            for path in (tmp_path / "gone", there)
        ]
        world.engine = Engine(
            journal,
            rules,
            world.send,
            limit_of=lambda _: 4,
            places=MAX_RUNNING,
            clock=lambda: NOW,
        )
        await nursery.start(world.engine.run)
        world.engine.set_online(frozenset({BOB}))
        await world.engine.rescan()
        world.drop("a")
        await world.until_begun(1)
        folders = (await world.until_idle()).folders
        assert folders["gone"].problem == f"{tmp_path / 'gone'} is gone or was replaced"
        assert folders["there"].problem == ""
        nursery.cancel_scope.cancel()


# --- Outside any folder


async def test_a_file_that_a_person_sends_is_owed_and_delivered(tmp_path: Path) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"12345")
    gate = trio.Event()
    async with working(tmp_path, gate) as world:
        await world.engine.send_outside(str(letter), BOB)
        await world.until_begun(1)
        version = world.deliveries[0].version
        assert (version.folder, version.path, version.size) == (OUTSIDE, str(letter), 5)
        assert world.seen == [1]
        standing = await world.engine.standing_outside(str(letter), BOB)
        assert standing == Standing(state="pending")
        gate.set()
        await world.until_idle()
        standing = await world.engine.standing_outside(str(letter), BOB)
        assert standing == Standing(state="delivered")
        # Again, because a person wants it.
        await world.engine.send_outside(str(letter), BOB)
        await world.until_begun(2)


async def test_what_a_person_sent_survives_a_restart(tmp_path: Path) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"12345")
    async with working(tmp_path, online=()) as world:
        await world.engine.send_outside(str(letter), BOB)
    async with working(tmp_path) as world:
        await world.until_begun(1)
        assert world.begun == [(BOB, str(letter))]


async def test_a_file_goes_to_nobody_who_is_unknown(tmp_path: Path) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"12345")
    async with working(tmp_path) as world:
        with pytest.raises(NotFoundError, match=f"names no peer {CAROL}"):
            await world.engine.send_outside(str(letter), CAROL)
        with pytest.raises(NotFoundError, match="there is no file"):
            await world.engine.send_outside(str(tmp_path / "nothing"), BOB)
        assert world.owed_paths() == []


async def test_a_file_that_changes_while_a_person_sends_it_goes_as_it_is_then(
    tmp_path: Path,
) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"12345")

    def change() -> Exception:
        letter.write_bytes(b"1234567")
        return ChangedError("the file has changed since it was found")

    async with working(tmp_path, change) as world:
        await world.engine.send_outside(str(letter), BOB)
        statistics = await world.until(lambda now: peer(now).pending_bytes == 7)
        # Not at once: it may be changing still.
        assert peer(statistics).next_try == NOW + AFTER_CHANGE
        world.engine._clock = lambda: NOW + AFTER_CHANGE
        world.engine._wake.set()
        await world.until_begun(2)
        assert [each.version.size for each in world.deliveries] == [5, 7]


async def test_a_file_that_went_away_is_not_owed_any_more(tmp_path: Path) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"12345")

    def remove() -> Exception:
        letter.unlink()
        return ChangedError("the file has changed since it was found")

    async with working(tmp_path, remove) as world:
        await world.engine.send_outside(str(letter), BOB)
        await world.until_begun(1)
        statistics = await world.until_idle()
        standing = await world.engine.standing_outside(str(letter), BOB)
        assert standing == Standing(state="dropped")
        [failure] = statistics.failures
        assert failure.text.startswith("the file went away before it was sent: ")


async def test_a_file_that_became_something_else_needs_a_person(tmp_path: Path) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"12345")

    def replace_it() -> Exception:
        letter.unlink()
        letter.symlink_to("elsewhere")
        return ChangedError("the file has changed since it was found")

    async with working(tmp_path, replace_it) as world:
        await world.engine.send_outside(str(letter), BOB)
        await world.until(lambda now: peer(now).parked)
        standing = await world.engine.standing_outside(str(letter), BOB)
        assert (standing.state, standing.attempts) == ("parked", 1)
        assert "is a symbolic link" in standing.error


# --- Places


async def test_a_peer_that_answers_holds_its_place(tmp_path: Path) -> None:
    gates = [trio.Event(), trio.Event()]
    async with working(tmp_path, *gates) as world:
        world.engine._places = 1
        world.drop("a")
        await world.until_begun(1)
        world.engine.answered(world.deliveries[0])
        world.drop("b")
        await world.until(lambda now: peer(now).pending == 2)
        world.engine._clock = lambda: NOW + ANSWER_GRACE
        world.engine._wake.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert world.begun == [(BOB, "a")]
        gates[0].set()
        await world.until_begun(2)


async def test_a_peer_that_does_not_answer_gives_its_place_up(tmp_path: Path) -> None:
    async with working(tmp_path, trio.Event()) as world:
        world.engine._places = 1
        world.drop("a")
        await world.until_begun(1)
        world.drop("b")
        await world.until(lambda now: peer(now).pending == 2)
        world.engine._clock = lambda: NOW + ANSWER_GRACE
        world.engine._wake.set()
        await world.until_begun(2)


async def test_how_long_the_journal_has_been_at_work_is_told(tmp_path: Path) -> None:
    """And everything else is told meanwhile, as it was before."""
    async with working(tmp_path, online=()) as world:
        world.drop("a")
        await world.until(lambda now: peer(now).pending == 1)
        assert (await world.engine.statistics()).counted == 0.0
        with contextlib.closing(sqlite3.connect(world.state / "journal.db")) as database:
            database.execute("BEGIN IMMEDIATE")  # so that nothing can be written until the end
            world.drop("b")
            statistics = await world.until(lambda now: now.counted > 0.05)
            assert peer(statistics).pending == 1
            assert statistics.folders["photos"].settling == 1
            database.rollback()
        await world.until(lambda now: peer(now).pending == 2 and now.counted == 0.0)
