from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from syncd.errors import ErrorType, JournalError, LockedError
from syncd.sync import journal as journal_module
from syncd.sync.journal import Arrival, Counts, Journal, PeerCount, open_journal
from syncd.sync.plan import SMALL, Delivery, FileVersion

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

NOW = 1_000_000.0  # seconds since 1970
BOB, CAROL, DAVE = "bob@example.org", "carol@example.org", "dave@example.org/desk"
DIGEST = "d1" * 32

VERSION = FileVersion(folder="photos", path="a/1.raw", size=10, mtime_ns=111, inode=7)


def named(path: str, *, size: int = 10) -> FileVersion:
    return replace(VERSION, path=path, size=size)


def arrived(version: FileVersion = VERSION, peer: str = BOB) -> Arrival:
    return Arrival(
        version=version, peer=peer, digest=DIGEST, source_size=version.size, source_mtime_ns=9
    )


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with open_journal(tmp_path / "state") as journal:
        yield journal


async def owed(journal: Journal, *peers: str) -> list[Delivery]:
    return await journal.pending(peers or (BOB,), 100)


async def only(journal: Journal, peer: str = BOB) -> Delivery:
    [delivery] = await owed(journal, peer)
    return delivery


# --- What is owed


async def test_what_is_owed_is_told_as_it_was_given(journal: Journal) -> None:
    await journal.owe([VERSION], [BOB])
    delivery = await only(journal)
    assert delivery == Delivery(id=delivery.id, version=VERSION, peer=BOB)


async def test_owing_the_same_again_changes_nothing(journal: Journal) -> None:
    await journal.owe([VERSION], [BOB])
    before = await only(journal)
    await journal.failed(before, "declined", "ask bob", NOW)
    once = await only(journal)
    await journal.owe([VERSION, VERSION], [BOB, BOB])
    assert await only(journal) == once
    assert once.attempts == 1


@pytest.mark.parametrize("field", ["size", "mtime_ns", "inode"])
async def test_a_newer_version_takes_the_place_of_the_older(
    journal: Journal, field: str
) -> None:
    newer = replace(VERSION, **{field: 99})  # type: ignore[arg-type]  # the fields are numbers
    await journal.owe([VERSION], [BOB])
    await journal.failed(await only(journal), "offline", "", NOW)
    await journal.owe([newer], [BOB])
    delivery = await only(journal)
    assert (delivery.version, delivery.attempts, delivery.not_before) == (newer, 0, 0.0)


async def test_a_newer_version_lifts_the_parking(journal: Journal) -> None:
    await journal.owe([VERSION], [BOB])
    await journal.failed(await only(journal), "declined", "ask bob", None)
    assert await owed(journal) == []
    await journal.owe([VERSION], [BOB])
    assert await owed(journal) == []
    await journal.owe([replace(VERSION, size=11)], [BOB])
    assert (await only(journal)).version.size == 11
    assert (await journal.counts()).peers[BOB] == PeerCount(pending=1, pending_bytes=11)


async def test_what_a_peer_has_is_not_owed_to_it_again(journal: Journal) -> None:
    await journal.owe([VERSION], [BOB])
    await journal.done(await only(journal), "delivered", DIGEST)
    await journal.owe([VERSION], [BOB, CAROL])
    assert await owed(journal) == []
    assert (await only(journal, CAROL)).version == VERSION


async def test_a_version_that_comes_back_is_not_owed_while_the_peer_has_it(
    journal: Journal,
) -> None:
    """Changed, and changed back by renaming: what was owed meanwhile lies nowhere."""
    await journal.owe([VERSION], [BOB])
    await journal.done(await only(journal), "delivered", DIGEST)
    await journal.owe([replace(VERSION, inode=8)], [BOB])
    await journal.owe([VERSION], [BOB])
    assert await owed(journal) == []


