from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from syncd.errors import JournalError
from syncd.sync import journal as journal_module
from syncd.sync.journal import (
    OUTSIDE,
    Arrival,
    Counts,
    Journal,
    PeerCount,
    Standing,
    open_journal,
)
from syncd.sync.plan import SMALL, Delivery, FileVersion

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

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
    assert journal.counts().peers[BOB] == PeerCount(pending=1, pending_bytes=11)


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


async def test_what_was_only_put_off_is_no_attempt(journal: Journal) -> None:
    await journal.owe([VERSION], [BOB])
    await journal.failed(await only(journal), "offline", "", NOW)
    await journal.failed(await only(journal), "in use", "wait", NOW + 5, counts=False)
    delivery = await only(journal)
    assert (delivery.attempts, delivery.not_before) == (1, NOW + 5)
    standing = await journal.standing("photos", VERSION.path, BOB)
    assert (standing.error, standing.hint) == ("in use", "wait")


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
    journal._database.connection.set_trace_callback(statements.append)
    await owed(journal)
    journal._database.connection.set_trace_callback(None)
    queries = [each for each in statements if each.startswith("SELECT")]
    assert len(queries) == 2
    for query in queries:
        plan = journal._database.connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
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


async def test_what_is_unparked_is_that_of_one_account_with_all_its_resources(
    journal: Journal,
) -> None:
    peers = [BOB, f"{BOB}/desk", f"{BOB}x", CAROL]
    await journal.owe([named("a")], peers)
    for delivery in await owed(journal, *peers):
        await journal.failed(delivery, "declined", "", None)
    await journal.unpark(BOB)
    assert {each.peer for each in await owed(journal, *peers)} == {BOB, f"{BOB}/desk"}


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


async def test_what_a_peer_has_in_its_place_is_known(journal: Journal) -> None:
    """By its bare JID: whoever offers a change of it may be another of its clients."""
    await journal.owe([VERSION], [BOB, DAVE])
    await journal.done(await only(journal), "delivered", DIGEST)
    await journal.done(await only(journal, DAVE), "delivered", DIGEST, in_place=True)
    peers = ("dave@example.org", BOB, "dave@example.orga", "dave")
    held = [await journal.held("photos", VERSION.path, peer) for peer in peers]
    assert held == [VERSION, None, None, None]


async def test_what_is_kept_beside_a_newer_delivery_is_in_place_no_more(
    journal: Journal,
) -> None:
    newer = replace(VERSION, mtime_ns=222)
    for version, in_place in ((VERSION, True), (newer, False)):
        await journal.owe([version], [BOB])
        await journal.done(await only(journal), "delivered", DIGEST, in_place=in_place)
    assert await journal.held("photos", VERSION.path, BOB) is None


@pytest.mark.parametrize("seen", [False, True])
async def test_what_was_kept_beside_a_file_is_found_by_that(
    journal: Journal, seen: bool
) -> None:
    copy = named("a/1.conflict.raw")
    arrival = replace(arrived(copy), source_path=VERSION.path)
    await journal.arriving(arrival)
    if seen:
        await journal.owe([copy], [])
    assert await journal.beside("photos", VERSION.path) == [arrival]
    assert await journal.arrivals("photos", copy.path) == [arrival]
    assert await journal.beside("photos", copy.path) == []
    assert await journal.beside("music", VERSION.path) == []


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
    assert journal.counts() == Counts(peers={}, pending={})
    await journal.owe([named("a", size=5), named("b", size=7)], [BOB, CAROL])
    await journal.owe([replace(VERSION, folder="music", size=100)], [BOB])
    a, b, music = await owed(journal)
    await journal.failed(a, "declined", "ask bob", None)
    await journal.failed(b, "offline", "", NOW + 30)
    [_, to_carol] = await owed(journal, CAROL)
    await journal.done(to_carol, "sent", DIGEST)
    await journal.done(music, "delivered", DIGEST)
    assert journal.counts() == Counts(
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
    before = journal.counts()
    assert journal.counts() is before
    await journal.owe([VERSION], [BOB])
    counts = [journal.counts()]
    delivery = await only(journal)
    await journal.failed(delivery, "offline", "", NOW)
    counts.append(journal.counts())
    assert journal.counts() is counts[-1]
    await journal.retry(BOB)
    counts.append(journal.counts())
    await journal.done(delivery, "delivered", DIGEST)
    counts.append(journal.counts())
    assert [(each.peers[BOB].pending, each.peers[BOB].next_try) for each in counts] == [
        (1, None), (1, NOW), (1, None), (0, None),
    ]  # fmt: skip
    await journal.owe([named("b")], [BOB])
    await journal.gone("photos", ["b"])
    assert journal.counts().pending == {}
    await journal.owe([named("c")], [CAROL])
    await journal.forget_others({})
    assert journal.counts().pending == {}


async def test_the_counts_are_known_while_the_disk_is_at_work(
    journal: Journal, tmp_path: Path
) -> None:
    """Of what is on disk; whoever asks for the status does not wait for a disk that hangs."""
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "journal.db")) as database:
        database.execute("BEGIN IMMEDIATE")  # so that nothing can be written until the end
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.owe, [VERSION], [BOB])
            await wait_all_tasks_blocked()
            with trio.fail_after(60):
                while journal.busy_since is None:  # noqa: ASYNC110 - a thread tells nobody
                    await trio.sleep(0.001)
            assert journal.counts() == Counts(peers={}, pending={})
            database.rollback()
    assert journal.counts().pending == {"photos": 1}
    assert journal.busy_since is None


