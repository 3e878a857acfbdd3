from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from syncd.bytestreams import outgoing
from syncd.sync.plan import (
    ANSWER_GRACE,
    MAX_LARGE,
    MAX_RUNNING,
    RETRY_FIRST,
    RETRY_LAST,
    SMALL,
    Delivery,
    FileVersion,
    Running,
    next_deliveries,
    retry_delay,
)
from syncd.transfer.pump import PEER_THREADS

NOW = 1_000_000.0  # seconds since 1970
PEERS = ("bob@example.org", "carol@example.org", "dave@example.org")
ALL = frozenset(PEERS)


def delivery(
    number: int,
    peer: str = PEERS[0],
    *,
    path: str | None = None,
    size: int = 1,
    not_before: float = 0.0,
) -> Delivery:
    version = FileVersion(
        folder="photos", path=path or f"{number}.raw", size=size, mtime_ns=number, inode=number
    )
    return Delivery(id=number, version=version, peer=peer, not_before=not_before)


def moving(each: Delivery) -> Running:
    return Running(each, NOW, answered=True)


def start(
    pending: list[Delivery],
    *,
    running: list[Delivery] | None = None,
    online: frozenset[str] = ALL,
    parallel: int = 4,
    places: int = MAX_RUNNING,
    now: float = NOW,
) -> tuple[list[int], float]:
    """Ids of what starts, and when to ask again."""
    chosen, wake = next_deliveries(
        pending,
        running=[moving(each) for each in running or []],
        online=online,
        limit_of=lambda _: parallel,
        places=places,
        now=now,
    )
    return [each.id for each in chosen], wake


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Delivery], list[Delivery]]:
    """What is owed, and what of it runs; few paths, so that slots collide."""
    made = draw(
        st.lists(
            st.tuples(
                st.sampled_from(PEERS),
                st.integers(0, 60),
                st.sampled_from([1, SMALL, SMALL + 1]),
                st.sampled_from([0.0, NOW, NOW + 5]),
            ),
            max_size=150,
        )
    )
    owed = [
        delivery(number, peer, path=f"{path}.raw", size=size, not_before=not_before)
        for number, (peer, path, size, not_before) in enumerate(made)
    ]
    running = draw(st.lists(st.sampled_from(owed), max_size=8)) if owed else []
    return owed, list({each.slot: each for each in running}.values())


@given(worlds(), st.integers(1, 64), st.integers(1, 40), st.frozensets(st.sampled_from(PEERS)))
def test_no_limit_is_ever_passed(
    world: tuple[list[Delivery], list[Delivery]],
    parallel: int,
    places: int,
    online: frozenset[str],
) -> None:
    owed, running = world
    chosen, wake = next_deliveries(
        owed,
        running=[moving(each) for each in running],
        online=online,
        limit_of=lambda _: parallel,
        places=places,
        now=NOW,
    )
    assert len(running) + len(chosen) <= max(MAX_RUNNING, len(running))
    assert len(running) + len(chosen) <= max(places, len(running))
    slots = Counter(each.slot for each in (*running, *chosen))
    assert [slot for slot, count in slots.items() if count > 1] == []
    started = Counter(each.peer for each in chosen)
    before = Counter(each.peer for each in running)
    for peer, count in started.items():
        assert before[peer] + count <= parallel
    assert set(started) <= online
    assert [each for each in chosen if each.not_before > NOW] == []
    assert wake in (math.inf, NOW + 5)


@given(worlds(), st.integers(1, 5), st.integers(1, 9))
def test_everything_starts_in_the_end(
    world: tuple[list[Delivery], list[Delivery]], parallel: int, places: int
) -> None:
    """Whatever is owed: finish what runs, ask again when told, and nothing is left over."""
    owed, _ = world
    now, left, started = NOW, list(owed), list[int]()
    while left:
        chosen, wake = next_deliveries(
            left,
            running=[],
            online=ALL,
            limit_of=lambda _: parallel,
            places=places,
            now=now,
        )
        if not chosen:
            assert now < wake < math.inf
            now = wake
        started += [each.id for each in chosen]
        left = [each for each in left if each not in chosen]
    assert sorted(started) == [each.id for each in owed]


def test_the_oldest_start_first_and_no_more_than_allowed() -> None:
    owed = [delivery(number) for number in range(9)]
    assert start(owed, parallel=3) == ([0, 1, 2], math.inf)
    assert start(owed, running=owed[:2], parallel=3) == ([2], math.inf)
    assert start(owed, running=owed[:3], parallel=3) == ([], math.inf)