async def test_a_version_that_comes_back_while_another_is_sent_is_owed_after_it(
    journal: Journal,
) -> None:
    """Else the peer would keep what lies here no longer."""
    between = replace(VERSION, inode=8)
    await journal.owe([VERSION], [BOB])
    await journal.done(await only(journal), "delivered", DIGEST)
    await journal.owe([between], [BOB])
    running = await only(journal)
    await journal.owe([VERSION], [BOB])
    await journal.done(running, "delivered", DIGEST)
    assert (await only(journal)).version == VERSION


async def test_a_newer_version_stays_owed_when_the_older_is_done(journal: Journal) -> None:
    newer = replace(VERSION, size=11)
    await journal.owe([VERSION], [BOB])
    running = await only(journal)
    await journal.owe([newer], [BOB])
    await journal.done(running, "delivered", DIGEST)
    assert (await only(journal)).version == newer


async def test_a_file_renamed_while_it_is_sent_stays_owed(journal: Journal) -> None:
    """The same inode, size and time, and maybe the id that has just become free."""
    await journal.owe([named("a")], [BOB])
    running = await only(journal)
    await journal.gone("photos", ["a"])
    await journal.owe([named("b")], [BOB])
    await journal.failed(running, "declined", "ask bob", None)
    before = await only(journal)
    assert (before.version.path, before.attempts) == ("b", 0)
    await journal.done(running, "delivered", DIGEST)
    assert await only(journal) == before


async def test_a_newer_version_is_not_blamed_for_the_failure_of_the_older(
    journal: Journal,
) -> None:
    await journal.owe([VERSION], [BOB])
    running = await only(journal)
    await journal.owe([replace(VERSION, size=11)], [BOB])
    await journal.failed(running, "declined", "ask bob", None)
    delivery = await only(journal)
    assert (delivery.version.size, delivery.attempts) == (11, 0)


async def test_numbers_that_need_all_64_bits_survive(journal: Journal) -> None:
    """Inodes of overlayfs and network file systems; times at the ends of the calendar."""
    odd = replace(VERSION, inode=2**64 - 1, mtime_ns=-(2**63))
    await journal.owe([odd], [BOB])
    delivery = await only(journal)
    assert delivery.version == odd
    await journal.failed(delivery, "offline", "", NOW)
    assert (await only(journal)).attempts == 1
    await journal.done(delivery, "sent", DIGEST)
    await journal.owe([odd], [BOB])
    assert await owed(journal) == []
    last = replace(VERSION, path="last", inode=2**63, size=2**63 - 1, mtime_ns=2**63 - 1)
    await journal.arriving(arrived(last))
    assert await journal.arrivals("photos", "last") == [arrived(last)]


# --- In which order


async def test_the_oldest_come_first_and_failures_after_them(journal: Journal) -> None:
    await journal.owe([named("c"), named("a")], [BOB])
    await journal.owe([named("b")], [BOB])
    first, *_ = await owed(journal)
    await journal.failed(first, "offline", "", NOW)
    assert [each.version.path for each in await owed(journal)] == ["a", "b", "c"]
    # Its peer is back: then it has its place again.
    await journal.retry(BOB)
    assert [each.version.path for each in await owed(journal)] == ["c", "a", "b"]


async def test_small_and_large_files_each_have_their_limit(journal: Journal) -> None:
    """So that a small file is among the candidates, however many large ones are older."""
    await journal.owe([named(f"{n}", size=SMALL + 1) for n in range(5)], [BOB, CAROL])
    await journal.owe([named("s1", size=SMALL), named("s2")], [BOB])
    pending = await journal.pending([BOB], 2)
    assert [each.version.path for each in pending] == ["0", "1", "s1", "s2"]
    both = await journal.pending([BOB, CAROL], 1)
    assert [(each.peer, each.version.path) for each in both] == [
        (BOB, "0"), (BOB, "s1"), (CAROL, "0"),
    ]  # fmt: skip
    assert await journal.pending([], 9) == []