async def test_a_change_that_fails_is_not_counted(journal: Journal) -> None:
    journal._database.connection.execute("PRAGMA query_only = 1")
    with pytest.raises(JournalError):
        await journal.owe([VERSION], [BOB])
    assert journal.counts() == Counts(peers={}, pending={})


def count_slowly(db: sqlite3.Connection) -> Counts:
    """Count by looking at everything, as the triggers should have."""
    peers: dict[str, dict[str, object]] = {}
    for peer, pending, size, parked in db.execute(
        "SELECT peer, count(*), sum(size), sum(parked) FROM owed GROUP BY peer"
    ):
        peers[peer] = {"pending": pending, "pending_bytes": size, "parked": parked}
    for peer, next_try in db.execute(
        "SELECT peer, min(not_before) FROM owed"
        " WHERE not_before > 0 AND parked = 0 GROUP BY peer"
    ):
        peers[peer]["next_try"] = next_try
    for peer, error, hint in db.execute(
        "SELECT peer, error, hint FROM owed WHERE error <> '' ORDER BY parked, id"
    ):
        peers[peer] |= {"error": error, "hint": hint}
    for peer, outcome, number in db.execute(
        "SELECT peer, outcome, count(*) FROM done GROUP BY peer, outcome"
    ):
        peers.setdefault(peer, {})[outcome] = number
    return Counts(
        peers={peer: PeerCount(**values) for peer, values in peers.items()},  # type: ignore[arg-type]  # the columns above
        pending=dict(
            db.execute(
                "SELECT folder, count(DISTINCT path) FROM owed GROUP BY folder"
            ).fetchall()
        ),
    )


WHAT = (
    "owe", "owe", "owe", "delivered", "sent", "failed", "parked", "gone", "anew", "retry",
    "forget",
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(WHAT),
        st.sampled_from(["photos", "music"]),
        st.sampled_from(["a", "b", "c"]),
        st.sets(st.sampled_from([BOB, CAROL, DAVE]), min_size=1),
        st.integers(1, 3),
    ),
    max_size=40,
)


async def change(
    journal: Journal, what: str, version: FileVersion, peers: set[str], number: int
) -> None:
    """One of the journal's changes, to whatever is owed."""
    match what:
        case "owe":
            await journal.owe([version], peers)
        case "gone":
            await journal.gone(version.folder, [version.path])
        case "anew":
            await journal.send_anew(version, min(peers))
        case "retry":
            await journal.retry(min(peers))
        case "forget":
            await journal.forget_others({version.folder: peers, "music": [BOB]})
        case _:
            for delivery in await journal.pending(peers, number):
                match what:
                    case "delivered" | "sent":
                        await journal.done(delivery, what, DIGEST)
                    case "failed":
                        await journal.failed(delivery, f"offline {number}", "", NOW + number)
                    case _:
                        await journal.failed(delivery, f"declined {number}", "ask", None)