def test_a_peer_that_is_offline_gets_nothing() -> None:
    owed = [
        delivery(1, "bob@example.org"),
        delivery(2, "carol@example.org", not_before=NOW + 1),
    ]
    assert start(owed, online=frozenset()) == ([], math.inf)
    assert start(owed, online=frozenset({"carol@example.org"})) == ([], NOW + 1)


def test_two_versions_of_a_file_never_run_to_one_peer_at_a_time() -> None:
    old, new = delivery(1, path="a"), delivery(2, path="a")
    to_carol = delivery(3, "carol@example.org", path="a")
    assert start([old, new, to_carol]) == ([1, 3], math.inf)
    assert start([new], running=[old]) == ([], math.inf)
    # Nor is it any use to ask again before the first one has ended.
    assert start([replace(new, not_before=NOW + 5)], running=[old]) == ([], math.inf)


def test_a_small_file_never_waits_for_huge_ones() -> None:
    huge = [delivery(number, size=SMALL + 1) for number in range(10)]
    small = delivery(99, size=SMALL)
    assert start([*huge, small]) == ([0, 1, 2, 99], math.inf)
    assert start([*huge, small], running=huge[:3]) == ([99], math.inf)
    # The kept place stays free when there is nothing small.
    assert start(huge, running=huge[:3]) == ([], math.inf)


def test_with_one_place_a_huge_file_may_have_it() -> None:
    huge, small = delivery(1, size=SMALL + 1), delivery(2)
    assert start([huge, small], parallel=1) == ([1], math.inf)
    assert start([huge, small], parallel=1, running=[huge]) == ([], math.inf)


def test_peers_take_turns() -> None:
    """A peer that is owed thousands leaves the others their share of all places."""
    owed = [delivery(number) for number in range(100)]
    owed += [delivery(100 + number, "carol@example.org") for number in range(100)]
    owed += [delivery(200, "dave@example.org")]
    chosen, _ = start(owed, parallel=64)
    assert len(chosen) == MAX_RUNNING
    assert chosen[:5] == [0, 100, 200, 1, 101]
    bob = len([number for number in chosen if number < 100])
    assert bob == len(chosen) - bob  # carol and dave have the other half


def test_a_place_goes_to_the_peer_that_has_the_fewest() -> None:
    """Else two peers that are owed thousands would keep all places among themselves."""
    bob = [delivery(number) for number in range(9)]
    carol = [delivery(10 + number, "carol@example.org") for number in range(9)]
    dave = [delivery(20 + number, "dave@example.org") for number in range(9)]
    running = [*bob[:4], *carol[:3]]
    assert start([*bob, *carol, *dave], running=running, places=8) == ([20], math.inf)
    assert start([*bob, *carol, *dave], running=running, places=10) == ([20, 21, 22], math.inf)


@given(st.lists(st.integers(1, 60), min_size=3, max_size=3), st.integers(3, 12))
def test_no_peer_waits_while_another_has_two_places_more(
    amounts: list[int], places: int
) -> None:
    """One delivery after the other ends; small files only, and everybody is there."""
    left = [
        delivery(100 * number + each, peer)
        for number, peer in enumerate(PEERS)
        for each in range(amounts[number])
    ]
    running: list[Delivery] = []
    while left or running:
        ids, _ = start(left, running=running, parallel=64, places=places)
        running += [each for each in left if each.id in ids]
        left = [each for each in left if each.id not in ids]
        counts = Counter(each.peer for each in running)
        waiting = {each.peer for each in left}
        for peer in waiting:
            assert counts[peer] >= max(counts.values()) - 1 or counts.total() < places
        assert counts.total() == min(places, counts.total() + len(left))
        running.pop(0)


def test_a_file_for_several_peers_starts_to_all_of_them_before_the_next_file() -> None:
    """So that the disk reads it once."""
    owed = [
        delivery(10 * file + number, peer, path=f"{file}.raw")
        for file in range(3)
        for number, peer in enumerate(PEERS)
    ]
    by_peer = sorted(owed, key=lambda each: each.peer)
    assert start(by_peer, places=6) == ([0, 1, 2, 10, 11, 12], math.inf)


def test_the_last_place_of_all_is_kept_for_small_files() -> None:
    huge = [delivery(number, peer, size=SMALL + 1) for number, peer in enumerate(PEERS)]
    small = delivery(9, PEERS[2])
    assert start([*huge, small], places=3) == ([0, 1, 9], math.inf)
    assert start(huge[2:], running=huge[:2], places=3) == ([], math.inf)
    # With one place for everybody it is whoever's turn it is.
    assert start(huge, places=1) == ([0], math.inf)