async def test_those_that_must_wait_are_told_in_the_order_of_their_times(
    journal: Journal,
) -> None:
    await journal.owe([named(path) for path in "abc"], [BOB])
    for delivery, wait in zip(await owed(journal), (20, 10, 0), strict=True):
        await journal.failed(delivery, "offline", "", NOW + wait)
    told = [(each.version.path, each.not_before) for each in await owed(journal)]
    assert told == [("c", NOW), ("b", NOW + 10), ("a", NOW + 20)]
    assert [each.version.path for each in await journal.pending([BOB], 1)] == ["c"]


async def test_what_is_next_is_found_without_looking_at_all_that_is_owed(
    journal: Journal,
) -> None:
    """At every wake: a search in an index, and no sorting."""
    statements: list[str] = []
    journal._connection.set_trace_callback(statements.append)
    await owed(journal)
    journal._connection.set_trace_callback(None)
    queries = [each for each in statements if each.startswith("SELECT")]
    assert len(queries) == 2
    for query in queries:
        plan = journal._connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert [step for *_, step in plan] == [
            "SEARCH owed USING INDEX owed_next (peer=? AND parked=? AND <expr>=?)"
        ]


async def test_a_peer_that_is_back_is_tried_at_once_with_all_but_what_is_parked(
    journal: Journal,
) -> None:
    await journal.owe([named("parked"), named("waiting")], [BOB, CAROL])
    for delivery in await owed(journal, BOB, CAROL):
        parked = delivery.version.path == "parked"
        await journal.failed(delivery, "offline", "", None if parked else NOW + 900)
    await journal.retry(BOB)
    [delivery] = await owed(journal)
    assert (delivery.version.path, delivery.not_before, delivery.attempts) == ("waiting", 0, 1)
    assert (await only(journal, CAROL)).not_before == NOW + 900


async def test_a_file_that_is_gone_is_owed_to_nobody(journal: Journal) -> None:
    await journal.owe([named("a"), named("b")], [BOB, CAROL])
    await journal.gone("photos", ["a"])
    await journal.gone("other", ["b"])
    left = [(each.peer, each.version.path) for each in await owed(journal, BOB, CAROL)]
    assert left == [(BOB, "b"), (CAROL, "b")]


async def test_a_file_that_comes_back_is_not_sent_again(journal: Journal) -> None:
    """Moved out of the folder and in again: it is the version that the peer has."""
    await journal.owe([VERSION], [BOB])
    await journal.done(await only(journal), "delivered", DIGEST)
    await journal.gone("photos", [VERSION.path])
    await journal.owe([VERSION], [BOB])
    assert await owed(journal) == []


async def test_who_is_not_configured_any_more_is_owed_nothing(journal: Journal) -> None:
    await journal.owe([VERSION], [BOB, CAROL])
    await journal.owe([replace(VERSION, folder="music")], [BOB, CAROL])
    await journal.owe([replace(VERSION, folder="gone")], [BOB])
    await journal.forget_others({"photos": [BOB], "music": [CAROL, DAVE]})
    left = [(each.peer, each.version.folder) for each in await owed(journal, BOB, CAROL)]
    assert left == [(BOB, "photos"), (CAROL, "music")]


async def test_the_owed_paths_of_a_folder_are_told_once_each_and_in_parts(
    journal: Journal,
) -> None:
    await journal.owe([named(path) for path in ("b", "a", "c/d", "c")], [BOB, CAROL])
    await journal.owe([replace(VERSION, folder="other")], [BOB])
    assert await journal.owed_paths("photos", "", 3) == ["a", "b", "c"]
    assert await journal.owed_paths("photos", "c", 3) == ["c/d"]
    assert await journal.owed_paths("photos", "c/d", 3) == []


# --- What arrives


async def test_an_arrival_is_not_owed_to_its_origin_but_to_others(journal: Journal) -> None:
    await journal.arriving(arrived(peer="dave@example.org"))
    await journal.owe([VERSION], [DAVE, BOB])
    assert [each.peer for each in await owed(journal, DAVE, BOB)] == [BOB]