@settings(max_examples=60, deadline=None)
@given(CHANGES)
def test_the_counts_are_those_of_a_look_at_everything(
    changes: list[tuple[str, str, str, set[str], int]],
) -> None:
    """Whatever happens in whatever order, and after a restart as well."""

    async def main(state: Path) -> None:
        async with open_journal(state) as journal:
            for what, folder, path, peers, number in changes:
                version = replace(VERSION, folder=folder, path=path, size=number)
                await change(journal, what, version, peers, number)
                assert count_slowly(journal._database.connection) == journal.counts()
            last = journal.counts()
        async with open_journal(state) as journal:
            assert last == journal.counts()

    with tempfile.TemporaryDirectory() as state:
        trio.run(main, Path(state))


async def test_counting_looks_at_no_more_than_it_must(journal: Journal) -> None:
    """After every change: searches in indices, however much was delivered."""
    await journal.owe([VERSION], [BOB])
    await journal.failed(await only(journal), "offline", "", NOW)
    statements: list[str] = []
    database = journal._database.connection
    database.set_trace_callback(statements.append)
    await journal.retry(CAROL)
    database.set_trace_callback(None)
    queries = [each for each in statements if each.startswith("SELECT")]
    steps = {
        step
        for query in queries
        for *_, step in database.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
    }
    assert steps == {
        "SCAN tally",
        "SCAN folder_tally",
        "SEARCH owed USING INDEX owed_error (peer=?)",
        "SEARCH owed USING INDEX owed_next (peer=? AND parked=? AND <expr>=? AND not_before>?)",
    }


# --- Outside any folder

OUTSIDE_FILE = replace(VERSION, folder=OUTSIDE, path="/tmp/letter.pdf")


async def test_what_a_person_sends_is_owed_though_the_peer_has_it(journal: Journal) -> None:
    await journal.send_anew(OUTSIDE_FILE, BOB)
    delivery = await only(journal)
    assert delivery.version == OUTSIDE_FILE
    assert await journal.standing(OUTSIDE, OUTSIDE_FILE.path, BOB) == Standing(state="pending")
    await journal.done(delivery, "delivered", DIGEST)
    assert await owed(journal) == []
    assert await journal.standing(OUTSIDE, OUTSIDE_FILE.path, BOB) == Standing(
        state="delivered"
    )
    await journal.send_anew(OUTSIDE_FILE, BOB)
    assert (await only(journal)).version == OUTSIDE_FILE
    assert await journal.standing(OUTSIDE, OUTSIDE_FILE.path, BOB) == Standing(state="pending")


async def test_what_a_person_sends_again_is_not_parked_any_more(journal: Journal) -> None:
    await journal.send_anew(OUTSIDE_FILE, BOB)
    await journal.failed(await only(journal), "declined", "ask bob", None)
    assert await journal.standing(OUTSIDE, OUTSIDE_FILE.path, BOB) == Standing(
        state="parked", attempts=1, error="declined", hint="ask bob"
    )
    await journal.send_anew(OUTSIDE_FILE, BOB)
    assert await journal.standing(OUTSIDE, OUTSIDE_FILE.path, BOB) == Standing(state="pending")


async def test_an_older_version_that_is_done_does_not_bring_the_newer_to_others(
    journal: Journal,
) -> None:
    """Outside any folder each version goes to whom a person has named, and to nobody else."""
    newer = replace(OUTSIDE_FILE, size=99)
    await journal.send_anew(OUTSIDE_FILE, BOB)
    await journal.send_anew(newer, CAROL)
    await journal.done(await only(journal), "sent", DIGEST)
    assert await owed(journal) == []
    assert (await only(journal, CAROL)).version == newer


async def test_what_a_person_sends_may_have_to_wait(journal: Journal) -> None:
    await journal.send_anew(OUTSIDE_FILE, BOB, not_before=NOW + 2)
    assert (await only(journal)).not_before == NOW + 2
    assert journal.counts().peers[BOB].next_try == NOW + 2


async def test_what_went_away_before_it_was_sent_is_dropped(journal: Journal) -> None:
    await journal.send_anew(OUTSIDE_FILE, BOB)
    await journal.gone(OUTSIDE, [OUTSIDE_FILE.path])
    assert await journal.standing(OUTSIDE, OUTSIDE_FILE.path, BOB) == Standing(state="dropped")


async def test_what_is_sent_to_somebody_unknown_is_forgotten(journal: Journal) -> None:
    await journal.send_anew(OUTSIDE_FILE, BOB)
    await journal.send_anew(OUTSIDE_FILE, CAROL)
    await journal.forget_others({OUTSIDE: [CAROL]})
    assert await owed(journal) == []
    assert (await only(journal, CAROL)).version == OUTSIDE_FILE


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
