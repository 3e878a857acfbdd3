from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from syncd.sync.plan import (
    MAX_RUNNING,
    RETRY_FIRST,
    RETRY_LAST,
    SMALL,
    Delivery,
    FileVersion,
    next_deliveries,
    retry_delay,
)

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


def start(
    pending: list[Delivery],
    *,
    running: list[Delivery] | None = None,
    online: frozenset[str] = ALL,
    parallel: int = 4,
    now: float = NOW,
) -> tuple[list[int], float]:
    """Ids of what starts, and when to ask again."""
    chosen, wake = next_deliveries(
        pending, running=running or [], online=online, parallel=parallel, now=now
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


@given(worlds(), st.integers(1, 64), st.frozensets(st.sampled_from(PEERS)))
def test_no_limit_is_ever_passed(
    world: tuple[list[Delivery], list[Delivery]],
    parallel: int,
    online: frozenset[str],
) -> None:
    owed, running = world
    chosen, wake = next_deliveries(
        owed, running=running, online=online, parallel=parallel, now=NOW
    )
    assert len(running) + len(chosen) <= max(MAX_RUNNING, len(running))
    slots = Counter(each.slot for each in (*running, *chosen))
    assert [slot for slot, count in slots.items() if count > 1] == []
    started = Counter(each.peer for each in chosen)
    before = Counter(each.peer for each in running)
    for peer, count in started.items():
        assert before[peer] + count <= parallel
    assert set(started) <= online
    assert [each for each in chosen if each.not_before > NOW] == []
    assert wake in (math.inf, NOW + 5)


@given(worlds(), st.integers(1, 5))
def test_everything_starts_in_the_end(
    world: tuple[list[Delivery], list[Delivery]], parallel: int
) -> None:
    """Whatever is owed: finish what runs, ask again when told, and nothing is left over."""
    owed, _ = world
    now, left, started = NOW, list(owed), list[int]()
    while left:
        chosen, wake = next_deliveries(left, running=[], online=ALL, parallel=parallel, now=now)
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