async def test_an_arrival_that_was_changed_here_is_owed_to_all(journal: Journal) -> None:
    await journal.arriving(arrived())
    await journal.owe([VERSION], [BOB])
    await journal.owe([replace(VERSION, mtime_ns=112)], [BOB])
    assert (await only(journal)).version.mtime_ns == 112
    assert await journal.arrivals("photos", VERSION.path) == []


async def test_an_arrival_in_place_of_what_was_owed_to_its_origin_ends_that(
    journal: Journal,
) -> None:
    """What it would be sent lies here no longer."""
    await journal.owe([VERSION], [BOB])
    newer = replace(VERSION, inode=8)
    await journal.arriving(arrived(newer))
    await journal.owe([newer], [BOB])
    assert await owed(journal) == []


async def test_an_arrival_is_remembered_until_the_file_is_gone(journal: Journal) -> None:
    assert await journal.arrivals("photos", VERSION.path) == []
    await journal.arriving(arrived(peer=CAROL))
    await journal.arriving(arrived())
    assert await journal.arrivals("photos", VERSION.path) == [arrived()]
    assert await journal.arrivals("other", VERSION.path) == []
    # What it is about to replace goes away.
    await journal.gone("photos", [VERSION.path])
    assert await journal.arrivals("photos", VERSION.path) == [arrived()]
    await journal.owe([VERSION], [BOB])
    assert await journal.arrivals("photos", VERSION.path) == [arrived()]
    await journal.gone("photos", [VERSION.path])
    assert await journal.arrivals("photos", VERSION.path) == []


async def test_nothing_that_arrived_is_owed_to_its_origin_while_more_arrives(
    journal: Journal,
) -> None:
    """Whether the look finds the old version still, or the new one already."""
    newer = replace(VERSION, mtime_ns=112, inode=8)
    await journal.arriving(arrived())
    await journal.owe([VERSION], [BOB, CAROL])
    await journal.arriving(arrived(newer))
    assert await journal.arrivals("photos", VERSION.path) == [arrived(newer), arrived()]
    await journal.owe([VERSION], [BOB, CAROL])
    assert [each.version for each in await owed(journal, BOB, CAROL)] == [VERSION]
    await journal.owe([newer], [BOB, CAROL])
    assert [each.version for each in await owed(journal, BOB, CAROL)] == [newer]
    assert await journal.arrivals("photos", VERSION.path) == [arrived(newer)]


async def test_what_lies_there_already_can_arrive_again(journal: Journal) -> None:
    """As when the receipt was lost: no other look will find it."""
    await journal.owe([VERSION], [])
    await journal.arriving(arrived(peer=CAROL))
    await journal.arriving(arrived())
    assert await journal.arrivals("photos", VERSION.path) == [arrived()]
    await journal.owe([VERSION], [BOB])
    assert await owed(journal) == []