def test_no_more_large_files_run_to_a_peer_than_it_has_threads_for() -> None:
    """However many small ones the user lets run beside them."""
    large = [delivery(number, size=SMALL + 1, path=f"{number}.iso") for number in range(20)]
    small = [delivery(100 + number, path=f"{number}.txt") for number in range(20)]
    ids, _ = start([*large, *small], parallel=12, places=30)
    assert ids == [*range(MAX_LARGE), *range(100, 100 + 12 - MAX_LARGE)]


def test_the_threads_for_a_peer_are_those_of_the_pump() -> None:
    assert MAX_LARGE == PEER_THREADS - 1


def test_the_plan_and_the_places_at_proxies_call_the_same_files_small() -> None:
    """Else one that the plan has started might wait behind huge ones for a proxy."""
    assert SMALL == outgoing.SMALL


@given(worlds(), st.integers(2, 64), st.integers(2, 40))
def test_small_files_start_unless_small_files_have_the_places(
    world: tuple[list[Delivery], list[Delivery]], parallel: int, places: int
) -> None:
    """However many huge ones there are, in whatever order."""
    owed, _ = world
    huge = [replace(each, version=replace(each.version, size=SMALL + 1)) for each in owed]
    ids, _ = start(huge, parallel=parallel, places=places, now=NOW + 5)
    running = [each for each in huge if each.id in ids]
    small = delivery(999, path="small")
    assert start([*huge, small], running=running, parallel=parallel, places=places)[0] == [999]


def test_a_peer_that_does_not_answer_gives_its_place_up() -> None:
    """It needs nothing that moves bytes; but its own places it keeps."""
    silent = Running(delivery(1), NOW)
    owed = [delivery(2), delivery(3, "carol@example.org"), delivery(4, "carol@example.org")]

    def begin(running: list[Running], *, after: float) -> tuple[list[int], float]:
        chosen, wake = next_deliveries(
            owed,
            running=running,
            online=ALL,
            limit_of=lambda _: 1,
            places=1,
            now=NOW + after,
        )
        return [each.id for each in chosen], wake

    assert begin([silent], after=1) == ([], NOW + ANSWER_GRACE)
    assert begin([silent], after=ANSWER_GRACE) == ([3], math.inf)
    # Who has answered moves bytes, however long it takes.
    answered = replace(silent, answered=True)
    assert begin([answered], after=ANSWER_GRACE) == ([], math.inf)
    # The clock was set back: as if it had just begun.
    assert begin([silent], after=-3600)[0] == []


def test_silent_peers_do_not_pile_up_without_end() -> None:
    silent = [
        Running(delivery(number, f"{number}@example.org"), NOW - 60)
        for number in range(MAX_RUNNING)
    ]
    chosen, _ = next_deliveries(
        [delivery(99)],
        running=silent,
        online=ALL,
        limit_of=lambda _: 4,
        places=8,
        now=NOW,
    )
    assert chosen == []


def test_each_peer_has_a_limit_of_its_own() -> None:
    owed = [delivery(number, PEERS[number % 2]) for number in range(8)]
    chosen, _ = next_deliveries(
        owed,
        running=[],
        online=ALL,
        limit_of=lambda peer: 1 if peer == PEERS[0] else 3,
        places=8,
        now=NOW,
    )
    assert [each.id for each in chosen] == [0, 1, 3, 5]


def test_what_must_wait_says_how_long() -> None:
    owed = [delivery(1, not_before=NOW + 9), delivery(2, not_before=NOW + 4), delivery(3)]
    assert start(owed) == ([3], NOW + 4)
    assert start(owed, now=NOW + 4) == ([2, 3], NOW + 9)


def test_a_retry_further_off_than_any_is_due() -> None:
    """The clock was set back since; nobody shall wait for years."""
    owed = [delivery(1, not_before=NOW + RETRY_LAST), delivery(2, not_before=4e9)]
    assert start(owed) == ([2], NOW + RETRY_LAST)


def test_nothing_owed_is_nothing_to_do() -> None:
    assert start([]) == ([], math.inf)


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_retry_waits_within_its_bounds(attempts: int, jitter: float) -> None:
    delay = retry_delay(attempts, jitter)
    assert RETRY_FIRST / 2 <= delay <= RETRY_LAST
    assert retry_delay(attempts, 0.0) <= delay <= retry_delay(attempts, 1.0)


def test_retries_come_ever_later() -> None:
    assert [retry_delay(attempts, 1.0) for attempts in (1, 2, 3, 9, 10, 99)] == [
        2.0, 4.0, 8.0, 512.0, 900.0, 900.0,
    ]  # fmt: skip
