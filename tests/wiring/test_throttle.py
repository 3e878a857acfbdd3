from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.wiring.throttle import BURST, MIN_RATE, Bucket, Throttle


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_bytes_take_the_time_that_the_limit_gives_them() -> None:
    bucket = Bucket(10_000)
    assert bucket.take(10_000, 0.0) == pytest.approx(1 - BURST)
    assert bucket.take(10_000, 1.0) == pytest.approx(1 - BURST)
    assert bucket.take(5_000, 1.0) == pytest.approx(1.5 - BURST)


def test_silence_is_not_saved_up() -> None:
    """A day without a byte is worth one burst, not a day's bytes."""
    bucket = Bucket(10_000)
    bucket.take(1, 0.0)
    assert bucket.take(10_000, 86_400.0) == pytest.approx(1 - BURST)


def test_no_limit_is_no_wait() -> None:
    bucket = Bucket()
    assert bucket.take(1 << 60, 0.0) == 0.0
    assert Throttle([], clock=Clock(), lock=nullcontext()).take(1 << 60) == 0.0


def test_limit_that_changes_holds_for_what_comes_next() -> None:
    """What was owed at the old one is owed no more: some would wait for it beyond patience."""
    bucket = Bucket(1e9)
    assert bucket.take(1_000_000_000, 0.0) == pytest.approx(1 - BURST)
    bucket.rate = 2_000
    assert bucket.take(2_000, 0.0) == pytest.approx(1 - BURST)
    bucket.rate = math.inf
    assert bucket.take(1 << 40, 0.0) == 0.0
    assert bucket.rate == math.inf


def test_limit_that_is_set_to_what_it_is_does_not_change() -> None:
    bucket = Bucket(2_000)
    assert bucket.take(4_000, 0.0) == pytest.approx(2 - BURST)
    bucket.rate = 2_000
    assert bucket.take(0, 0.0) == pytest.approx(2 - BURST)
    assert bucket.changes == 1


def test_bytes_that_moved_under_another_limit_are_not_counted() -> None:
    """Four that are each in the middle of a step of a megabyte when the limit is set."""
    clock, bucket, other = Clock(), Bucket(), Bucket()
    throttle = Throttle([bucket, other], clock=clock, lock=nullcontext())
    before = throttle.limits
    bucket.rate = 50 * 1024
    assert [throttle.take(1 << 20, before) for _ in range(4)] == [0.0] * 4
    assert throttle.limits != before
    assert throttle.take(51_200, throttle.limits) == pytest.approx(1 - BURST)
    before = throttle.limits
    other.rate = 1024
    assert throttle.take(1 << 20, before) == 0.0


@pytest.mark.parametrize("rate", [0.0, -1.0, MIN_RATE - 1, math.nan])
def test_limit_at_which_nothing_would_move_is_our_own_mistake(rate: float) -> None:
    with pytest.raises(ValueError, match="too low"):
        Bucket(rate)
    bucket = Bucket(MIN_RATE)
    with pytest.raises(ValueError, match="too low"):
        bucket.rate = rate
    assert bucket.rate == MIN_RATE


def test_the_strictest_limit_says_how_long_and_all_of_them_count() -> None:
    clock = Clock()
    everybody, peer = Bucket(4_000), Bucket(2_000)
    both = Throttle([everybody, peer], clock=clock, lock=nullcontext())
    other = Throttle([everybody], clock=clock, lock=nullcontext())
    assert both.take(4_000) == pytest.approx(2 - BURST)
    assert other.take(4_000) == pytest.approx(2 - BURST)
    assert both.take(0) == pytest.approx(2 - BURST)


@given(
    st.lists(st.integers(1, 100_000), min_size=1, max_size=50),
    st.lists(st.floats(0, 3), min_size=50, max_size=50),
    st.floats(MIN_RATE, 1e6),
)
def test_whoever_waits_as_told_never_exceeds_the_limit(
    counts: list[int], idle: list[float], rate: float
) -> None:
    """Over any span that begins after a wait: the bytes of the span, and one burst."""
    bucket, now = Bucket(rate), 0.0
    moved: list[tuple[float, int]] = []
    for count, pause in zip(counts, idle, strict=False):
        now += pause
        now += bucket.take(count, now)
        moved.append((now, count))
    for start, (began, _) in enumerate(moved):
        total = 0
        for ended, count in moved[start + 1 :]:
            total += count
            assert total <= (ended - began + BURST) * rate * (1 + 1e-9) + 1e-6


def test_those_who_share_a_limit_get_the_same_share() -> None:
    """Two that move steps of one size, each as soon as it may."""
    clock = Clock()
    bucket = Bucket(10_000)
    throttles = [Throttle([bucket], clock=clock, lock=nullcontext()) for _ in range(2)]
    ready, moved = [0.0, 0.0], [0, 0]
    while min(ready) < 100:
        who = ready.index(min(ready))
        clock.now = max(clock.now, 1000 + ready[who])
        moved[who] += 1_000
        ready[who] = clock.now - 1000 + throttles[who].take(1_000)
    assert abs(moved[0] - moved[1]) <= 1_000
    assert sum(moved) == pytest.approx(1_000_000, rel=0.01)


def test_threads_that_take_at_once_lose_no_byte() -> None:
    bucket, lock, clock = Bucket(1024), threading.Lock(), Clock()
    throttle = Throttle([bucket], clock=clock, lock=lock)
    waits: list[float] = []

    def take() -> None:
        waits.extend(throttle.take(1024) for _ in range(500))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits.sort()
    assert waits[-1] == pytest.approx(2000 - BURST)
    assert all(b - a == pytest.approx(1) for a, b in pairwise(waits))