async def test_arrivals_that_nobody_ever_looks_at_are_forgotten_one_day(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_MAX_ARRIVING", 2)
    for path in "abc":
        await journal.arriving(arrived(named(path)))
    left = [await journal.arrivals("photos", path) for path in "abc"]
    assert left == [[], [arrived(named("b"))], [arrived(named("c"))]]


# --- Counts


async def test_everything_is_counted(journal: Journal) -> None:
    assert await journal.counts() == Counts(peers={}, pending={})
    await journal.owe([named("a", size=5), named("b", size=7)], [BOB, CAROL])
    await journal.owe([replace(VERSION, folder="music", size=100)], [BOB])
    a, b, music = await owed(journal)
    await journal.failed(a, "declined", "ask bob", None)
    await journal.failed(b, "offline", "", NOW + 30)
    [_, to_carol] = await owed(journal, CAROL)
    await journal.done(to_carol, "sent", DIGEST)
    await journal.done(music, "delivered", DIGEST)
    assert await journal.counts() == Counts(
        peers={
            BOB: PeerCount(
                pending=2, pending_bytes=12, parked=1, delivered=1, next_try=NOW + 30,
                error="declined", hint="ask bob",
            ),
            CAROL: PeerCount(pending=1, pending_bytes=5, sent=1),
        },
        pending={"photos": 2},
    )  # fmt: skip


async def test_counts_are_remembered_until_something_changes(journal: Journal) -> None:
    """Every kind of change is seen by the very next count."""
    before = await journal.counts()
    assert await journal.counts() is before
    await journal.owe([VERSION], [BOB])
    counts = [await journal.counts()]
    delivery = await only(journal)
    await journal.failed(delivery, "offline", "", NOW)
    counts.append(await journal.counts())
    assert await journal.counts() is counts[-1]
    await journal.retry(BOB)
    counts.append(await journal.counts())
    await journal.done(delivery, "delivered", DIGEST)
    counts.append(await journal.counts())
    assert [(each.peers[BOB].pending, each.peers[BOB].next_try) for each in counts] == [
        (1, None), (1, NOW), (1, None), (0, None),
    ]  # fmt: skip
    await journal.owe([named("b")], [BOB])
    await journal.gone("photos", ["b"])
    assert (await journal.counts()).pending == {}
    await journal.owe([named("c")], [CAROL])
    await journal.forget_others({})
    assert (await journal.counts()).pending == {}


async def test_a_count_that_a_change_overtakes_is_not_remembered(journal: Journal) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.counts)
        nursery.start_soon(journal.owe, [VERSION], [BOB])
        nursery.start_soon(journal.counts)
    assert (await journal.counts()).pending == {"photos": 1}


async def test_a_count_waits_for_the_change_that_is_under_way(
    journal: Journal, tmp_path: Path
) -> None:
    """Else a file would be seen neither as settling nor as owed for a moment."""
    before, counted = await journal.counts(), list[Counts]()

    async def count() -> None:
        counted.append(await journal.counts())

    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "journal.db")) as database:
        database.execute("BEGIN IMMEDIATE")  # so that nothing can be written until the end
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.owe, [VERSION], [BOB])
            await wait_all_tasks_blocked()
            nursery.start_soon(count)
            await wait_all_tasks_blocked()
            assert counted == []
            database.rollback()
    assert before.pending == {}
    assert [each.pending for each in counted] == [{"photos": 1}]


# --- Across lives


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        await journal.owe([VERSION, named("b")], [BOB])
        first, second = await owed(journal)
        await journal.done(first, "delivered", DIGEST)
        await journal.failed(second, "offline", "", NOW + 5)
        await journal.arriving(arrived(named("c")))
    async with open_journal(tmp_path) as journal:
        again = await owed(journal)
        assert again == [replace(second, attempts=1, not_before=NOW + 5)]
        assert await journal.arrivals("photos", "c") == [arrived(named("c"))]
        await journal.owe([VERSION], [BOB])
        assert await owed(journal) == again


async def test_what_is_written_is_synced(journal: Journal) -> None:
    """A power cut cannot be had here, so what SQLite promises has to do."""
    pragmas = [
        journal._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous")
    ]
    assert pragmas == ["wal", 2]  # 2 is FULL


async def test_only_we_may_read_it(tmp_path: Path) -> None:
    state = tmp_path / "below" / "state"
    async with open_journal(state) as journal:
        await journal.owe([VERSION], [BOB])
        modes = {each.name: each.stat().st_mode & 0o777 for each in state.iterdir()}
    assert state.stat().st_mode & 0o777 == 0o700
    assert set(modes) >= {"journal.db", "journal.db-wal", "lock"}
    assert set(modes.values()) == {0o600}


_OWE_FOR_EVER = """
import sys, trio
from pathlib import Path
from syncd.sync.journal import open_journal
from syncd.sync.plan import FileVersion

async def main():
    async with open_journal(Path(sys.argv[1])) as journal:
        for number in range(10_000_000):
            version = FileVersion(folder="f", path=str(number), size=1, mtime_ns=1, inode=1)
            await journal.owe([version], ["bob@example.org"])
            print(number, flush=True)

trio.run(main)
"""


def owe_until_killed(state: Path) -> list[str]:
    """Paths that a process has said are owed, before it was killed amid more."""
    with subprocess.Popen(
        [sys.executable, "-c", _OWE_FOR_EVER, str(state)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read().split()
    assert process.returncode == -signal.SIGKILL
    return said


async def test_what_was_said_to_be_owed_survives_a_kill(tmp_path: Path) -> None:
    """And the lock dies with the process."""
    said = await trio.to_thread.run_sync(owe_until_killed, tmp_path)
    async with open_journal(tmp_path) as journal:
        there = [each.version.path for each in await journal.pending([BOB], 10_000_000)]
    # It may have been killed between the two.
    assert there[: len(said)] == said
    assert len(there) - len(said) in (0, 1)


async def test_two_daemons_cannot_share_it(tmp_path: Path) -> None:
    async with open_journal(tmp_path):
        with pytest.raises(LockedError) as caught:
            async with open_journal(tmp_path):
                pass
    assert str(caught.value) == (
        f"another syncd (process {os.getpid()}) uses the state directory {tmp_path}"
    )
    assert caught.value.hint == "stop it, or give this one its own state.dir"
    async with open_journal(tmp_path) as journal:
        assert await owed(journal) == []


async def test_a_cancelled_method_is_done_or_not_begun(tmp_path: Path) -> None:
    """Never half of it; and the journal is of use afterwards."""
    versions = [named(str(number)) for number in range(100)]
    async with open_journal(tmp_path) as journal:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(journal.owe, versions, [BOB])
                await wait_all_tasks_blocked()
                scope.cancel()
        assert len(await owed(journal)) in (0, 100)
        with trio.CancelScope() as scope:
            scope.cancel()
            await journal.owe([named("late")], [CAROL])
        assert await owed(journal, CAROL) == []


# --- What cannot be used


async def refusal(state: Path) -> JournalError:
    """Why a journal cannot be opened."""
    with pytest.raises(JournalError) as caught:
        async with open_journal(state):
            pass
    return caught.value


async def filled(state: Path) -> Path:
    """A journal with something in every table, of several pages, and closed."""
    async with open_journal(state) as journal:
        await journal.owe([named(f"{number:0200}") for number in range(200)], [BOB])
        for delivery in (await owed(journal))[:50]:
            await journal.done(delivery, "delivered", DIGEST)
    return state / "journal.db"


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = await filled(tmp_path)
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA user_version = 2")
    before = file.read_bytes()
    error = await refusal(tmp_path)
    assert str(error) == f"the journal {file} was written by a newer syncd (schema 2)"
    assert error.hint == "install that version again, or give this one another state.dir"
    assert file.read_bytes() == before


@pytest.mark.parametrize("application", [0, 1234])
async def test_a_database_of_another_program_is_refused_and_left_alone(
    tmp_path: Path, application: int
) -> None:
    file = tmp_path / "journal.db"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.executescript(
            f"PRAGMA application_id = {application}; CREATE TABLE theirs (x)"
        )
    before = file.read_bytes()
    error = await refusal(tmp_path)
    assert str(error) == f"{file} is no journal of syncd"
    assert error.hint.startswith(f"move {file} away")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"??", b"no database" * 500, b"SQLite format 3\0" + 4080 * b"\xff"]
)
async def test_what_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "journal.db"
    file.write_bytes(content)
    error = await refusal(tmp_path)
    assert str(error).startswith(f"the journal {file} is damaged: ")
    assert error.hint.startswith(f"move {file} away")
    assert file.read_bytes() == content


async def test_no_damage_to_the_header_ends_in_a_traceback(tmp_path: Path) -> None:
    """Each byte of the first 100: it opens and works, or says what to do."""
    sound = (await filled(tmp_path / "sound")).read_bytes()
    refused, hints = set(), set()
    for position in range(100):
        state = tmp_path / str(position)
        state.mkdir()
        broken = bytearray(sound)
        broken[position] ^= 0xFF
        (state / "journal.db").write_bytes(broken)
        try:
            async with open_journal(state) as journal:
                assert len(await journal.pending([BOB], 1000)) == 150
                await journal.owe([VERSION], [BOB])
        except JournalError as error:
            refused.add(position)
            hints.add(error.hint)
    magic, page_size, user_version, application = (
        range(16), range(16, 18), range(60, 64), range(68, 72),
    )  # fmt: skip
    assert "" not in hints
    assert refused >= {*magic, *page_size, *user_version, *application}


async def test_a_journal_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    file = await filled(tmp_path)
    whole = file.read_bytes()
    for size in (50, 100, 4096, len(whole) // 2, len(whole) - 4096):
        file.write_bytes(whole[:size])
        error = await refusal(tmp_path)
        assert str(error).startswith(f"the journal {file} is damaged: ")
        assert error.hint.startswith(f"move {file} away")


async def test_a_journal_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    """As the hint says."""
    file = await filled(tmp_path)
    file.write_bytes(b"damaged" * 1000)
    await refusal(tmp_path)
    file.rename(tmp_path / "away")
    async with open_journal(tmp_path) as journal:
        assert await owed(journal) == []


async def test_damage_that_shows_later_is_an_error_of_the_journal(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as database:
            database.execute("DROP TABLE owed")
        with pytest.raises(JournalError, match="no such table: owed") as caught:
            await journal.owe([VERSION], [BOB])
        assert caught.value.type is ErrorType.CANCEL
        # Nothing of it was kept.
        assert await journal.arrivals("photos", VERSION.path) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
async def test_a_state_directory_that_cannot_be_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    error = await refusal(tmp_path / place)
    assert str(error).startswith(f"the state directory {tmp_path / place} cannot be used: ")
    assert error.hint == "set state.dir to a directory that syncd may write to"


async def test_a_journal_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.db").mkdir()
    error = await refusal(tmp_path)
    assert str(error) == (
        f"the journal {tmp_path / 'journal.db'} cannot be opened: Is a directory"
    )
    assert error.hint != ""


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for little."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=32", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk to fill it, and not in every container")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Leave so many bytes on a disk."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


@pytest.mark.parametrize("leave", [0, 4096, 8192, 16384])
async def test_a_full_disk_is_told_as_such(tiny_disk: Path, leave: int) -> None:
    """At whichever step of the opening it fills up; and it works once there is room."""
    ballast = fill(tiny_disk, leave=leave)
    error = await refusal(tiny_disk)
    assert "damaged" not in str(error)
    assert error.hint == "is the disk of the state directory full, or read-only?"
    ballast.unlink()
    resize(tiny_disk, "4m")
    async with open_journal(tiny_disk) as journal:
        await journal.owe([VERSION], [BOB])
        assert (await only(journal)).version == VERSION


async def test_a_disk_that_fills_up_later_loses_nothing_that_was_written(
    tiny_disk: Path,
) -> None:
    resize(tiny_disk, "1m")
    async with open_journal(tiny_disk) as journal:
        await journal.owe([VERSION], [BOB])
        ballast = fill(tiny_disk)
        many = [named(f"{number:01000}") for number in range(100)]
        with pytest.raises(JournalError) as caught:
            await journal.owe(many, [CAROL])
        assert caught.value.hint == "is the disk of the state directory full, or read-only?"
        assert caught.value.type is ErrorType.WAIT
        assert (await only(journal)).version == VERSION
        assert await owed(journal, CAROL) == []
        ballast.unlink()
        await journal.owe([named("b")], [BOB])
        assert len(await owed(journal)) == 2


async def test_a_disk_that_refuses_may_take_it_later(journal: Journal) -> None:
    """The type of the error says that it is worth another try."""
    journal._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(JournalError) as caught:
        await journal.owe([VERSION], [BOB])
    assert caught.value.type is ErrorType.WAIT
    assert await owed(journal) == []
    journal._connection.execute("PRAGMA query_only = 0")
    await journal.owe([VERSION], [BOB])
    assert (await only(journal)).version == VERSION
